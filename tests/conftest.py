"""A small corpus whose modalities differ in strength by construction, and runs on it that take a second."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import uuid
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from tests.cases import ALONE, CASES, SMALL_ENCODERS, STOPS, WIDTHS

from counterpoise.config import Experiment, resolve
from counterpoise.contracts import DataSource, Interrupted, Record
from counterpoise.data.shards import write_shards
from counterpoise.engine import checkpoint, loop
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import RunFolder

CLASSES = ("flute", "oboe", "horn", "harp")
SEPARATION = {"strong": 1.2, "weak": 0.35, "third": 0.7}  # distance of class centres in units of the noise
SECRET = "canary-9f31c0"  # of the object storage in tests; must never be written anywhere
RANKS_TIMEOUT_S = 900  # for all cases together, on a busy machine
ROWS = {"train": 240, "valid": 60, "test": 60}

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "two_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(RANKS_TIMEOUT_S + 60))


hypothesis.settings.register_profile("counterpoise", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("counterpoise")


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int = 2000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def make_rows(split: str, count: int, modalities: Sequence[str], media: bool = False) -> list[dict[str, Any]]:
    """Rows of a split: Gaussian vectors around class centres; with media, a tone and a patch that tell the class."""
    rng = np.random.default_rng([7, *split.encode()])
    centres = {m: np.random.default_rng([1, *m.encode()]).normal(size=(len(CLASSES), WIDTHS[m])) for m in modalities}
    rows = []
    for number in range(count):
        label = number % len(CLASSES)
        row: dict[str, Any] = {"key": f"{split}-{number:04d}", "label": label}
        for m in modalities:
            row[m] = (SEPARATION[m] * centres[m][label] + rng.normal(size=WIDTHS[m])).tolist()
        if media:
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[2 * label : 2 * label + 2] += 150
            row["image"] = png(pixels)
            row["sound"] = wav(0.4 * np.sin(np.arange(400) * (label + 1) / 3) + 0.01 * rng.standard_normal(400))
        rows.append(row)
    return rows


MEDIA_CARDS = {
    "image": {"kind": "image", "column": "image", "preprocess": {"size": [8, 8], "channels": 1}},
    "sound": {
        "kind": "audio",
        "column": "sound",
        "preprocess": {"sample_rate": 2000, "seconds": 0.2, "n_fft": 64, "hop_length": 32, "mel": 8},
    },
}


def write_corpus(
    folder: Path,
    *,
    modalities: Sequence[str] = ("strong", "weak"),
    media: bool = False,
    rows: Mapping[str, int] = ROWS,
    change: Callable[[str, list[dict[str, Any]]], None] | None = None,
    expected: Mapping[str, int] | None = None,
) -> str:
    """The path of a new corpus. change: gets every split and its rows before they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in rows.items():
        made = make_rows(split, count, modalities, media)
        if change is not None:
            change(split, made)
        write_shards(made, str(folder), split, num_shards=2, row_group_size=16)
        splits[split] = {"files": f"{split}-*.parquet", "expected": (expected or rows)[split]}
    kinds: dict[str, Any] = {
        m: {"kind": "vector", "column": m, "preprocess": {"standardize": True}} for m in modalities
    }
    card = {
        "name": "instruments",
        "classes": list(CLASSES),
        "sample_id": "key",
        "splits": splits,
        "modalities": kinds | (MEDIA_CARDS if media else {}),
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(card, sort_keys=False))
    return str(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two vector modalities, strong and weak."""
    return write_corpus(tmp_path_factory.mktemp("corpora") / "pair")


@pytest.fixture(scope="session")
def corpus_of_three(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "three", modalities=("strong", "weak", "third"))


@pytest.fixture(scope="session")
def corpus_with_media(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vector, small pictures and short sounds."""
    rows = {"train": 48, "valid": 16, "test": 16}
    return write_corpus(tmp_path_factory.mktemp("corpora") / "media", modalities=("strong",), media=True, rows=rows)


BASE: dict[str, Any] = {
    "method": "joint",
    "optim": {"lr": 0.05, "weight_decay": 1e-3},
    "batch_size": 32,
    "epochs": 3,
    "data": {"decode_threads": 1, "cache": "on"},
}


def settings(corpus: str, **changes: Any) -> dict[str, Any]:
    """An experiment on a synthetic corpus as a file would give it; sections are merged key by key."""
    card = yaml.safe_load((Path(corpus) / "corpus.yaml").read_text())
    vectors = {m: SMALL_ENCODERS[m] for m in card["modalities"] if m in SMALL_ENCODERS}
    content = {"corpus": corpus, **BASE}
    if len(vectors) == len(card["modalities"]):
        content["modalities"] = vectors
    for key, value in changes.items():
        old = content.get(key)
        content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return content


@dataclass
class Done:
    """A run after its end, whichever it was."""

    folder: RunFolder
    experiment: Experiment
    summary: dict[str, Any]

    def records(self, kind: str | None = None) -> list[Record]:
        return [r for r in self.folder.records() if kind in (None, r["kind"])]

    @property
    def last(self) -> checkpoint.Checkpoint:
        """The newest checkpoint: weights, optimizer, progress."""
        found = checkpoint.latest(self.folder.checkpoints)
        assert found is not None
        return found

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.last.tensors["model"]

    def losses(self) -> list[float]:
        return [r["train"]["loss"] for r in self.records("epoch")]


Run = Callable[..., Done]
_numbers = itertools.count()


def new_folder(root: Path, experiment: Experiment, provenance: Mapping[str, Any], name: str | None = None) -> RunFolder:
    text = yaml.safe_dump(experiment.to_json(), sort_keys=False)
    name = name or f"run-{next(_numbers)}"
    return RunFolder.create(str(root), name, experiment_text=text, provenance=provenance, manifest={"run": name})


@pytest.fixture(scope="session")
def run_experiment(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run_experiment(content, sets=(), folder=None, resume=False, stop=None, data=None, ...) -> Done, in process."""
    root = tmp_path_factory.mktemp("runs")

    def run(
        content: Mapping[str, Any],
        sets: Sequence[str] = (),
        *,
        folder: RunFolder | None = None,
        resume: bool = False,
        stop: Callable[[], str | None] | None = None,
        data: DataSource | None = None,
        name: str | None = None,
        checkpoint_every_s: float = 60.0,
    ) -> Done:
        experiment, provenance = resolve(content, sets)
        folder = folder or new_folder(root, experiment, provenance, name)
        job = Job(experiment.to_json(), folder.uri, resume, checkpoint_every_s, threads=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # a third of the time, and nobody pulls the plug here
            summary = execute(job, SingleComm(), stop=stop, data=data)
        assert summary is not None
        return Done(RunFolder.open(folder.uri), experiment, summary)

    return run


# --- object storage on loopback


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3://NAME of a new bucket, with credentials in the environment."""
    import fsspec

    from counterpoise import storage

    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"bucket-{uuid.uuid4().hex}"
    storage.filesystem("s3://x")[0].mkdir(name)
    yield f"s3://{name}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


# --- what is trained in several tests


@pytest.fixture(scope="session")
def experiments(corpus: str, corpus_of_three: str, corpus_with_media: str) -> dict[str, dict[str, Any]]:
    """Every case of `tests/cases.py` as an experiment."""
    places = {"pair": corpus, "three": corpus_of_three, "media": corpus_with_media}
    return {name: settings(places[place], **changes) for name, (place, changes) in CASES.items()}


@pytest.fixture(scope="session")
def finished(experiments: dict[str, dict[str, Any]], run_experiment: Run) -> Callable[[str], Done]:
    """finished(variant): its run from start to end by one worker, made once."""
    made: dict[str, Done] = {}

    def one(name: str) -> Done:
        if name not in made:
            made[name] = run_experiment(experiments[name], name=f"whole-{name}")
        return made[name]

    return one


@pytest.fixture(scope="session")
def ranks_place(
    request: pytest.FixtureRequest,
    experiments: dict[str, dict[str, Any]],
    run_experiment: Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Where two processes have trained every case that a test asks for. Of several workers of pytest one has it done,
    the others wait."""
    root = tmp_path_factory.getbasetemp()
    place = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "ranks"
    with FileLock(f"{place}.lock", timeout=RANKS_TIMEOUT_S):
        if not place.exists():
            asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
            work = place.with_name("ranks-unfinished")
            work.mkdir()
            train_in_two(work, {n: e for n, e in experiments.items() if n in asked}, experiments["aug"], run_experiment)
            work.rename(place)
    return place


def train_in_two(
    place: Path, experiments: Mapping[str, dict[str, Any]], handed: dict[str, Any], run_experiment: Run
) -> None:
    """Two processes: collectives, batch normalisation, every case, some of them interrupted; `handed` is taken over
    from one worker, and left to one worker."""
    jobs = {}
    for name, content in experiments.items():
        if name in ALONE:
            continue
        experiment, provenance = resolve(content)
        for label, stops in ((name, []), *([(f"{name}, interrupted", STOPS[name])] if name in STOPS else [])):
            folder = new_folder(place / "runs", experiment, provenance)
            jobs[label] = {"experiment": experiment.to_json(), "run": folder.uri, "stop_after": stops}
    experiment, provenance = resolve(handed)
    base = {"experiment": experiment.to_json(), "stop_after": []}
    for label, more in (("taken over", {"resume": True}), ("handed over", {"stop_after": [11], "unfinished": True})):
        folder = new_folder(place / "runs", experiment, provenance, label.replace(" ", "-"))
        jobs[label] = base | more | {"run": folder.uri}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "CONTROL_INTERVAL_S", 0.0)
        calls = itertools.count()
        folder = RunFolder.open(jobs["taken over"]["run"])
        run_experiment(handed, folder=folder, stop=lambda: "test" * (next(calls) == 11))
    (place / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    package = Path(__file__).resolve().parents[1] / "platform"
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = [sys.executable, str(Path(__file__).with_name("engine") / "ranks.py")]
    processes = [
        subprocess.Popen(
            [*program, str(place / "jobs.json"), str(place)],
            env={**common, "RANK": str(rank), "PYTHONPATH": str(package)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=RANKS_TIMEOUT_S)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


@pytest.fixture(scope="session")
def two_ranks(ranks_place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes saw."""
    first, second = (torch.load(ranks_place / f"rank-{rank}.pt", weights_only=False) for rank in range(2))
    return first, second


@pytest.fixture(scope="session")
def handed_over(ranks_place: Path) -> dict[str, RunFolder]:
    """Folders of runs that two workers took over from one, and left to one."""
    return {
        label: RunFolder.open(str(ranks_place / "runs" / label.replace(" ", "-")))
        for label in ("taken over", "handed over")
    }
