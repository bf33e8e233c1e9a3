"""Make the shards of a corpus from its original download on Ray: what `ray job submit` runs.

    ray job submit --runtime-env cluster/runtime_env.yaml --working-dir . -- \
        python trainables/ingest.py cremad --raw s3://bucket/raw/CREMA-D \
        --out s3://bucket/corpora/cremad --workers 16

Arguments are those of `counterpoise corpora prepare`; inside a job the parts are made on the cluster of the job
(RAY_ADDRESS). Raw folder and output must lie where every machine can reach them: on s3:// or in a shared folder.
"""

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    if find_spec("counterpoise") is None:  # a checkout, not an installed package
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
    from counterpoise.cli import main as counterpoise

    counterpoise(["corpora", "prepare", *sys.argv[1:], "--engine", "ray"])


if __name__ == "__main__":
    main()
