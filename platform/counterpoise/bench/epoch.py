"""`counterpoise bench epoch`: a training epoch of AUG with its data, ours and the released code's in turns.

Both read the same clips of CREMA-D's shape from the disk, ours as shards and theirs as raw files, and train ResNet-18
twice with as many classifiers. Theirs is their `train_audio_video` over what their data set does, item by item, in the
worker processes of a DataLoader. Every side is a process that stays; ratios are formed within a round.

With `guards` two more of ours say what safety costs: one that also writes a checkpoint, and one that reads shards
without comparing the checksums of their pages.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from counterpoise.bench.ingest import AUGMENT, Say
from counterpoise.bench.machine import Side, Spread, machine, machine_line, spread_text
from counterpoise.bench.media import EMOTIONS, make_raw, prepare_cremad
from counterpoise.bench.released import chosen_resampler
from counterpoise.bench.released_step import check_checkout

OURS, RELEASED = "AUG, shards", "released AUG, raw files"
SAVING, UNCHECKED = "and a checkpoint", "without page checksums"


def epoch_rates(
    *,
    rows: int,
    batch_size: int,
    classifiers: int,
    processes: int,
    threads: int | None,
    rounds: int,
    device: str,
    compute: Mapping[str, Any],
    cache: str,
    against: str | None,
    resampler: str,
    out: str,
    say: Say,
    encoder: str = "resnet18",
    guards: bool = False,
) -> dict[str, Any]:
    """Seconds of epochs of both sides. processes: decoding threads of ours, worker processes of theirs.

    encoder: ours; theirs is resnet18.
    """
    from counterpoise.start import Settings
    from counterpoise.telemetry.progress import progress

    facts = machine()
    settings = Settings(device=device, threads=threads)
    folder = Path(out).absolute()
    with progress("writing a raw download") as callback:
        raw = make_raw(folder / f"raw-{rows}", rows, callback)
    with progress("preparing its shards") as callback:
        corpus = prepare_cremad(raw, folder / f"shards-{rows}", processes, callback)
    shared = {
        "batch_size": batch_size,
        "classifiers": classifiers,
        "processes": processes,
        "threads": settings.resolved_threads,
        "device": settings.resolved_device,
    }
    makers: dict[str, tuple[Callable[[Any], Callable[[int], float]], dict[str, Any]]] = {
        OURS: (_ours, {"name": "usual", "corpus": corpus, "encoder": encoder, "compute": dict(compute), "cache": cache})
    }
    if guards:
        make, spec = makers[OURS]
        makers[SAVING] = make, {**spec, "name": "saving", "saving": True}
        makers[UNCHECKED] = make, {**spec, "name": "unchecked", "unchecked": True}
    if against:
        released = {"raw": str(raw), "place": check_checkout(against), "resampler": chosen_resampler(resampler)}
        makers[RELEASED] = (_released, released)
    times: dict[str, list[float]] = {name: [] for name in makers}
    with contextlib.ExitStack() as opened:
        runs = opened.enter_context(tempfile.TemporaryDirectory(prefix="counterpoise-bench-"))
        sides = []
        for name, (make, spec) in makers.items():
            say(f"starting: {name}")
            sides.append(opened.enter_context(contextlib.closing(Side(name, make, {**shared, **spec, "runs": runs}))))
        for number in range(rounds + 1):
            turn = number % len(sides)
            for side in [*sides[turn:], *sides[:turn]]:
                seconds = side.ask(number)
                if number:
                    times[side.name].append(seconds)
            say("warmed up" if number == 0 else f"round {number} of {rounds} done")
    lines = []
    for name, values in times.items():
        line = {"what": name, "median_s": statistics.median(values), "samples_per_s": rows / statistics.median(values)}
        if name == OURS and RELEASED in times:
            ratios = [theirs / mine for theirs, mine in zip(times[RELEASED], values, strict=True)]
            line["times_faster"] = Spread.of(ratios).to_json()
        if name in (SAVING, UNCHECKED):
            ratios = [theirs / mine for theirs, mine in zip(values, times[OURS], strict=True)]
            line["times_as_long"] = Spread.of(ratios).to_json()
        lines.append(line)
    return {
        "machine": facts,
        "rows": rows,
        "rounds": rounds,
        "compute": dict(compute),
        "cache": cache,
        "encoder": encoder,
        **shared,
        "resampler": makers[RELEASED][1]["resampler"] if against else None,
        "rows_measured": lines,
    }


def _ours(spec: Mapping[str, Any]) -> Callable[[int], float]:
    """epoch(n): seconds of one more training epoch by the training loop, its reading included."""
    import torch

    from counterpoise.config import Experiment
    from counterpoise.data.loader import LocalData
    from counterpoise.engine.comm import SingleComm
    from counterpoise.engine.loop import RunOptions, Trainer
    from counterpoise.engine.memory import reuse_memory
    from counterpoise.engine.run import RunFolder

    torch.set_num_threads(spec["threads"])
    reuse_memory(spec["device"])
    if spec.get("unchecked"):
        _leave_pages_unchecked()
    experiment = Experiment(
        corpus=spec["corpus"],
        modalities={"audio": spec["encoder"], "visual": spec["encoder"]},
        method={"name": "aug", "assign": "fixed", "classifiers": {"visual": spec["classifiers"]}},
        batch_size=spec["batch_size"],
        epochs=10_000,
        compute=spec["compute"],
        data={"cache": spec["cache"], "decode_threads": spec["processes"], "augment": AUGMENT},
    )
    data = LocalData(experiment.corpus, batch_size=experiment.batch_size, options=experiment.data)
    folder = RunFolder.create(spec["runs"], spec["name"], experiment_text="", provenance={}, manifest={})
    options = RunOptions(device=spec["device"], checkpoint_every_s=1e9)
    trainer = Trainer(experiment, data, SingleComm(), folder, options)
    trainer._begin()

    def epoch(number: int) -> float:
        start = time.perf_counter()
        trainer._train_epoch()
        if spec.get("saving"):
            trainer._save()
        if spec["device"] != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        trainer.progress.epoch, trainer.progress.batch = number + 2, 0
        return seconds

    return epoch


def _leave_pages_unchecked() -> None:
    """In this process, Parquet files are read without comparing the checksums of their pages."""
    import pyarrow.parquet as pq

    opened = pq.ParquetFile

    def unchecked(*arguments: Any, page_checksum_verification: bool = False, **options: Any) -> Any:
        return opened(*arguments, **options)  # pyarrow's own default

    pq.ParquetFile = unchecked


def _released(spec: Mapping[str, Any]) -> Callable[[int], float]:
    """epoch(n): seconds of one of their epochs."""
    import torch
    from torch.nn.functional import one_hot

    from counterpoise.bench.released import ReleasedCremad, released_loader
    from counterpoise.bench.released_step import released_model, released_script, train_released

    torch.set_num_threads(spec["threads"])
    os.environ["OMP_NUM_THREADS"] = "1"  # of the loader's processes
    script = released_script(spec["place"], spec["device"])
    model, optimizer = released_model(script, len(EMOTIONS), spec["classifiers"])
    lines = [line.split(",") for line in (Path(spec["raw"]) / "train.csv").read_text().split()]
    clips, labels = [line[0] for line in lines], [EMOTIONS.index(line[1]) for line in lines]
    dataset = ReleasedCremad(spec["raw"], clips, labels, "Image-01-FPS", spec["resampler"])
    loader = released_loader(dataset, spec["batch_size"], spec["processes"])

    def batches() -> Iterator[tuple[Any, ...]]:
        for sound, picture, label in loader:
            yield sound.squeeze(1), picture.transpose(1, 2), one_hot(label, len(EMOTIONS)).float()

    return lambda _: train_released(script, batches(), model, optimizer, spec["device"])


def render(result: Mapping[str, Any]) -> str:
    how = ", ".join(f"{key} {value}" for key, value in result["compute"].items())
    lines = [
        machine_line(result["machine"]),
        f"{result['rows']} clips of CREMA-D's shape, {result['encoder']} twice{f' ({how})' if how else ''}, batch "
        f"{result['batch_size']}, {result['classifiers']} classifiers, {result['processes']} decoding processes or "
        f"threads, {result['threads']} threads of torch, cache {result['cache']}, {result['rounds']} rounds in turn on "
        f"{result['device']}"
        + (f"; the released loader resamples with {result['resampler']}" if result["resampler"] else ""),
        f"{'':25}  {'epoch':>9}  {'samples/s':>9}  ratio (quartiles)",
    ]
    for row in result["rows_measured"]:
        ratio = ""
        for key, words in (("times_faster", "times faster"), ("times_as_long", "times as long")):
            if key in row:
                ratio = f"{spread_text(row[key])} {words}"
        lines.append(f"{row['what']:25}  {row['median_s']:7.2f} s  {row['samples_per_s']:9.1f}  {ratio}".rstrip())
    return "\n".join(lines)
