"""The long set of faults, by one command with a seed: `uv run poe trust --seed 7`. Prints what came of each kind."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def rows(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per test: faults that were injected, landed, survived; controls, and how many were caught; recovery."""
    found = []
    for test in sorted({str(line["test"]) for line in lines}, key=lambda t: (int(t.split()[0]), t)):
        own = [line for line in lines if line["test"] == test]
        faults = [line for line in own if not line["control"]]
        controls = [line for line in own if line["control"]]
        times = sorted(line["recover_s"] for line in faults if line["recover_s"] is not None)
        found.append(
            [
                test,
                str(len(faults)),
                str(sum(line["landed"] for line in faults)),
                str(sum(line["survived"] for line in faults)),
                f"{sum(not line['survived'] for line in controls)} of {len(controls)}" if controls else "-",
                f"{statistics.median(times):.1f} (at most {times[-1]:.1f})" if times else "-",
            ]
        )
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    head = ["test", "faults", "landed", "survived", "controls caught", "seconds to recover"]
    cells = [head, *rows(lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    kills = [line for line in lines if line["test"].startswith("1 ") and not line["control"]]
    if steps := [line["where"]["step"] for line in kills if line["where"].get("step") is not None]:
        tens = Counter(step // 10 for step in steps)
        text += "\nranks were killed at steps " + ", ".join(f"{10 * t}-{10 * t + 9}: {tens[t]}" for t in sorted(tens))
    return (
        text + "\nto recover: to the first step after a fault, without the import of torch, which workers here share\n"
    )


def passed(lines: Sequence[Mapping[str, Any]]) -> bool:
    return all(line["landed"] and line["survived"] != line["control"] for line in lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", default="0", help="decides every choice; default: 0")
    options.add_argument("--quick", action="store_true", help="the counts of the quick set")
    options.add_argument("--only", metavar="WORDS", help="tests whose names fit, as pytest's -k has it")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpoise-trust-") as folder:
        log = Path(folder) / "faults.jsonl"
        environment = {**os.environ, "COUNTERPOISE_TRUST_LOG": str(log), "COUNTERPOISE_TRUST_SEED": asked.seed}
        environment["COUNTERPOISE_TRUST"] = "quick" if asked.quick else "full"
        command = [sys.executable, "-m", "pytest", str(HERE), "-p", "no:cacheprovider", "-o", "timeout=3600"]
        began = time.monotonic()
        done = subprocess.run(
            [*command, *(["-k", asked.only] if asked.only else [])], env=environment, cwd=HERE.parents[1]
        )
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    minutes = (time.monotonic() - began) / 60
    versions = f"counterpoise {metadata.version('counterpoise')}, torch {metadata.version('torch')}"
    machine = f"Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"\nseed {asked.seed}, {minutes:.1f} min, {versions}, {machine}")
    print(table(lines) if lines else "no fault was brought about")
    return int(done.returncode or not lines or not passed(lines))


if __name__ == "__main__":
    sys.exit(main())
