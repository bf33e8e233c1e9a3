"""One flipped bit, anywhere in a run, a corpus, an exported model or predictions, is found before it is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Done, settings, write_corpus
from tests.trust.faults import chance, count, keep

from counterpoise.cli import main
from counterpoise.contracts import ConfigError, DataError, RefusedError
from counterpoise.data import check, index
from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus, record_sums
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.engine import checkpoint
from counterpoise.engine.bulk import predict_files
from counterpoise.engine.export import export_run
from counterpoise.engine.inference import load_model
from counterpoise.engine.run import RunFolder
from counterpoise.integrity import verify_places

FLIPS = count(20, 200)
ROWS = {"train": 48, "valid": 16, "test": 16}
# What nobody relies on later: where a run stands now, a hint for people, what a restart of `predict` looks at.
WITHOUT = {"status.json", "LATEST", "request.json", "ledger.jsonl", "trackers.json"}


def flips(whole: Path, copy: Path, test: str, pattern: str = "*", number: int = FLIPS) -> Iterator[dict[str, Any]]:
    """Copies of a folder, each with one flipped bit in one of its files: file, byte and bit."""
    draw = chance(test)
    files = sorted(f for f in whole.rglob(pattern) if f.is_file() and f.stat().st_size)
    files = [f for f in files if f.name not in WITHOUT and f.parent.name != "parts"]
    shutil.copytree(whole, copy, dirs_exist_ok=True)
    for _ in range(number):
        file = draw.choice(files)
        data = bytearray(file.read_bytes())
        byte, bit = draw.randrange(len(data)), draw.randrange(8)
        data[byte] ^= 1 << bit
        target = copy / file.relative_to(whole)
        target.write_bytes(bytes(data))
        yield {"file": str(file.relative_to(whole)), "byte": byte, "bit": bit}
        shutil.copyfile(file, target)


def all_found(places: Iterator[dict[str, Any]], test: str, found: Callable[[], bool]) -> None:
    """Whether a look finds every flip, each written down."""
    missed = []
    for where in places:
        seen = found()
        keep(test, "bit", where, seen)
        if not seen:
            missed.append(where)
    assert missed == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, sounds and a vector, with checksums."""
    place = write_corpus(tmp_path_factory.mktemp("rot") / "corpus", modalities=("strong",), media=True, rows=ROWS)
    assert record_sums(load_card(place)) == 6
    return Path(place)


@pytest.fixture(scope="module")
def run(corpus: Path, run_experiment: Callable[..., Done]) -> Path:
    content = settings(str(corpus), epochs=2, batch_size=16, method={"name": "joint", "head": "sum"}, modalities={})
    return Path(run_experiment(content).folder.uri)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rot") / "model"
    export_run(str(run), str(out))
    return out


def test_verify_finds_every_flipped_bit_of_a_run(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    places = flips(run, copy, "a run")
    all_found(places, "8 run", lambda: bool(next(verify_places([str(copy)])).problems))
    assert next(verify_places([str(copy)])).problems == [], "and nothing where nothing is wrong"


def test_a_checkpoint_with_a_flipped_bit_is_never_loaded(run: Path, tmp_path: Path) -> None:
    """The one before is, and whoever asks is told."""
    copy = tmp_path / "checkpoints"
    newest = checkpoint.committed(str(run / "checkpoints"))[-1]

    def passed_over() -> bool:
        said: list[str] = []
        found = checkpoint.latest(str(copy), lambda name, reason: said.append(name))
        return found is not None and found.name != newest and said == [newest]

    shutil.copytree(run / "checkpoints", copy)
    places = flips(run / "checkpoints" / newest, copy / newest, "a checkpoint")
    all_found(places, "8 checkpoint", passed_over)


def test_a_model_with_a_flipped_bit_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"

    def refused() -> bool:
        try:
            load_model(str(copy))
        except RefusedError:
            return bool(next(verify_places([str(copy)])).problems)
        return False

    all_found(flips(exported, copy, "a model"), "8 export", refused)


def test_predictions_with_a_flipped_bit_are_found(exported: Path, corpus: Path, run: Path, tmp_path: Path) -> None:
    made, copy = tmp_path / "made", tmp_path / "copy"
    predict_files(str(exported), f"{corpus}/", str(made))
    all_found(flips(made, copy, "files"), "8 predictions", lambda: bool(next(verify_places([str(copy)])).problems))

    folder = RunFolder(str(tmp_path / "run"))

    def refused() -> bool:
        try:
            folder.read_predictions()
        except RefusedError:
            return True
        return False

    places = flips(run, tmp_path / "run", "a run's predictions", "predictions.parquet")
    all_found(places, "8 predictions", refused)


def test_a_deep_check_finds_every_flipped_bit_of_shards(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    places = flips(corpus, copy, "shards", "*.parquet")
    all_found(places, "8 shards", lambda: not check_corpus(load_card(str(copy)), deep=True).ok)
    assert check_corpus(load_card(str(copy)), deep=True).ok


def batches(place: Path) -> list[dict[str, Any]]:
    data = LocalData(str(place), batch_size=16, options=DataOptions(cache="off", decode_threads=1))
    try:
        ids = [{"ids": list(data.sample_ids(split))} for split in ROWS]
        return [*ids, *data.train_batches(1), *data.batches("valid"), *data.batches("test")]
    finally:
        data.close()


def same(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


def read_silently(corpus: Path, copy: Path, whole: list[dict[str, Any]], test: str) -> list[dict[str, Any]]:
    """Flips after which a corpus is read without a word, and is not what it was."""
    wrong = []
    for where in flips(corpus, copy, test, "*.parquet"):
        try:
            found = batches(copy)
        except (DataError, ConfigError):
            continue
        if not same(found, whole):
            wrong.append(where)
    return wrong


def test_training_never_reads_other_numbers_because_of_a_flipped_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody has checked the corpus: the checksums of pages are looked at while it is read."""
    whole = batches(corpus)
    assert read_silently(corpus, tmp_path / "copy", whole, "training") == []
    import pyarrow.parquet as pq

    opened = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, page_checksum_verification, **k: opened(*a, **k))
    silent = read_silently(corpus, tmp_path / "control", whole, "training")
    keep("8 shards", "control: no checksums of pages", silent[0] if silent else None, not silent, control=True)
    assert silent, "the control: without them, wrong numbers are trained on"


def test_a_name_of_a_column_that_is_no_text_is_damage(corpus: Path, tmp_path: Path) -> None:
    """It comes as an error of Python, not of Arrow, when a file is opened."""
    whole = next(corpus.glob("test-*.parquet")).read_bytes()
    copy = tmp_path / "shard.parquet"
    at = whole.find(b"label", len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"))
    found = 0
    while at >= 0:
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
        try:
            index.open_parquet(str(copy)).close()
        except DataError as error:
            found += "not a readable Parquet file" in str(error)
        at = whole.find(b"label", at + 1)
    assert found, "in the schema, or in the path of a column"


def test_without_checksums_flips_pass(run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: a check that compares none, a checkpoint that is not verified."""
    monkeypatch.setattr(check, "_check_sums", lambda *_: None)
    copy = tmp_path / "corpus"
    passed = [w for w in flips(corpus, copy, "shards", "*.parquet") if check_corpus(load_card(str(copy))).ok]
    assert passed, "a bit of a column that nothing decodes, or of a footer"
    newest = checkpoint.committed(str(run / "checkpoints"))[-1]

    def unverified(uri: str) -> Iterator[tuple[str, bytes]]:
        for file in Path(uri).glob("*.safetensors"):
            yield file.name, file.read_bytes()

    monkeypatch.setattr(checkpoint, "_verified", unverified)
    place, name = tmp_path / "checkpoint" / newest, "model.safetensors"
    (place).mkdir(parents=True)
    data = bytearray((run / "checkpoints" / newest / name).read_bytes())
    data[-3] ^= 1
    (place / name).write_bytes(bytes(data))
    assert checkpoint.load(str(place)).tensors["model"], "safetensors alone notices nothing"
    keep("8 checkpoint", "control: safetensors alone", {"file": name, "bit": 0}, False, control=True)


def test_the_commands_say_what_is_damaged(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "runs" / "a")
    main_code(["runs", "verify", str(tmp_path / "runs")], 0)
    assert "as written" in capsys.readouterr().out
    place = tmp_path / "runs" / "a" / "predictions.parquet"
    place.write_bytes(place.read_bytes()[:-1] + b"2")
    main_code(["runs", "verify", str(tmp_path / "runs")], 6)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{tmp_path}/runs/a: DAMAGED", "    predictions.parquet: differs from SHA256SUMS"]
    assert "1 of 1 damaged" in said.err
    main_code(["runs", "verify", str(tmp_path / "none")], 3)
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "manifest.json").unlink()
    main_code(["corpora", "check", f"{tmp_path}/corpus/", "--deep"], 0)
    assert "6 of 6 files have no recorded checksum" in capsys.readouterr().out
    main_code(["corpora", "check", f"{tmp_path}/corpus/", "--record"], 0)
    assert "checksums of 6 files" in capsys.readouterr().err
    main_code(["corpora", "check", f"{tmp_path}/corpus/", "--record"], 6)  # what is recorded stays
    shard = tmp_path / "corpus" / "test-00000-of-00002.parquet"
    shard.write_bytes(b"PAR2" + shard.read_bytes()[4:])
    capsys.readouterr()
    main_code(["corpora", "check", f"{tmp_path}/corpus/"], 3)
    assert "its SHA-256 is not the one that is recorded" in capsys.readouterr().out


def main_code(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert (caught.value.code or 0) == code
