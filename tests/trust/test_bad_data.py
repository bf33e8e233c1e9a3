"""Corpora with damaged rows and odd structure: everything is found and named before, and counted while, it is used."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tests.conftest import Done, png, settings, wav, write_corpus
from tests.trust.faults import chance, keep

from counterpoise.contracts import ConfigError, CounterpoiseError, DataError
from counterpoise.data import check
from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus, record_sums
from counterpoise.data.index import fingerprint, open_splits
from counterpoise.reports.records import read_run

TRAIN = 1000
ROWS = {"train": TRAIN, "valid": 500, "test": 500}
PREPROCESS = {"image": {"size": [16, 16], "channels": 1}}


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pictures(split: str, rows: list[dict[str, Any]]) -> None:
    """Larger pictures than those of other tests, as JPEG: a scene of coarse cells that is another one in every row."""
    rng = np.random.default_rng([3, *split.encode()])
    for row in rows:
        cells = rng.integers(0, 255, (8, 8), dtype=np.uint8)
        row["image"] = jpeg(np.kron(cells, np.ones((4, 4), np.uint8)))


def large(folder: Path, change: Callable[[str, list[dict[str, Any]]], None] = lambda split, rows: None) -> Path:
    """2000 rows of a vector, a JPEG and a WAV, with checksums."""

    def both(split: str, rows: list[dict[str, Any]]) -> None:
        pictures(split, rows)
        change(split, rows)

    place = Path(write_corpus(folder, modalities=("strong",), media=True, rows=ROWS, change=both))
    card = yaml.safe_load((place / "corpus.yaml").read_text())
    card["modalities"]["image"]["preprocess"] = {"size": [16, 16], "channels": 1}
    (place / "corpus.yaml").write_text(yaml.safe_dump(card))
    record_sums(load_card(str(place)))
    return place


def cut(data: bytes) -> bytes:
    return data[: len(data) * 6 // 10]


def header_only(data: bytes) -> bytes:
    return data[:44]


# What is done to a cell, of which modality, and what is said of it.
SPOILT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "JPEG cut": ("image", cut, "not decodable"),
    "WAV cut": ("sound", cut, "cut short"),
    "WAV header": ("sound", header_only, "cut short"),
    "empty": ("image", lambda data: b"", "empty"),
    "another kind": ("image", lambda data: wav(np.zeros(100)), "not PNG or JPEG"),
    "a text for sound": ("sound", lambda data: b"version https://git-lfs.github.com/spec/v1", "git-LFS pointer"),
    "NaN": ("strong", lambda values: [float("nan"), *values[1:]], "NaN or infinite"),
    "infinite": ("strong", lambda values: [*values[:-1], float("inf")], "NaN or infinite"),
    "absurd length": ("strong", lambda values: [*values] * 1000, "numbers instead of"),
    "missing": ("sound", lambda data: None, "missing"),
}
EACH = 2  # rows of every kind: 2 % of train together


@pytest.fixture(scope="module")
def spoilt() -> dict[str, str]:
    """{sample: how it is spoilt}, chosen by the seed."""
    chosen = chance("7").sample(range(TRAIN), EACH * len(SPOILT))
    return {f"train-{row:04d}": kind for row, kind in zip(chosen, list(SPOILT) * EACH, strict=True)}


@pytest.fixture(scope="module")
def damaged(spoilt: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    def change(split: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if kind := spoilt.get(row["key"]):
                column, spoil, _ = SPOILT[kind]
                row[column] = spoil(row[column])

    return large(tmp_path_factory.mktemp("bad") / "damaged", change)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large(tmp_path_factory.mktemp("bad") / "clean")


def test_two_thousand_clean_samples_have_nothing_wrong(clean: Path) -> None:
    report = check_corpus(load_card(str(clean)), deep=True)
    assert report.ok and report.undecodable == [] and report.warnings == []
    assert sum(split.rows for split in report.splits.values()) == 2000


def test_a_check_finds_every_damaged_row_and_no_other(damaged: Path, spoilt: dict[str, str]) -> None:
    report = check_corpus(load_card(str(damaged)))
    found = {bad["sample_id"]: bad for bad in report.undecodable}
    for sample, kind in spoilt.items():
        seen = (
            sample in found
            and found[sample]["modality"] == SPOILT[kind][0]
            and SPOILT[kind][2] in found[sample]["reason"]
        )
        keep("7 bad rows", kind, {"sample": sample}, seen)
        assert seen, (kind, found.get(sample))
    assert found.keys() == spoilt.keys(), "recall of all that is bad, and nothing else"
    assert not report.ok and f"{len(spoilt)} of {TRAIN} rows cannot be decoded" in report.errors[0]


def test_a_byte_that_decodes_all_the_same_is_found_by_checksums_alone(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG with a flipped byte is a picture for every decoder. It is changed where no page checksum sees it: the
    shard is written again, as a faulty program would."""
    shutil.copytree(clean, tmp_path / "c")
    shard = next((tmp_path / "c").glob("train-00000*"))
    rows = pq.read_table(shard).to_pylist()
    number = chance("7 byte").randrange(len(rows))
    data = bytearray(rows[number]["image"])
    at = data.index(b"\xff\xda") + 40
    data[at] ^= 0x10
    rows[number]["image"] = bytes(data)
    schema = pq.read_schema(shard)
    from counterpoise.data.shards import parquet_bytes

    shard.write_bytes(parquet_bytes(rows, schema, 16))
    report = check_corpus(load_card(str(tmp_path / "c")))
    where = {"file": shard.name, "row": number, "byte": at}
    keep("7 bad rows", "flipped byte", where, not report.ok)
    assert [e for e in report.errors if "its SHA-256 is not the one that is recorded" in e]
    monkeypatch.setattr(check, "_check_sums", lambda *_: None)
    unseen = check_corpus(load_card(str(tmp_path / "c"))).ok
    keep("7 bad rows", "control: no checksums", where, not unseen, control=True)
    assert unseen, "the control: without checksums nobody notices"


def test_training_goes_on_within_the_budget_and_counts_what_it_left_out(
    damaged: Path, spoilt: dict[str, str], run_experiment: Callable[..., Done]
) -> None:
    content = settings(str(damaged), epochs=1, batch_size=100, modalities={})
    done = run_experiment(content, ["data.bad_samples=0.05"])
    assert {row["sample_id"] for row in done.folder.ledger()} == set(spoilt)
    assert {row["modality"] for row in done.folder.ledger()} == {"image", "sound", "strong"}
    (event,) = [e for e in done.records("event") if e["event"] == "skipped_rows"]
    assert event["count"] == len(spoilt)
    assert len(read_run(done.folder.uri).skipped) == len(spoilt), "what a report of the run is made from"
    with pytest.raises(DataError, match=r"rows cannot be decoded, 5 of 1000 are tolerated") as caught:
        run_experiment(content, ["data.bad_samples=0.005"])
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (99, "label is 99; the card has 4 classes"),
        (-1, "label is -1"),
        ("flute?", "label is 'flute?'"),
        (0.5, "is 0.5"),
    ],
)
def test_a_wrong_label_is_named_before_training(label: Any, said: str, tmp_path: Path) -> None:
    def change(split: str, rows: list[dict[str, Any]]) -> None:
        if split == "train":
            for row in rows:
                row["label"] = type(label)(row["label"])
            rows[7]["label"] = label

    with pytest.raises((DataError, ConfigError)) as caught:
        open_splits(load_card(write_corpus(tmp_path / "c", change=change)))
    shown = said if not isinstance(label, str) else "train-0000: label is '0'"
    assert shown in str(caught.value) and caught.value.exit_code == 3


# --- structure


def lines(place: str | Path, deep: bool = False) -> str:
    return "\n".join(check_corpus(load_card(f"{place}/"), deep=deep).lines())


def test_splits_that_are_empty_or_of_one_class_are_said(tmp_path: Path) -> None:
    one = write_corpus(
        tmp_path / "one", change=lambda split, rows: [row.update(label=2) for row in rows if split != "test"] and None
    )
    text = lines(one)
    assert "warning: split train: no sample of flute, oboe, harp" in text
    table = pq.read_table(Path(one) / "valid-00000-of-00002.parquet")
    for file in Path(one).glob("valid*"):
        pq.write_table(table.slice(0, 0), file)
    assert "error: corpus instruments, split valid: 0 rows found, the card says 60" in lines(one)
    card = yaml.safe_load((Path(one) / "corpus.yaml").read_text())
    del card["splits"]["valid"]["expected"]
    (Path(one) / "corpus.yaml").write_text(yaml.safe_dump(card))
    assert "error: corpus instruments, split valid: no rows" in lines(one)


def test_ids_that_come_twice_are_errors(tmp_path: Path) -> None:
    def change(split: str, rows: list[dict[str, Any]]) -> None:
        rows[5]["key"] = rows[3]["key"]

    text = lines(write_corpus(tmp_path / "c", change=change))
    assert text.count("1 sample ids occur more than once") == 3


def test_a_sample_of_train_in_test_is_found_also_after_re_encoding(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []

    def change(split: str, rows: list[dict[str, Any]]) -> None:
        pictures(split, rows)
        if split == "train":
            kept.extend(rows)
        elif split == "test":
            for number in (1, 4):  # another file of the same picture, and of the same sound a little louder
                pixels = np.asarray(Image.open(io.BytesIO(kept[number]["image"])))
                rows[number]["image"] = jpeg(pixels, 60) if number == 1 else png(pixels)
                rows[number]["strong"] = kept[number]["strong"]
                rows[number]["sound"] = kept[number]["sound"]

    place = write_corpus(tmp_path / "c", modalities=("strong",), media=True, change=change,
                         rows={"train": 80, "valid": 40, "test": 40})  # fmt: skip
    card = yaml.safe_load((Path(place) / "corpus.yaml").read_text())
    card["modalities"]["image"]["preprocess"] = PREPROCESS["image"]
    (Path(place) / "corpus.yaml").write_text(yaml.safe_dump(card))
    text = lines(place, deep=True)
    said = "train and test: 2 rows of test look and sound like rows of train: train-0001 and test-0001, train-0004 and"
    keep("9 structure", "re-encoded", {"rows": [1, 4]}, said in text)
    assert f"error: {said} test-0004" in text
    plain = lines(place)
    keep("9 structure", "control: bytes alone", {"rows": [1, 4]}, "look and sound" in plain, control=True)
    assert "look and sound" not in plain and "whose every modality is equal" not in plain


def test_the_order_of_a_listing_other_files_and_empty_groups_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = load_card(write_corpus(tmp_path / "c"))
    before = open_splits(card)
    known = fingerprint(card, before)
    (tmp_path / "c" / "_SUCCESS").write_bytes(b"")
    (tmp_path / "c" / "train-notes.txt").write_text("x")
    file = tmp_path / "c" / "train-00001-of-00002.parquet"
    table = pq.read_table(file)
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table.slice(0, 50))
        writer.write_table(table.slice(0, 0))
        writer.write_table(table.slice(50))
    import fsspec.implementations.local as local

    listed = local.LocalFileSystem.glob
    monkeypatch.setattr(local.LocalFileSystem, "glob", lambda *a, **k: sorted(listed(*a, **k), reverse=True))
    after = open_splits(card)
    assert fingerprint(card, after) == known
    assert after["train"].sample_ids == before["train"].sample_ids
    from counterpoise.data.loader import LocalData

    found = [row for batch in LocalData(card, batch_size=32).batches("train") for row in batch["row"].tolist()]
    assert found == list(range(240)), "a row group without rows is passed over"


def test_a_split_of_files_with_other_columns_is_named(tmp_path: Path) -> None:
    place = Path(write_corpus(tmp_path / "c"))
    file = place / "test-00001-of-00002.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["weak"]), file)
    assert "test-00001-of-00002.parquet has no column 'weak'" in lines(place)
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, "label", pa.array(["flute?"] * len(table))), file)
    assert "label is 'flute?', did you mean 'flute'" in lines(place)


@pytest.mark.parametrize("name", ["ä-名前-🎺", "x" * 5000, "a b\tc\nd", "../../etc/passwd", "<b>&amp;", "%s{0}"])
def test_ids_may_be_any_text(name: str, tmp_path: Path, run_experiment: Callable[..., Done]) -> None:
    """They are data: kept as they are, never taken for a path or a format."""

    def change(split: str, rows: list[dict[str, Any]]) -> None:
        rows[0]["key"] = f"{name} {split}"

    place = write_corpus(tmp_path / "c", rows={"train": 16, "valid": 8, "test": 8}, change=change)
    assert check_corpus(load_card(f"{place}/")).ok
    done = run_experiment(settings(place, epochs=1, batch_size=8))
    assert f"{name} test" in done.folder.read_predictions()["sample_id"].tolist()


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 300, "a\nb"])
def test_a_corpus_of_such_a_name_leaves_its_folder_nowhere(name: str, tmp_path: Path, corpus: str) -> None:
    content = yaml.safe_load((Path(corpus) / "corpus.yaml").read_text()) | {"name": name}
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(content))
    try:
        card = load_card(str(tmp_path / "corpus.yaml"))
    except CounterpoiseError:
        return
    from counterpoise.engine.run import check_name, safe_name

    check_name(f"{safe_name(card.name)}-joint-0")
    assert "/" not in safe_name(card.name)
