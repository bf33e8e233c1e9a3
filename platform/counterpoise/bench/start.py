"""`counterpoise bench start`: seconds from a command to the first step, in turns with what cannot be done without.

Without Ray: `python -c "import torch"`. With Ray: a `TorchTrainer` whose workers do nothing, on a cluster of its own
with as many CPUs. Ours is `counterpoise train` on a few rows, until the record of its first epoch, which is one step,
is there; what comes after it is not waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoise.bench.machine import Spread, Tree, machine, machine_line, spread_text
from counterpoise.contracts import ResourceError

MOST_S = 300.0
_LOOK_S = 0.01
_BARE = """
import ray, tempfile
from ray.train import ScalingConfig, RunConfig
from ray.train.torch import TorchTrainer
ray.init(address="local", num_cpus={cpus}, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
with tempfile.TemporaryDirectory() as root:
    TorchTrainer(
        lambda: None, scaling_config=ScalingConfig(num_workers={workers}), run_config=RunConfig(storage_path=root)
    ).fit()
"""
_TORCH, _LOCAL, _BARE_RAY, _RAY = "import torch", "train", "bare TorchTrainer", "train on Ray"
_BASES = {_LOCAL: _TORCH, _RAY: _BARE_RAY}


def start_times(*, rounds: int, workers: int, ray: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds by the clock and of CPU until the first step, and their ratios to the other side of the same round."""
    from counterpoise.verify import ROWS, write_corpus

    facts = machine()
    with tempfile.TemporaryDirectory(prefix="counterpoise-bench-") as root:
        write_corpus(os.path.join(root, "corpus"))
        experiment = Path(root) / "experiment.yaml"
        # All of the train split is one batch, so that the first epoch is the first step.
        content = {"corpus": os.path.join(root, "corpus"), "method": "joint", "batch_size": ROWS["train"], "epochs": 50}
        experiment.write_text(json.dumps(content))

        def train(number: int, engine: str, count: int) -> list[str]:
            names = ["--runs", os.path.join(root, "runs"), "--name", f"{engine}-{number}", "--device", "cpu"]
            more = ["--engine", engine, "--workers", str(count), "--metrics-port", "off"]
            return [sys.executable, "-m", "counterpoise", "train", str(experiment), *names, *more]

        sides: dict[str, Callable[[int], dict[str, float]]] = {
            _TORCH: lambda _: _until([sys.executable, "-c", "import torch"], None),
            _LOCAL: lambda n: _until(train(n, "local", 1), Path(root, "runs", f"local-{n}", "records.jsonl")),
        }
        if ray:
            bare = _BARE.format(cpus=workers + 2, workers=workers)
            sides[_BARE_RAY] = lambda _: _until([sys.executable, "-c", bare], None)
            sides[_RAY] = lambda n: _until(train(n, "ray", workers), Path(root, "runs", f"ray-{n}", "records.jsonl"))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(rounds + 1):  # files come from the disk in the first round
            names = list(sides)
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                seen = sides[name](number)
                if number:
                    found[name].append(seen)
            say("warmed up" if number == 0 else f"round {number} of {rounds} done")
    return {"machine": facts, "rounds": rounds, "workers": workers, "rows": _rows(found)}


def _rows(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for name, seen in found.items():
        row: dict[str, Any] = {"what": name}
        for key in ("seconds", "cpu_s"):
            row[key] = statistics.median(s[key] for s in seen)
            if name in _BASES:
                base = found[_BASES[name]]
                row[f"{key}_ratio"] = Spread.of([s[key] / b[key] for s, b in zip(seen, base, strict=True)]).to_json()
        rows.append(row)
    return rows


def _until(command: Sequence[str], records: Path | None) -> dict[str, float]:
    """Until a command ends, or until the records of a run tell of an epoch; then it is ended with all it started."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COUNTERPOISE_", "RAY_"))}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        tree = Tree(process.pid)
        try:
            cpu = 0.0
            while process.poll() is None and not (records is not None and _has_epoch(records)):
                if time.perf_counter() - start > MOST_S:
                    raise ResourceError(f"{' '.join(command[:6])} has made no step after {MOST_S:.0f} s")
                if records is None:
                    cpu = max(cpu, tree.cpu_s())
                time.sleep(_LOOK_S)
            seconds = time.perf_counter() - start
            cpu = max(cpu, tree.cpu_s())
            if process.returncode if records is None else process.poll() is not None and not _has_epoch(records):
                output.seek(0)
                raise ResourceError(f"{' '.join(command[:6])} failed: {output.read()[-2000:].decode(errors='replace')}")
        finally:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):  # twice: it quits at once, with its Ray
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5 if number == signal.SIGINT else None)
    return {"seconds": seconds, "cpu_s": cpu}


def _has_epoch(records: Path) -> bool:
    return records.exists() and b'"kind": "epoch"' in records.read_bytes()


def render(result: Mapping[str, Any]) -> str:
    lines = [
        machine_line(result["machine"]),
        f"{result['rounds']} rounds in turn, {result['workers']} workers on Ray; from the command to the first step",
        f"{'':20}{'seconds':>9}  {'of CPU':>7}  ratio (quartiles)          ratio of CPU",
    ]
    for row in result["rows"]:
        ratios = [spread_text(row[key]) for key in ("seconds_ratio", "cpu_s_ratio") if key in row]
        columns = "  ".join(f"{text:25}" for text in ratios)
        lines.append(f"{row['what']:20}{row['seconds']:9.2f}  {row['cpu_s']:7.2f}  {columns}".rstrip())
    return "\n".join(lines)
