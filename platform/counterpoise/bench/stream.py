"""One epoch of a corpus larger than memory through the data source of training: rate, and how much memory it takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoise.bench.machine import Side, machine, machine_line, watched
from counterpoise.bench.media import make_shards
from counterpoise.contracts import ResourceError

Say = Callable[[str], None]


def stream_epoch(
    *,
    gib: float,
    memory_gib: float,
    processes: int,
    batch_size: int,
    shuffle_mib: int | None,
    out: str,
    say: Say,
) -> dict[str, Any]:
    """Stream a corpus of `gib` GiB once. The process is ended as soon as its memory is past the bound."""
    from counterpoise.telemetry.progress import progress

    facts = machine()
    with progress("writing a corpus") as callback:
        corpus, rows = make_shards(Path(out).absolute() / f"stream-{gib:g}", int(gib * 2**30), callback)
    stored = sum(path.stat().st_size for path in Path(corpus).glob("*.parquet"))
    spec = {"corpus": corpus, "processes": processes, "batch_size": batch_size, "shuffle_mib": shuffle_mib}
    side = Side("streaming", _reader, spec)
    bound = int(memory_gib * 2**30)
    with contextlib.closing(side):
        before = side.tree.memory_bytes()
        say(f"streaming {stored / 2**30:.2f} GiB")

        def over(now: int) -> None:
            if now > bound:
                side.kill()

        times: list[tuple[int, float]] = []
        with watched(side.tree, over) as peak:
            try:
                times = side.ask("go")
            except ResourceError:
                if peak[0] <= bound:
                    raise
    return {
        "machine": facts,
        "rows": rows,
        "stored_bytes": stored,
        "processes": processes,
        "batch_size": batch_size,
        "shuffle_mib": side.facts["shuffle_mib"],
        "windows": side.facts["windows"],
        "memory_before_bytes": before,
        "peak_memory_bytes": peak[0],
        "memory_bound_bytes": bound,
        "within": peak[0] <= bound,
        "finished": bool(times),
        **rates(times, stored, rows),
    }


def rates(times: Sequence[tuple[int, float]], stored: int, rows: int) -> dict[str, Any]:
    """Rates of the whole epoch and of its thirds by samples. times: (samples so far, seconds since the start)."""
    if not times:
        return {"seconds": None, "samples_per_s": None, "mib_per_s": None, "thirds_samples_per_s": []}
    total, seconds = times[-1]
    thirds = []
    begin = (0, 0.0)
    for part in (1, 2, 3):
        end = next(point for point in times if point[0] * 3 >= total * part)
        thirds.append((end[0] - begin[0]) / (end[1] - begin[1]))
        begin = end
    return {
        "seconds": seconds,
        "samples_per_s": total / seconds,
        "mib_per_s": total / rows * stored / seconds / 2**20,
        "thirds_samples_per_s": thirds,
    }


class _Epoch:
    """Takes every batch of an epoch: (samples so far, seconds since the start) after each."""

    def __init__(self, data: Any) -> None:
        self.data = data
        list(data.batches("train", rows=[0]))  # whatever decoding has to import is there before memory is looked at
        self.facts = {
            "shuffle_mib": data.options.shuffle_mib,
            "windows": max(
                data.least_windows("train"),
                data.num_samples("train") // data.options.shuffle_window,
                1,
            ),
        }

    def __call__(self, request: Any) -> list[tuple[int, float]]:
        start = time.perf_counter()
        times, samples = [], 0
        for batch in self.data.train_batches(1):
            samples += len(batch["label"])
            times.append((samples, time.perf_counter() - start))
        assert samples == self.data.num_samples("train"), f"{samples} of {self.data.num_samples('train')} rows came"
        return times


def _settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from counterpoise.data.options import DataOptions

    torch.set_num_threads(1)
    chosen: dict[str, Any] = {"cache": "off", "decode_threads": spec["processes"]}
    if spec["shuffle_mib"] is not None:
        chosen["shuffle_mib"] = spec["shuffle_mib"]
    return {"batch_size": spec["batch_size"], "options": DataOptions.model_validate(chosen)}


def _reader(spec: Mapping[str, Any]) -> Callable[[Any], Any]:
    from counterpoise.data.loader import LocalData

    return _Epoch(LocalData(spec["corpus"], **_settings(spec)))


def render(result: Mapping[str, Any]) -> str:
    gib = 2**30
    lines = [
        machine_line(result["machine"]),
        f"{result['rows']} rows, {result['stored_bytes'] / gib:.2f} GiB of encoded media, "
        f"{result['processes']} decoding threads, batches of {result['batch_size']}, windows of at most "
        f"{result['shuffle_mib']} MiB: {result['windows']}",
        "",
    ]
    if result["finished"]:
        first, middle, last = result["thirds_samples_per_s"]
        lines += [
            f"epoch             {result['seconds']:8.1f} s",
            f"samples/s         {result['samples_per_s']:8.1f}   ({result['mib_per_s']:.0f} MiB/s of encoded data)",
            f"  first third     {first:8.1f}",
            f"  middle third    {middle:8.1f}",
            f"  last third      {last:8.1f}",
        ]
    else:
        lines.append("epoch             ended before its last batch: past the bound")
    peak, before = result["peak_memory_bytes"] / gib, result["memory_before_bytes"] / gib
    verdict = "within" if result["within"] else "PAST"
    lines += [
        f"memory before     {before:8.2f} GiB",
        f"memory at most    {peak:8.2f} GiB, {verdict} the bound of {result['memory_bound_bytes'] / gib:g} GiB",
        "memory: of the reading process and all below it, shared pages once; the system's page cache does not count",
    ]
    return "\n".join(lines)
