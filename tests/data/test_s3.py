import pytest
import torch
import yaml

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.data.recipes import prepare
from counterpoise.data.shards import write_shards

from .conftest import CARD

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]  # servers and clients warn of their own


def test_a_corpus_in_object_storage_is_the_same_as_on_disk(bucket, tiny, rows):
    for split, part in rows.items():
        write_shards(part, f"{bucket}/tiny", split, num_shards=2, row_group_size=8)
    storage.write_bytes(f"{bucket}/tiny/corpus.yaml", yaml.safe_dump(CARD, sort_keys=False).encode())
    storage.write_bytes(f"{bucket}/tiny/train-_SUCCESS", b"")
    card = load_card(f"{bucket}/tiny")
    assert card.folder == f"{bucket}/tiny"
    there = LocalData(card, batch_size=8, options=DataOptions(cache="off", shuffle_window=24))
    here = LocalData(tiny, batch_size=8, options=DataOptions(cache="off", shuffle_window=24))
    assert there.fingerprint == here.fingerprint
    for one, two in zip(there.train_batches(1), here.train_batches(1), strict=True):
        assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(f.startswith(f"{bucket}/tiny/train-") for f in there.indexes["train"].files)
    assert check_corpus(card).ok

    shard = there.indexes["test"].files[0]
    storage.write_bytes(shard, storage.read_bytes(shard)[:3000])
    with pytest.raises(DataError, match=rf"{bucket}/tiny/test-00000-of-00002.parquet: not a whole Parquet file"):
        LocalData(card, batch_size=8)


def test_a_recipe_can_be_prepared_in_object_storage(bucket):
    out = f"{bucket}/digits"
    assert prepare("av_digits", out, train=20, valid=10, test=10) == out
    assert storage.list_names(out)[:2] == ["corpus.yaml", "manifest.json"]
    assert check_corpus(load_card(out)).ok
    said = []
    prepare("av_digits", out, progress=lambda *step: said.append(step[2]), train=20, valid=10, test=10)
    assert said == [f"already prepared in {out}"]
