"""Files that were made to run code, to leave their folder or to fill the memory: refused with a reason, nothing run.

Every case is opened by the product's own function, in a process of its own that may write nothing but its answer. The
payloads make a folder; the folder must never be there. Peak memory over that of the imports, and time, are measured.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tests.conftest import Done, settings, write_corpus
from tests.reports.make_run import make_run
from tests.trust.faults import forked, keep

from counterpoise.cli import main
from counterpoise.config import parse_set, read_yaml, resolve
from counterpoise.contracts import CounterpoiseError, RefusedError
from counterpoise.data import media, raw
from counterpoise.data.card import ImageModality, load_card
from counterpoise.data.decode import DecodeError, decode_cell
from counterpoise.data.index import open_splits
from counterpoise.engine import checkpoint
from counterpoise.engine.export import export_run
from counterpoise.engine.inference import load_model, sums_text
from counterpoise.models.pretrained import read_weights
from counterpoise.reports.html import render
from counterpoise.reports.paper import csv_form, grouped, latex_form, paper_table
from counterpoise.reports.records import read_run
from counterpoise.reports.spec import parse_spec
from counterpoise.reports.tables import csv_table, markdown_table
from counterpoise.sweepfile import read_sweep

MEMORY = 512 * 2**20
SECONDS = 5.0
WORK = Path("/nonexistent")  # of this module's fixture


class Payload:
    """What a pickle does when it is loaded: it makes the folder `canary`."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


Case = Callable[[Path, str], Callable[[], Any]]  # (folder of its own, canary) -> what opens it
CASES: dict[str, Case] = {}


def case(*names: str) -> Callable[[Callable[..., Callable[[], Any]]], Callable[..., Callable[[], Any]]]:
    """A function that makes files and gives what opens them; several names: it is called with each as its third."""

    def put(make: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
        for name in names:
            CASES[name] = (lambda f, c, n=name: make(f, c, n)) if len(names) > 1 else make
        return make

    return put


# --- weights


@case("pickle.pt", "pickle.pth", "pickle.bin", "pickle.safetensors", "legacy.pt", "archive.pt")
def pickled_weights(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    place = folder / name
    if name == "legacy.pt":
        torch.save({"w": Payload(canary)}, place, _use_new_zipfile_serialization=False)
    elif name == "archive.pt":
        torch.save({"w": torch.ones(3), "x": Payload(canary)}, place)
    else:
        place.write_bytes(pickle.dumps({"w": Payload(canary)}))
    return lambda: read_weights(str(place))


@case("convert a pickle")
def converted(folder: Path, canary: str) -> Callable[[], Any]:
    from counterpoise.convert import convert

    torch.save({"w": torch.ones(3), "x": Payload(canary)}, folder / "a.pt")
    return lambda: convert(str(folder / "a.pt"), str(folder / "a.safetensors"))


@case("inflating.pt")
def inflating(folder: Path, canary: str) -> Callable[[], Any]:
    """A state_dict whose storage is a gigabyte of zeros in a megabyte of archive."""
    torch.save({"w": torch.zeros(4)}, folder / "small.pt")
    with zipfile.ZipFile(folder / "small.pt") as small, zipfile.ZipFile(folder / "a.pt", "w") as large:
        for name in small.namelist():
            data = small.read(name)
            if name.endswith("/data/0"):
                data = bytes(2**28)
            large.writestr(name, data, zipfile.ZIP_DEFLATED)
    return lambda: read_weights(str(folder / "a.pt"))


@case("repeated.pt")
def repeated(folder: Path, canary: str) -> Callable[[], Any]:
    """Four bytes that are described as forty gigabytes."""
    torch.save({"w": torch.zeros(1).expand(100_000, 100_000)}, folder / "a.pt")
    return lambda: read_weights(str(folder / "a.pt"))


@case("lying header", "huge header", "overlapping tensors", "beyond the end", "deep header")
def safetensors(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    one: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header: Any = {"w": one}
    data = bytes(8)
    if name == "lying header":
        header = {"w": {**one, "shape": [10**9, 10**9]}}
    elif name == "overlapping tensors":
        header = {"w": one, "v": one}
    elif name == "beyond the end":
        header = {"w": {**one, "data_offsets": [0, 2**40]}}
    text = b"[" * 100_000 if name == "deep header" else json.dumps(header).encode()
    size = 2**60 if name == "huge header" else len(text)
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", size) + text + data)
    return lambda: read_weights(str(folder / "a.safetensors"))


@case("checkpoint with a pickle", "checkpoint with DCP metadata", "checkpoint outside its folder")
def checkpoints(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    """As whoever can write checksums too would have it."""
    place = folder / "step-00000001"
    place.mkdir()
    evil = pickle.dumps(Payload(canary))
    files = {"state.json": b"{}"}
    if name == "checkpoint outside its folder":
        (folder / "secret").write_bytes(b"{}")
        files = {"../secret": b"{}"}
    elif name == "checkpoint with DCP metadata":
        files |= {".metadata": evil, "__0_0.distcp": evil}
    else:
        files |= {"model.safetensors": evil}
    for file, data in files.items():
        (place / file).write_bytes(data)
    import hashlib

    manifest = "".join(f"{hashlib.sha256(d).hexdigest()}  {f}\n" for f, d in sorted(files.items())).encode()
    (place / "MANIFEST.sha256").write_bytes(manifest)
    (place / "COMMITTED").write_bytes(checkpoint._marker(manifest, {f: len(d) for f, d in files.items()}))
    return lambda: checkpoint.load(str(place))


@case("model with a pickle", "model out of its folder", "model with a class path", "model nested deeply")
def models(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    import hashlib

    good = WORK / "exported"
    files = {f.name: f.read_bytes() for f in good.iterdir() if f.is_file() and f.name != "SHA256SUMS"}
    if name == "model with a pickle":
        files["model.safetensors"] = pickle.dumps(Payload(canary))
    elif name == "model out of its folder":
        files["../../etc/passwd"] = b""
    elif name == "model nested deeply":
        files["config.json"] = b'{"a":' * 50_000
    else:
        content = json.loads(files["config.json"])
        content["experiment"]["method"] = {"_target_": "os.mkdir", "path": canary, "name": "os.mkdir"}
        files["config.json"] = json.dumps(content).encode()
    (folder / "m").mkdir()
    for file, data in files.items():
        if "/" not in file:
            (folder / "m" / file).write_bytes(data)
    (folder / "m" / "SHA256SUMS").write_text(sums_text({f: hashlib.sha256(d).hexdigest() for f, d in files.items()}))
    return lambda: load_model(str(folder / "m"))


# --- settings


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


TEXTS = {
    "python tag": "corpus: !!python/object/apply:os.mkdir [{canary}]\nmethod: joint\n",
    "python module": "corpus: !!python/name:os.mkdir\nmethod: joint\n",
    "new object": "corpus: !!python/object/new:os.mkdir [{canary}]\nmethod: joint\n",
    "alias bomb": bomb(),
    "deep flow": "a: " + "[" * 100_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(600)),
    "a megabyte of keys": "".join(f"k{i}: 1\n" for i in range(90_000)),
    "class path": "corpus: x\nmethod: {{_target_: os.mkdir, path: {canary}}}\n",
    "encoder by import": "corpus: x\nmethod: joint\nmodalities: {{audio: os.mkdir}}\n",
    "class_path": "corpus: x\nmethod: {{name: joint, class_path: os.mkdir, init_args: [{canary}]}}\n",
}


@case(*(f"experiment: {name}" for name in TEXTS))
def experiments(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    text = TEXTS[name.removeprefix("experiment: ")]
    (folder / "e.yaml").write_text(text.format(canary=canary) if "{canary}" in text or "{{" in text else text)
    return lambda: resolve(read_yaml(folder / "e.yaml"))


@case("card: python tag", "card: alias bomb", "card: deep flow", "card: a megabyte of keys")
def cards(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    (folder / "corpus.yaml").write_text(TEXTS[name.removeprefix("card: ")].replace("{canary}", canary))
    return lambda: load_card(str(folder / "corpus.yaml"))


@case("sweep: alias bomb", "sweep: python tag")
def sweeps(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    (folder / "s.yaml").write_text(TEXTS[name.removeprefix("sweep: ")].replace("{canary}", canary))
    return lambda: read_sweep(read_yaml(folder / "s.yaml"), "s.yaml")


@case("--set: python tag")
def set_value(folder: Path, canary: str) -> Callable[[], Any]:
    return lambda: parse_set(f"epochs=!!python/object/apply:os.mkdir [{canary}]")


@case("run folder: alias bomb", "run folder: deep JSON")
def run_folders(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    """Somebody else's run in a report: it is shown without its settings, or its damaged file is named."""
    place = make_run(folder, epochs=2)
    if name == "run folder: alias bomb":
        (place / "experiment.yaml").write_text(bomb())
    else:
        (place / "run.json").write_bytes(b'{"a":' * 100_000)

    def opened() -> None:
        run = read_run(str(place))
        if run.settings == {}:
            raise RefusedError("its settings are no plain YAML")

    return opened


# --- corpora


def corpus_with(folder: Path, change: Callable[[Any], Any]) -> Callable[[], Any]:
    place = write_corpus(folder / "c", rows={"train": 16, "valid": 8, "test": 8})
    for file in Path(place).glob("valid*.parquet"):
        change(file)
    return lambda: open_splits(load_card(f"{place}/"))


@case("extension type", "ray tensor type", "pickled extension type")
def extension(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    known = {
        "extension type": b"vendor.thing",
        "ray tensor type": b"ray.data.arrow_tensor_v2",
        "pickled extension type": b"arrow.py_extension_type",
    }

    def change(file: Path) -> None:
        table = pq.read_table(file)
        facts = {b"ARROW:extension:name": known[name], b"ARROW:extension:metadata": pickle.dumps(Payload(canary))}
        field = pa.field("extra", pa.binary(), metadata=facts)
        extra = pa.array([b"x"] * len(table), pa.binary())
        pq.write_table(table.append_column(field, extra), file)

    return corpus_with(folder, change)


@case("footer of two gigabytes")
def long_footer(folder: Path, canary: str) -> Callable[[], Any]:
    return corpus_with(folder, lambda file: file.write_bytes(b"PAR1" + bytes(64) + struct.pack("<I", 2**31) + b"PAR1"))


@case("page of a gigabyte")
def large_page(folder: Path, canary: str) -> Callable[[], Any]:
    """Light columns are bounded by what the card says of rows: here a column of text that is huge when inflated."""

    def change(file: Path) -> None:
        table = pq.read_table(file)
        index = table.schema.get_field_index("key")
        keys = pa.array(["k" * 2**24] * len(table))
        pq.write_table(table.set_column(index, "key", keys), file, compression="zstd", use_dictionary=True)

    return corpus_with(folder, change)


@case("shards elsewhere by name")
def named_outside(folder: Path, canary: str) -> Callable[[], Any]:
    content = yaml.safe_load((WORK / "corpus" / "corpus.yaml").read_text())
    content["name"] = "../../evil"
    (folder / "corpus.yaml").write_text(yaml.safe_dump(content))
    return lambda: load_card(str(folder / "corpus.yaml"))


IMAGE = ImageModality(kind="image", column="x", preprocess={"size": [8, 8]})  # type: ignore[arg-type]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int) -> bytes:
    rows = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    body = b"".join(rows.compress(line) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def text_bomb() -> bytes:
    """A PNG with a hundred megabytes of compressed text before its pixels."""
    small = png_bomb(8)
    at = small.index(b"IDAT") - 4
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 * 2**20), 9))
    return small[:at] + text + small[at:]


def flac(rate: int, samples: int, channels: int = 8) -> bytes:
    """A header that promises, and nothing behind it."""
    packed = (rate << 44) | ((channels - 1) << 41) | (15 << 36) | samples
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    return b"fLaC" + b"\x80" + len(info).to_bytes(3, "big") + info


def wave(rate: int, channels: int, samples: int) -> bytes:
    head = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, (channels * 2) & 0xFFFF, 16)
    data = bytes(channels * 2 * samples)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + (struct.pack("<I", len(data)) + data)
    )


CELLS: dict[str, Callable[[], tuple[str, Any]]] = {
    "PNG of 400 million pixels": lambda: ("image", png_bomb(20_000)),
    "JPEG of 4 billion pixels": lambda: ("image", jpeg_bomb()),
    "PNG with a text bomb": lambda: ("image", text_bomb()),
    "a pickle for a picture": lambda: ("image", pickle.dumps(Payload("/nonexistent/x"))),
    "SVG for a picture": lambda: ("image", b"<svg onload='x'/>"),
    "FLAC of a day": lambda: ("sound", flac(44_100, 86_400 * 44_100)),
    "FLAC of 8 channels at 655350 Hz": lambda: ("sound", flac(655_350, 590 * 655_350)),
    "WAV at 2 GHz": lambda: ("sound", wave(2**31 - 1, 1, 4000)),
    "WAV at 3 Hz": lambda: ("sound", wave(3, 1, 1500)),
    "a million frames": lambda: ("frames", [b"\xff\xd8\xff"] * 1_000_000),
}


@case(*CELLS)
def cells(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    from counterpoise.data.card import AudioModality, FramesModality

    kind, value = CELLS[name]()
    if "pickle" in name:
        value = pickle.dumps(Payload(canary))
    modality: Any = {
        "image": IMAGE,
        "sound": AudioModality(kind="audio", column="x"),
        "frames": FramesModality(kind="frames", column="x", preprocess={"size": [8, 8], "num_frames": 2}),  # type: ignore[arg-type]
    }[kind]

    def opened() -> None:
        try:
            decode_cell(value, modality)
        except DecodeError as error:
            raise RefusedError(str(error)) from None

    return opened


# --- downloads


@case(*(f"path {p!r}" for p in ("../x", "/etc/passwd", "a/../../x", "a\0b", "C:x", "http://host/x")))
def paths(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    import ast

    path = ast.literal_eval(name.removeprefix("path "))
    return reading(folder, raw.Pictures((path,)))


@case("video that is a playlist", "video of ten hours", "zip for a video", "tar for a picture")
def downloads(folder: Path, canary: str, name: str) -> Callable[[], Any]:
    import tarfile

    if name == "video that is a playlist":
        (folder / "a.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    elif name == "zip for a video":
        with zipfile.ZipFile(folder / "a.mp4", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../x", bytes(2**26))
    elif name == "tar for a picture":
        with tarfile.open(folder / "a.png", "w") as archive:
            link = tarfile.TarInfo("../x")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        return reading(folder, raw.Pictures(("a.png",)))
    else:
        import av

        with av.open(str(folder / "a.mp4"), "w") as made:
            stream: Any = made.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 16
            for i in range(2):
                frame = av.VideoFrame(16, 16, "yuv420p")
                frame.pts = i * 25 * 36_000  # the second frame comes after ten hours
                for packet in stream.encode(frame):
                    made.mux(packet)
            for packet in stream.encode():
                made.mux(packet)
    return reading(folder, raw.Video("a.mp4", per_second=1.0, least=3))


def reading(folder: Path, wanted: raw.Media) -> Callable[[], Any]:
    def opened() -> None:
        try:
            media.read_row(str(folder), {"x": wanted})
        except media.MediaError as error:
            raise RefusedError(f"{error.reason}: {error.detail}") from None

    return opened


# --- all of them


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory, run_experiment: Callable[..., Done]) -> Path:
    global WORK
    WORK = tmp_path_factory.mktemp("hostile")
    corpus = write_corpus(WORK / "corpus", rows={"train": 32, "valid": 8, "test": 8})
    run = run_experiment(settings(corpus, epochs=1, batch_size=16))
    export_run(run.folder.uri, str(WORK / "exported"))
    return WORK


def outcome(opens: Callable[[], Any]) -> dict[str, Any]:
    """What came of opening a file here: how it was refused, seconds, bytes of memory beyond what was there."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    began = time.process_time()
    refused, said = False, ""
    try:
        opens()
    except CounterpoiseError as error:
        refused, said = True, str(error)
    return {
        "refused": refused,
        "said": said,
        "seconds": time.process_time() - began,
        "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "child": 1024 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - children),
    }


def attempt(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    canary = folder / "canary"
    (own := folder / "files").mkdir(parents=True)
    opens = CASES[name](own, str(canary))
    ended = forked([lambda: outcome(opens)], folder / "process", limit_s=60)
    assert ended.codes == [0], f"{name}: {ended.said[0]}"
    return ended.values[0], canary


def test_there_are_more_than_forty_cases() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_and_nothing_is_run(name: str, tmp_path: Path) -> None:
    found, canary = attempt(name, tmp_path)
    where = {"case": name, "seconds": found["seconds"], "bytes": found["bytes"]}
    fine = found["refused"] and not canary.exists() and found["bytes"] <= MEMORY and found["seconds"] <= SECONDS
    keep("20 hostile files", name, where, fine)
    assert not canary.exists(), "it has run code"
    assert found["refused"] and found["said"] and "Traceback" not in found["said"]
    assert found["bytes"] <= MEMORY and found["seconds"] <= SECONDS, found
    assert not (tmp_path / "x").exists() and not (tmp_path.parent / "x").exists()


def test_the_payload_runs_where_nobody_looks(tmp_path: Path) -> None:
    """The control: what Python does with it by itself."""
    canary = tmp_path / "canary"
    torch.save({"x": Payload(str(canary))}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    keep("20 hostile files", "control: weights_only=False", {"case": "pickle"}, not canary.exists(), control=True)
    assert canary.exists()


def test_a_foreign_file_becomes_safetensors_by_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "canary-0123456789")
    weights = {"w": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(3)}
    weights["tied"] = weights["b"]
    torch.save({"model": weights, "optimizer": {"state": {}, "lr": 0.1}, "epoch": 3}, tmp_path / "a.pt")
    source, out = str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")
    assert ended(["convert", source, out, "--key", "modle"]) == 3
    said = "has no 'modle'; it has mappings under model, optimizer: counterpoise convert --key takes one out"
    assert said in capsys.readouterr().err
    assert ended(["convert", source, out, "--key", "model"]) == 0
    said = capsys.readouterr()
    assert "3 tensors, 12 numbers" in said.err and said.out.strip() == out
    found = read_weights(out)
    assert found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in weights)
    assert ended(["convert", source, out, "--key", "model"]) == 6  # nothing is overwritten
    assert ended(["convert", source, str(tmp_path / "c.pt")]) == 2


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


# --- what is written for others

NAMES = {
    "markup": "<script>alert(1)</script>",
    "image": '<img src=x onerror="alert(1)">',
    "TeX": "\\input{/etc/passwd}",
    "TeX write": "\\write18{mkdir x}\n\\input{x}",
    "formula": '=cmd|" /C calc"!A0',
    "plus": "+1+cmd",
    "at": "@SUM(1)",
    "Markdown": "[x](javascript:alert(1)) | `x`",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names_in_what_is_written(name: str, tmp_path: Path) -> None:
    evil = NAMES[name]
    folders = [make_run(tmp_path, "joint", seed=seed, epochs=2, name=f"r{seed}", corpus=evil) for seed in (0, 1)]
    for folder in folders:
        for file in ("run.json", "summary.json"):
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(content | {"run": evil, "name": evil}))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"corpus": evil, "method": evil}))
    runs = [read_run(str(folder)) for folder in folders]
    page = render(runs, title=evil)
    assert "<script" not in page and "<img src=x" not in page and "javascript:" not in href(page)
    paper = paper_table(grouped(runs), parse_spec({}))
    latex = latex_form(paper)
    assert "\\input" not in latex.replace("\\textbackslash{}input", "") and "\\write" not in latex
    assert all(line.count("\\\\ %") <= 1 for line in latex.splitlines())
    for text in (csv_form(paper), csv_table(runs)):
        import csv

        for row in csv.reader(io.StringIO(text)):
            assert not [c for c in row if c[:1] in ("=", "+", "@", "\t", "\r") or (c[:1] == "-" and not number(c))]
    assert "](javascript:" not in markdown_table(runs).replace("\\[x](", "")
    keep("20 hostile files", f"name: {name}", {"case": name}, True)


def href(page: str) -> str:
    return " ".join(part.split('"')[0] for part in page.split('href="')[1:])


def number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == "-"
    return True
