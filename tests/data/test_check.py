import copy
import json

import pytest

from counterpoise.contracts import DataError
from counterpoise.data.check import check_corpus
from counterpoise.data.shards import read_manifest, write_manifest, write_shards

from .conftest import write_corpus


def test_a_good_corpus_passes(tiny):
    seen = []
    report = check_corpus(tiny, lambda *step: seen.append(step))
    assert report.ok and report.errors == [] and report.warnings == []
    assert report.splits["train"].classes == {"red": 34, "green": 34, "blue": 33}
    assert report.inputs["audio"] == [1, 12, 17]
    assert seen[-1] == (152, 152, "test")
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert "  train: 101 rows in 2 files, 33 to 34 per class, 0 undecodable" in report.lines()


def test_everything_wrong_is_listed(tmp_path, rows):
    bad = copy.deepcopy(rows)
    bad["train"][0]["audio"] = b""
    bad["train"][1]["key"] = "train002"
    bad["valid"] = [copy.deepcopy(rows["train"][i]) for i in (10, 11)] + rows["valid"][2:]
    bad["test"] = [r for r in bad["test"] if r["label"] != 2]
    bad["test"][0]["image"] = bad["test"][1]["image"] = rows["train"][20]["image"]
    bad["test"][2]["frames"] = []
    report = check_corpus(write_corpus(tmp_path, bad))
    text = "\n".join(report.lines())
    assert not report.ok and text.startswith("corpus tiny: not ok")
    assert "cannot decode train000 in" in text and "audio: empty" in text
    assert "warning: split train: 1 of 101 rows cannot be decoded" in text
    assert "error: split test: 1 of 21 rows cannot be decoded" in text
    assert "error: split train: 1 sample ids occur more than once: train002" in text
    assert "error: train and valid share samples whose every modality is equal: 2 rows of valid" in text
    assert "warning: train and valid share 2 sample ids: train010, train011" in text
    assert "warning: train and test share 1 equal image cells (2 rows of test)" in text
    assert "warning: split test: no sample of blue" in text


def test_checksums_are_compared(tmp_path, rows):
    card = write_corpus(tmp_path, {s: rows[s] for s in ("valid", "test")})
    shards = {"train": write_shards(rows["train"], str(tmp_path), "train", num_shards=2)}
    write_manifest(str(tmp_path), shards, name="tiny")
    assert check_corpus(card).ok
    write_shards(rows["train"], str(tmp_path), "train", num_shards=2, row_group_size=5)
    assert sum("SHA-256" in e for e in check_corpus(card).errors) == 2


def test_a_corpus_that_does_not_open_gives_one_error(tmp_path, rows):
    card = write_corpus(tmp_path, rows)
    (tmp_path / "test-00000-of-00002.parquet").write_bytes(b"")
    report = check_corpus(card)
    assert len(report.errors) == 1 and "test-00000-of-00002.parquet" in report.lines()[1]


def test_shards_are_written_whole_and_alike(tmp_path, rows):
    one = write_shards(rows["valid"], str(tmp_path / "a"), "valid", num_shards=3)
    two = write_shards(rows["valid"], str(tmp_path / "b"), "valid", num_shards=3)
    assert one == two
    assert [s.file for s in one] == [f"valid-0000{i}-of-00003.parquet" for i in range(3)]
    assert sum(s.rows for s in one) == 20
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [s.file for s in one]
    with pytest.raises(DataError, match="num_shards is 21"):
        write_shards(rows["valid"], str(tmp_path), "valid", num_shards=21)
    with pytest.raises(DataError, match="column 'x': no plain Parquet type for dict"):
        write_shards([{"x": {}}], str(tmp_path), "valid")


def test_a_damaged_manifest_is_named(tmp_path):
    assert read_manifest(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json: not readable as JSON"):
        read_manifest(str(tmp_path))
