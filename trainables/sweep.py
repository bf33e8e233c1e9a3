"""Run a sweep on Ray Tune: what `ray job submit` runs.

    ray job submit --runtime-env cluster/runtime_env.yaml --working-dir . -- \
        python trainables/sweep.py trainables/experiments/sweeps/av_digits_lr.yaml \
        --runs s3://bucket/runs --name lr

Arguments are those of `counterpoise sweep`; inside a job the trials run on the cluster of the job (RAY_ADDRESS).
Runs must lie where every machine can write: give `--runs s3://bucket/runs` or a shared folder. A job that was lost is
submitted again with `--resume --name lr`.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    if find_spec("counterpoise") is None:  # a checkout, not an installed package
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
    from counterpoise.cli import main as counterpoise

    counterpoise(["sweep", *sys.argv[1:]])


if __name__ == "__main__":
    main()
