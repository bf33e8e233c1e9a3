"""Evaluate the selected epoch of a run: what `ray job submit` runs.

    ray job submit --runtime-env cluster/runtime_env.yaml --working-dir . --entrypoint-num-cpus 1 -- \
        python trainables/evaluate.py s3://bucket/runs/a1 --split valid

Arguments are those of `counterpoise evaluate`. The work is done by the driver itself, so give it what it needs:
`--entrypoint-num-gpus 1` has Ray put it on a node with a GPU. The run must lie where that node can reach it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    if find_spec("counterpoise") is None:  # a checkout, not an installed package
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
    from counterpoise.cli import main as counterpoise

    counterpoise(["evaluate", *sys.argv[1:]])


if __name__ == "__main__":
    main()
