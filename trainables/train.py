"""Train one experiment on Ray: what `ray job submit` runs.

    ray job submit --runtime-env cluster/runtime_env.yaml --working-dir . -- \
        python trainables/train.py trainables/experiments/av_digits.yaml --workers 4

Arguments are those of `counterpoise train`; inside a job the workers run on the cluster of the job (RAY_ADDRESS).
Runs must lie where every machine can write: give `--runs s3://bucket/runs` or a shared folder.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    if find_spec("counterpoise") is None:  # a checkout, not an installed package
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
    from counterpoise.cli import main as counterpoise

    counterpoise(["train", *sys.argv[1:], "--engine", "ray"])


if __name__ == "__main__":
    main()
