"""From encoded data to ready batches: our shards against the released code's loader on raw files, in turns.

Every side is a process of its own that stays, with torch at one thread: an epoch of one, then of the next. Ratios are
formed within a round. A rate per core is samples per second of CPU that a side's processes used: it says what a core
yields, however many there are and whoever else uses them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from counterpoise.bench.machine import Side, Spread, machine, machine_line, spread_text, watched
from counterpoise.bench.media import few_rows_card, make_raw, prepare_cremad
from counterpoise.bench.released import chosen_resampler
from counterpoise.contracts import ResourceError

BATCH = 32
AUGMENT = {"visual": [{"name": "resized_crop", "scale": [0.08, 1.0], "ratio": [0.75, 1.3333]}, "flip"]}
BASE = "released loader, PNG frames"
_FEW = 48  # rows that ResNet-18 is trained on: a row takes a second on a core
# Only of the server that is started here: it accepts any.
_S3 = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

Say = Callable[[str], None]


def ingest_rates(
    *, rows: int, processes: int, rounds: int, out: str, s3: bool, resampler: str, waiting: bool, say: Say
) -> dict[str, Any]:
    """Both sides' rates, memory and ratios, and the share of training that waits for data. out: holds the corpus."""
    from counterpoise.telemetry.progress import progress

    resampler = chosen_resampler(resampler)
    facts = machine()
    folder = Path(out).absolute()
    with progress("writing a raw download") as callback:
        raw = make_raw(folder / f"raw-{rows}", rows, callback)
    with progress("preparing its shards") as callback:
        corpus = prepare_cremad(raw, folder / f"shards-{rows}", processes, callback)
    result: dict[str, Any] = {
        "machine": facts,
        "rows": rows,
        "processes": processes,
        "rounds": rounds,
        "batch_size": BATCH,
        "resampler": resampler,
        "rows_measured": [],
        "shapes": {},
        "s3": "measured" if s3 else "not measured (--s3 starts a moto server on loopback)",
        "waiting": [],
    }
    with contextlib.ExitStack() as open_sides:
        sides = []
        for name, make, spec in _variants(corpus, raw, processes, resampler, s3, open_sides):
            say(f"starting: {name}")
            sides.append(Side(name, make, spec))
            open_sides.callback(sides[-1].close)
        measured = _in_turns(sides, rounds, say)
    result["shapes"] = _same_shapes(measured)
    result["rows_measured"] = summary(measured)
    if waiting:
        result["waiting"] = [
            waiting_share(encoder, card, epochs, say)
            for encoder, card, epochs in (("cnn", corpus, 2), ("resnet18", few_rows_card(corpus, rows, _FEW), 1))
        ]
    return result


def _variants(
    corpus: str, raw: Path, processes: int, resampler: str, s3: bool, opened: contextlib.ExitStack
) -> Iterator[tuple[str, Callable[[Any], Callable[[Any], Any]], dict[str, Any]]]:
    released = {"raw": str(raw), "processes": processes, "resampler": resampler}
    yield BASE, _released_side, {**released, "frames": "Image-01-FPS"}
    yield "released loader, JPEG frames", _released_side, {**released, "frames": "Image-01-FPS-jpg"}
    yield "shards, local disk", _shards_side, {"corpus": corpus, "cache": "off", "processes": processes}
    yield "shards, cached", _shards_side, {"corpus": corpus, "cache": "on", "processes": processes}
    if s3:
        server = Side("S3 server", _s3_server, None)
        opened.callback(server.close)
        spec = {"corpus": corpus, "cache": "off", "processes": processes, "endpoint": server.facts}
        yield "shards, S3 on loopback", _shards_side, spec


def _in_turns(sides: Sequence[Side], rounds: int, say: Say) -> dict[str, list[dict[str, Any]]]:
    """One epoch of every side unmeasured, then `rounds` of each; who begins changes from round to round."""
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            cpu = side.tree.cpu_s()
            with watched(side.tree) as peak:
                answer = side.ask(number + 1)
            answer["cpu_s"] = side.tree.cpu_s() - cpu
            answer["peak_bytes"] = peak[0]
            if number:
                found[side.name].append(answer)
        say("warmed up" if number == 0 else f"round {number} of {rounds} done")
    return found


def _same_shapes(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[int]]:
    """The shapes of a sample's tensors, which all sides must agree on."""
    shapes = {name: answers[0]["shapes"] for name, answers in measured.items()}
    first = next(iter(shapes.values()))
    for name, found in shapes.items():
        assert found == first, f"{name} gives {found}, others {first}: they do not do the same work"
    return dict(first)


def summary(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A line per side: medians and spreads over rounds; ratios to the released loader, formed within each round."""
    base = measured[BASE]
    lines = []
    for name, answers in measured.items():
        wall = [a["samples"] / a["seconds"] for a in answers]
        core = [a["samples"] / a["cpu_s"] for a in answers]
        ratio = [c / (b["samples"] / b["cpu_s"]) for c, b in zip(core, base, strict=True)]
        wall_ratio = [w / (b["samples"] / b["seconds"]) for w, b in zip(wall, base, strict=True)]
        lines.append(
            {
                "what": name,
                "samples_per_s": Spread.of(wall).to_json(),
                "samples_per_s_per_core": Spread.of(core).to_json(),
                "bytes_per_s_per_core": Spread.of(
                    [rate * a["bytes"] / a["samples"] for rate, a in zip(core, answers, strict=True)]
                ).to_json(),
                "stored_bytes_per_sample": answers[0]["stored_bytes"] / answers[0]["samples"],
                "peak_memory_bytes": max(a["peak_bytes"] for a in answers),
                "ratio_per_core": Spread.of(ratio).to_json(),
                "ratio_wall": Spread.of(wall_ratio).to_json(),
            }
        )
    return lines


# What runs in the processes of the sides


def _epoch(batches: Iterator[Mapping[str, Any]], stored_bytes: int) -> dict[str, Any]:
    """Take every batch: seconds, samples, bytes of their tensors, and the shape of one sample."""
    start = time.perf_counter()
    samples = num_bytes = 0
    shapes: dict[str, list[int]] = {}
    for batch in batches:
        for name in ("audio", "visual"):
            num_bytes += batch[name].nbytes
            shapes[name] = list(batch[name].shape[1:])
        samples += len(batch["audio"])
    return {
        "seconds": time.perf_counter() - start,
        "samples": samples,
        "bytes": num_bytes,
        "shapes": shapes,
        "stored_bytes": stored_bytes,
    }


def _shards_side(spec: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    """The data source that training uses."""
    import torch

    from counterpoise import storage
    from counterpoise.data.loader import LocalData
    from counterpoise.data.options import DataOptions

    torch.set_num_threads(1)
    corpus = spec["corpus"]
    stored = sum(path.stat().st_size for path in Path(corpus).glob("train-*.parquet"))
    if endpoint := spec.get("endpoint"):
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(_S3, AWS_ENDPOINT_URL_S3=endpoint)
        storage.filesystem("s3://bench")[0].mkdir("bench")
        for path in sorted(Path(corpus).iterdir()):
            if path.suffix in (".parquet", ".yaml"):
                storage.write_bytes(f"s3://bench/cremad/{path.name}", path.read_bytes())
        corpus = "s3://bench/cremad"
    options = DataOptions.model_validate(
        {"cache": spec["cache"], "decode_threads": spec["processes"], "augment": AUGMENT}
    )
    data = LocalData(corpus, batch_size=BATCH, options=options)
    return lambda epoch: _epoch(data.train_batches(epoch), 0 if spec["cache"] == "on" else stored)


def _released_side(spec: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    import torch

    from counterpoise.bench.media import EMOTIONS
    from counterpoise.bench.released import ReleasedCremad, released_loader

    torch.set_num_threads(1)
    lines = (Path(spec["raw"]) / "train.csv").read_text().split()
    clips = [line.split(",")[0] for line in lines]
    labels = [EMOTIONS.index(line.split(",")[1]) for line in lines]
    dataset = ReleasedCremad(spec["raw"], clips, labels, spec["frames"], spec["resampler"])
    stored = sum(path.stat().st_size for item in range(len(dataset)) for path in dataset.files(item))
    loader = released_loader(dataset, BATCH, spec["processes"])
    return lambda epoch: _epoch(({"audio": sound, "visual": picture} for sound, picture, _ in loader), stored)


def has_moto() -> bool:
    """Whether the S3 server for measurements is installed."""
    import importlib.util

    return importlib.util.find_spec("moto") is not None and importlib.util.find_spec("flask") is not None


def _s3_server(_: None) -> Callable[[Any], Any]:
    """moto's S3 server in a process of its own, on loopback; its endpoint is the side's `facts`."""
    if not has_moto():
        raise ResourceError(
            "--s3: moto is not installed; run with `uv run --with 'moto[server]' counterpoise bench ...`"
        )
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()

    class Answer:
        facts = "http://{}:{}".format(*server.get_host_and_port())

        def __call__(self, request: Any) -> None:
            return None

    return Answer()


# Waiting for data


def waiting_share(encoder: str, card: str, epochs: int, say: Say) -> dict[str, Any]:
    """The share of training time that worker 0 of two spends waiting for its next batch, streaming, one thread each.

    Timed by the training loop itself: `data_wait_s` over `seconds` of the epoch records. Both workers have equal
    shares of every batch; the other's wait would show as a wait for gradients, not here.
    """
    import tempfile

    from counterpoise.config import resolve
    from counterpoise.engine.local import run_local
    from counterpoise.start import Settings, make_job, new_run, preview

    say(f"training {encoder} on both modalities with two workers")
    content = {
        "corpus": card,
        "modalities": {"audio": encoder, "visual": encoder},
        "method": "joint",
        "batch_size": 16,
        "epochs": epochs,
        "select": "last",
        "data": {"cache": "off", "decode_threads": 1, "augment": AUGMENT},
    }
    experiment, provenance = resolve(content)
    settings = Settings(workers=2, device="cpu", threads=1)
    with tempfile.TemporaryDirectory(prefix="counterpoise-bench-") as runs:
        seen = preview(experiment, settings)
        folder = new_run(seen, provenance, runs, encoder)
        run_local([make_job(seen, folder)], 2)
        records = [record for record in folder.records() if record["kind"] == "epoch"]
    waited, seconds = (sum(r[key] for r in records) for key in ("data_wait_s", "seconds"))
    return {
        "encoder": encoder,
        "samples": sum(r["train"]["samples"] for r in records),
        "seconds": seconds,
        "waited_s": waited,
        "share": waited / seconds,
    }


# What people read


def render(result: Mapping[str, Any]) -> str:
    lines = [
        machine_line(result["machine"]),
        f"{result['rows']} clips of CREMA-D's shape, batches of {result['batch_size']}, {result['processes']} decoding "
        f"processes or threads, {result['rounds']} rounds in turn; the released loader resamples with "
        f"{result['resampler']}",
        "tensors of a sample: " + ", ".join(f"{n} {' x '.join(map(str, s))}" for n, s in result["shapes"].items()),
        "",
        f"{'':29}  {'samples/s':>9}  {'per core':>9}  {'MiB/s/core':>10}  {'memory':>9}  ratio per core (quartiles)",
    ]
    for row in result["rows_measured"]:
        lines.append(
            f"{row['what']:29}  {row['samples_per_s']['median']:9.1f}  {row['samples_per_s_per_core']['median']:9.1f}  "
            f"{row['bytes_per_s_per_core']['median'] / 2**20:10.1f}  {row['peak_memory_bytes'] / 2**20:5.0f} MiB  "
            f"{spread_text(row['ratio_per_core'])}"
        )
    lines.append("per core: for each second of CPU time used; MiB of tensors; memory of all processes of a side")
    if result["s3"] != "measured":
        lines.append(f"S3: {result['s3']}")
    for row in result["waiting"]:
        lines.append(
            f"training {row['encoder']} on both modalities, two workers, streaming: {row['share']:.1%} of the time "
            f"waits for data ({row['samples']} samples in {row['seconds']:.1f} s)"
        )
    return "\n".join(lines)
