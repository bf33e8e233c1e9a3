"""Run a program of trainables/, with --resume if the run is there already: for what starts the same command again.

    python cluster/again.py trainables/train.py EXPERIMENT.yaml --runs s3://bucket/runs --name a1

Slurm requeues a job and KubeRay retries one with the command it was given. A run that has finished is left alone, and
the exit code is 0. Everything behind the program is its own; --name is needed.
"""

import argparse
import os
import sys

from counterpoise import storage
from counterpoise.engine.run import MANIFEST, RunFolder


def main() -> None:
    program, *arguments = sys.argv[1:] or sys.exit(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", default=os.environ.get("COUNTERPOISE_RUNS") or "runs")
    parser.add_argument("--name")
    known, _ = parser.parse_known_args(arguments)
    if known.name is None:
        sys.exit("cluster/again.py: give the run a --name, by which it is found again")
    folder = storage.join(known.runs, known.name)
    if storage.exists(storage.join(folder, MANIFEST)) and RunFolder(folder).state() == "finished":
        print(f"run {known.name!r} is finished", flush=True)
        return
    begun = any(storage.exists(storage.join(folder, file)) for file in (MANIFEST, "sweep.json", "comparison.json"))
    if begun and "--resume" not in arguments:
        arguments.append("--resume")
    os.execv(sys.executable, [sys.executable, program, *arguments])


if __name__ == "__main__":
    main()
