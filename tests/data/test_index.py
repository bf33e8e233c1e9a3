import copy
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counterpoise.contracts import DataError
from counterpoise.data.card import Carve
from counterpoise.data.index import carved, fingerprint, open_split, open_splits
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions

from .conftest import CARD, write_corpus


def card_with(**changes):
    card = copy.deepcopy(CARD)
    for key, value in changes.items():
        card[key] = value
    return card


def with_carves(**carves):
    splits = {"train": {"files": "train-*.parquet"}}
    return card_with(splits=splits | {s: {"carve": {"from": "train", **c}} for s, c in carves.items()})


def ids(card, split):
    return set(open_split(card, split).sample_ids)


def test_rows_are_found_where_the_index_says(tiny, rows):
    index = open_split(tiny, "train")
    assert index.sample_ids == [r["key"] for r in rows["train"]]
    assert index.labels.tolist() == [r["label"] for r in rows["train"]]
    for row in (0, 7, 8, 55, 100):
        file, group, position = index.place(row)
        assert pq.ParquetFile(index.files[file]).read_row_group(group)["key"][position].as_py() == index.sample_ids[row]


def test_files_that_are_not_shards_are_ignored(tmp_path, rows):
    card = write_corpus(tmp_path, rows, card=card_with(splits={"train": {"files": "train-*"}}))
    (tmp_path / "train-_SUCCESS").write_bytes(b"")
    assert len(open_split(card, "train")) == 101


def test_ids_come_from_files_and_rows_if_there_is_no_column(tmp_path, rows):
    card = write_corpus(tmp_path, rows, card=card_with(sample_id=None))
    found = open_split(card, "test").sample_ids
    assert found[0] == "test-00000-of-00002/0" and len(set(found)) == 31


def test_labels_may_be_names(tmp_path, rows):
    named = {s: [{**r, "label": CARD["classes"][r["label"]]} for r in part] for s, part in rows.items()}
    card = write_corpus(tmp_path, named)
    assert open_split(card, "test").labels.tolist() == [r["label"] for r in rows["test"]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("gren", "label is 'gren', did you mean 'green'?; classes of the card: red, green, blue"),
        (3, "sample test002: label is 3; the card has 3 classes, so labels lie in 0..2"),
        (-1, "label is -1"),
        (float("nan"), "label is nan; labels are whole numbers"),
        (None, "label is None"),
        (True, "label is True"),
    ],
)
def test_wrong_labels_are_named(tmp_path, rows, label, message):
    bad = copy.deepcopy(rows)
    for i, row in enumerate(bad["test"]):
        good = {str: "red", float: 0.0, bool: label}.get(type(label), 0)
        row["label"] = label if i == 2 else good
    card = write_corpus(tmp_path, bad)
    with pytest.raises(DataError) as error:
        open_splits(card)
    assert message in str(error.value)
    assert "corpus tiny, split test" in str(error.value)


def test_a_wrong_count_is_an_error(tmp_path, rows):
    splits = {**CARD["splits"], "test": {"files": "test-*.parquet", "expected": 32}}
    card = write_corpus(tmp_path, rows, card=card_with(splits=splits))
    with pytest.raises(DataError, match="corpus tiny, split test: 31 rows found, the card says 32; rebuild it"):
        open_splits(card)


def test_a_missing_column_is_named(tmp_path, rows):
    card = copy.deepcopy(CARD)
    card["modalities"]["audio"]["column"] = "audoi"
    with pytest.raises(DataError, match="has no column 'audoi', did you mean 'audio'"):
        open_splits(write_corpus(tmp_path, rows, card=card))


def test_missing_files_are_named(tmp_path, rows):
    splits = {"train": {"files": "nothing-*.parquet"}}
    with pytest.raises(DataError, match=r"split train: no .parquet file matches .*nothing-"):
        open_splits(write_corpus(tmp_path, rows, card=card_with(splits=splits)))
    splits = {"train": {"files": ["train-00000-of-00002.parquet", "gone.parquet"]}}
    with pytest.raises(DataError, match=r"gone.parquet does not exist"):
        open_splits(write_corpus(tmp_path, rows, card=card_with(splits=splits)))


@pytest.mark.parametrize("keep", [0, 3, 100, 5000])
def test_a_truncated_shard_is_named(tmp_path, rows, keep):
    card = write_corpus(tmp_path, rows)
    shard = tmp_path / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: .*make it again"):
        open_splits(card)


def test_a_flipped_bit_is_found_when_the_row_group_is_read(tmp_path, rows):
    card = write_corpus(tmp_path, rows)
    shard = tmp_path / "train-00001-of-00002.parquet"
    meta = pq.read_metadata(shard).row_group(2)
    (column,) = (meta.column(i) for i in range(meta.num_columns) if meta.column(i).path_in_schema == "image")
    data = bytearray(shard.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    shard.write_bytes(bytes(data))
    loader = LocalData(card, ["image"], batch_size=8, options=DataOptions(cache="off"))
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: row group 2 is damaged"):
        list(loader.train_batches(1))


def test_extension_types_are_refused(tmp_path, rows):
    card = write_corpus(tmp_path, rows)
    table = pq.read_table(tmp_path / "valid-00000-of-00002.parquet")
    for extension in (pa.uuid(), pa.opaque(pa.binary(16), "thing", "vendor")):
        column = pa.ExtensionArray.from_storage(extension, pa.array([bytes(16)] * len(table), extension.storage_type))
        pq.write_table(table.append_column("extra", column), tmp_path / "valid-00000-of-00002.parquet")
        with pytest.raises(DataError, match="has Arrow extension types"):
            open_splits(card)


def test_splits_may_be_a_column(tmp_path, rows):
    part = [{**r, "fold": i % 5} for i, r in enumerate(rows["train"])]
    splits = {
        "train": {"files": "all-*.parquet", "where": {"fold": [0, 1, 2]}},
        "valid": {"files": "all-*.parquet", "where": {"fold": 3}},
        "test": {"files": "all-*.parquet", "where": {"fold": 4}},
    }
    card = write_corpus(tmp_path, {"all": part}, card=card_with(splits=splits))
    assert {s: len(i) for s, i in open_splits(card).items()} == {"train": 61, "valid": 20, "test": 20}
    assert ids(card, "valid") == {r["key"] for i, r in enumerate(part) if i % 5 == 3}
    splits["test"]["where"] = {"fold": 9}
    card = write_corpus(tmp_path, {"all": part}, card=card_with(splits=splits))
    with pytest.raises(DataError, match="no row has fold = 9; values there: 0, 1, 2, 3, 4"):
        open_splits(card)


def test_a_stratified_carve_takes_the_fraction_of_every_class(tmp_path, rows):
    card = write_corpus(tmp_path, rows, card=with_carves(valid={"fraction": 0.2}, test={"fraction": 0.1}))
    found = open_splits(card)
    assert np.bincount(found["valid"].labels).tolist() == [7, 7, 7]
    assert np.bincount(found["test"].labels).tolist() == [3, 3, 3]
    assert sum(map(len, found.values())) == 101
    assert not ids(card, "valid") & ids(card, "test")


def test_a_grouped_carve_keeps_groups_whole(tmp_path, rows):
    card = write_corpus(tmp_path, rows, card=with_carves(valid={"fraction": 0.3, "group": "speaker"}))
    speaker = {r["key"]: r["speaker"] for r in rows["train"]}
    train, valid = ({speaker[i] for i in ids(card, s)} for s in ("train", "valid"))
    assert valid and not train & valid
    assert 20 <= len(ids(card, "valid")) <= 40


@pytest.mark.parametrize("carve", [{}, {"group": "speaker"}, {"stratify": False, "fraction": 0.37}])
def test_a_carve_does_not_depend_on_the_layout(tmp_path, rows, carve):
    one = write_corpus(tmp_path / "one", rows, card=with_carves(valid=carve))
    turned = {"train": rows["train"][50:] + rows["train"][:50]}
    two = write_corpus(tmp_path / "two", turned, card=with_carves(valid=carve), num_shards=5, row_group_size=3)
    assert ids(one, "valid") == ids(two, "valid")
    other = write_corpus(tmp_path / "three", rows, card=with_carves(valid={**carve, "seed": 1}))
    assert ids(one, "valid") != ids(other, "valid")


def test_equal_ids_are_never_torn_apart():
    names = [f"id{i // 2}" for i in range(40)]
    mask = carved(Carve(fraction=0.3), "valid", names, np.zeros(40, int), names)
    assert mask.sum() == 12 and (mask[::2] == mask[1::2]).all()


def test_the_fingerprint_is_of_the_content_not_of_the_layout(tmp_path, tiny, rows):
    same = write_corpus(tmp_path / "same", rows, num_shards=7, row_group_size=2)
    first = fingerprint(tiny, open_splits(tiny))
    assert fingerprint(same, open_splits(same)) == first
    assert fingerprint(tiny, open_splits(tiny), ["audio"]) != first

    changed = copy.deepcopy(rows)
    changed["test"][3]["label"] = 2 - changed["test"][3]["label"]
    other = write_corpus(tmp_path / "label", changed)
    assert fingerprint(other, open_splits(other)) != first

    louder = copy.deepcopy(CARD)
    louder["modalities"]["audio"]["preprocess"]["mean"] = 1.0
    other = write_corpus(tmp_path / "card", rows, card=louder)
    assert fingerprint(other, open_splits(other)) != first


def test_batches_do_not_depend_on_where_the_corpus_is(tmp_path, tiny):
    shutil.copytree(tiny.folder, tmp_path / "copy")
    one = LocalData(tiny, ["vector"], batch_size=8)
    two = LocalData(str(tmp_path / "copy"), ["vector"], batch_size=8)
    assert one.fingerprint == two.fingerprint
    for a, b in zip(one.train_batches(1), two.train_batches(1), strict=True):
        assert (a["row"] == b["row"]).all() and (a["vector"] == b["vector"]).all()
