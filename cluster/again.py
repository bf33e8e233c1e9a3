"""Run a sweep, with --resume if it is there already: for what starts the same command again, as Slurm does.

    python cluster/again.py trainables/sweep.py SWEEP.yaml --runs s3://bucket/runs --name lr

Everything behind the program is its own; --name is needed. `train` does this itself with --auto-resume.
"""

import argparse
import os
import sys

from counterpoise import storage
from counterpoise.sweep import SWEEP


def main() -> None:
    program, *arguments = sys.argv[1:] or sys.exit(__doc__)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--runs", default=os.environ.get("COUNTERPOISE_RUNS") or "runs")
    parser.add_argument("--name")
    known, _ = parser.parse_known_args(arguments)
    if known.name is None:
        sys.exit("cluster/again.py: give the sweep a --name, by which it is found again")
    begun = storage.exists(storage.join(storage.join(known.runs, known.name), SWEEP))
    if begun and "--resume" not in arguments:
        arguments.append("--resume")
    os.execv(sys.executable, [sys.executable, program, *arguments])


if __name__ == "__main__":
    main()
