import contextlib
import copy
import dataclasses
import math
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data import plan, units
from counterpoise.data.loader import Background, LocalData, bad_budget
from counterpoise.data.options import DataOptions

from .conftest import CARD, image_bytes, write_corpus

AUGMENT = {"image": ["flip", {"name": "shift", "pixels": 1}], "audio": ["mask", "noise"], "vector": ["dropout"]}


def loader(card, modalities=None, *, batch_size=8, seed=0, rank=0, world=1, state=None, **options):
    return LocalData(
        card,
        modalities,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        state=state,
        options=DataOptions.model_validate({"shuffle_window": 24, **options}),
    )


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, rows):
    """The tiny corpus with eight rows of train and one of test that cannot be decoded."""
    bad = copy.deepcopy(rows)
    for i in (3, 4, 5, 40):
        bad["train"][i]["audio"] = bad["train"][i]["audio"][:200]
    for i in (60, 61):
        bad["train"][i]["image"] = bad["train"][i]["image"][:-30]
    bad["train"][80]["vector"] = [1.0]
    bad["train"][81]["text"] = ""
    bad["test"][0]["image"] = b""
    return write_corpus(tmp_path_factory.mktemp("damaged"), bad)


def test_batches_have_the_shapes_that_were_promised(tiny):
    data = loader(tiny)
    assert data.modalities == tuple(CARD["modalities"])
    assert data.classes == ("red", "green", "blue")
    assert {n: s.shape for n, s in data.inputs.items()} == {
        "audio": (1, 12, 17),
        "image": (1, 8, 8),
        "frames": (2, 3, 4, 4),
        "text": (4,),
        "vector": (4,),
        "series": (5, 2),
        "size": (2,),
    }
    assert data.inputs["text"].vocabulary == 50
    for batch in data.train_batches(1):
        for name, spec in data.inputs.items():
            assert batch[name].shape[1:] == spec.shape
            assert batch[name].dtype == (torch.int64 if spec.kind == "text" else torch.float32)
        assert np.array_equal(data.labels("train")[batch["row"]], batch["label"])
    assert (data.num_samples("train"), data.num_samples("valid"), data.num_samples("test")) == (101, 20, 31)


@pytest.mark.parametrize("augment", [{}, AUGMENT])
@pytest.mark.parametrize("corpus", ["tiny", "damaged"])
def test_cached_and_streaming_give_the_same_bits(request, corpus, augment):
    card = request.getfixturevalue(corpus)
    cached = loader(card, cache="on", augment=augment, bad_samples=0.1)
    streaming = loader(card, cache="off", augment=augment, bad_samples=0.1, decode_threads=3, prefetch=2)
    for epoch in (1, 2):
        assert_equal(list(cached.train_batches(epoch)), list(streaming.train_batches(epoch)))
    for split in ("train", "valid", "test"):
        assert_equal(list(cached.batches(split)), list(streaming.batches(split)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_workers_share_the_batches_of_one(damaged, cache, world):
    options = {"cache": cache, "augment": AUGMENT, "bad_samples": 0.1}
    alone = list(loader(damaged, **options).train_batches(1))
    parts = [list(loader(damaged, rank=r, world=world, **options).train_batches(1)) for r in range(world)]
    together = [{n: torch.cat([b[n] for b in bs]) for n in bs[0]} for bs in zip(*parts, strict=True)]
    assert_equal(alone, together)
    rows = [b["row"] for r in range(world) for b in loader(damaged, rank=r, world=world, **options).batches("test")]
    assert sorted(torch.cat(rows).tolist()) == list(range(1, 31))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_resumed_epoch_is_the_tail(damaged, cache):
    options = {"cache": cache, "augment": AUGMENT, "bad_samples": 0.1}
    whole = list(loader(damaged, **options).train_batches(3))
    for start in (1, 5, len(whole)):
        assert_equal(list(loader(damaged, **options).train_batches(3, start=start)), whole[start:])


def test_bounds_are_the_sizes_of_the_batches(tiny):
    data = loader(tiny)
    assert np.diff(data.bounds()).tolist() == [len(b["row"]) for b in data.train_batches(1)]


def test_every_row_comes_once_and_epochs_differ(tiny):
    data = loader(tiny, ["vector"])
    one, two = (torch.cat([b["row"] for b in data.train_batches(e)]).tolist() for e in (1, 2))
    assert sorted(one) == sorted(two) == list(range(101))
    assert one != two


def test_evaluation_is_in_order_and_never_augmented(tiny):
    data = loader(tiny, ["image"], augment={"image": ["noise"]})
    once, again = list(data.batches("test")), list(data.batches("test"))
    assert_equal(once, again)
    assert torch.cat([b["row"] for b in once]).tolist() == list(range(31))
    assert_equal(once, list(loader(tiny, ["image"]).batches("test")))


def test_standardised_features_have_mean_0_and_std_1(tiny):
    data = loader(tiny, ["vector", "series"])
    whole = torch.cat([b["vector"] for b in data.batches("train")])
    assert torch.allclose(whole.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(whole.std(0, unbiased=False), torch.ones(4), atol=1e-5)
    series = torch.cat([b["series"] for b in data.batches("train")]).reshape(-1, 2)
    assert torch.allclose(series.std(0, unbiased=False), torch.ones(2), atol=1e-5)


def test_what_was_learned_from_train_can_be_stored(tiny):
    import json

    data = loader(tiny, ["vector", "text"])
    state = json.loads(json.dumps(data.preprocessing_state()))
    assert set(state) == {"vector"}
    assert_equal(list(loader(tiny, ["vector", "text"], state=state).batches("test")), list(data.batches("test")))
    state["vector"]["mean"] = [0.0] * 4
    changed = loader(tiny, ["vector", "text"], state=state)
    assert not torch.equal(next(changed.batches("test"))["vector"], next(data.batches("test"))["vector"])


def test_features_that_never_change_get_std_1(tmp_path, rows):
    constant = {s: [{**r, "vector": [0.1, *r["vector"][1:]]} for r in part] for s, part in rows.items()}
    data = loader(write_corpus(tmp_path, constant), ["vector"])
    assert data.preprocessing_state()["vector"]["std"][0] == 1.0
    assert torch.cat([b["vector"] for b in data.batches("test")])[:, 0].abs().max() < 1e-6


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_bad_row_is_replaced_by_the_next_good_one_of_its_window(damaged, tiny, cache):
    data = loader(damaged, cache=cache, bad_samples=0.1, shuffle_window=1000)
    found = torch.cat([b["row"] for b in data.train_batches(1)]).tolist()
    wanted = torch.cat([b["row"] for b in loader(tiny, shuffle_window=1000).train_batches(1)]).tolist()
    bad = {3, 4, 5, 40, 60, 61, 80, 81}
    assert len(found) == 101
    for at, row in enumerate(found):
        assert row == next(r for r in (wanted + wanted)[at:] if r not in bad)
    skipped = data.skipped()
    assert {s["sample_id"] for s in skipped} == {f"train{i:03d}" for i in bad}
    assert {s["modality"] for s in skipped} == {"audio", "image", "vector", "text"}
    assert all(s["split"] == "train" and s["file"].endswith(".parquet") and s["reason"] for s in skipped)
    list(data.train_batches(2))
    assert data.skipped() == []


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_bad_row_is_left_out_of_evaluation(damaged, cache):
    data = loader(damaged, cache=cache)
    assert torch.cat([b["row"] for b in data.batches("test")]).tolist() == list(range(1, 31))
    assert [(s["sample_id"], s["reason"]) for s in data.skipped()] == [("test000", "empty")]


def test_modalities_that_are_not_used_may_be_bad(damaged):
    data = loader(damaged, ["frames"], bad_samples=0)
    assert len(list(data.train_batches(1))) == len(data.bounds()) - 1


@pytest.mark.parametrize("cache", ["on", "off"])
def test_too_many_bad_rows_stop_the_run(damaged, cache):
    with pytest.raises(DataError) as error:
        list(loader(damaged, cache=cache, bad_samples=0.05).train_batches(1))
    text = str(error.value)
    assert "corpus tiny, split train: " in text and "rows cannot be decoded, 5 of 101 are tolerated" in text
    assert "data.bad_samples (0.05)" in text and "train-0000" in text
    with pytest.raises(DataError, match="1 rows cannot be decoded, 0 of 31 are tolerated"):
        list(loader(damaged, cache=cache, bad_samples=0).batches("test"))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_window_without_a_good_row_stops_the_run(tmp_path, rows, cache):
    hopeless = {s: [{**r, "image": b""} for r in part] for s, part in rows.items()}
    card = write_corpus(tmp_path, hopeless)
    with pytest.raises(DataError, match=r"not one of .* rows can be decoded .*image: empty"):
        list(loader(card, ["image"], cache=cache, bad_samples=1).train_batches(1))
    assert list(loader(card, ["image"], cache=cache, bad_samples=1).batches("test")) == []


def test_the_budget_allows_one_unless_it_is_0():
    assert [bad_budget(50, 0.01), bad_budget(1000, 0.01), bad_budget(1000, 0)] == [1, 10, 0]


def test_closing_early_leaves_no_thread(tiny):
    before = threading.active_count()
    batches = loader(tiny, cache="off", prefetch=1).train_batches(1)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_an_epoch_that_is_expected_is_read_ahead_and_is_the_same(tiny):
    wanted = list(loader(tiny, cache="off", augment=AUGMENT).train_batches(2))
    data = loader(tiny, cache="off", augment=AUGMENT)
    reading, start = [], data._decoded_batches

    def noted(split, units):
        reading.append(split)
        yield from start(split, units)

    data._decoded_batches = noted
    before = threading.active_count()
    data.expect(2)
    for _ in range(1000):
        if reading:
            break
        time.sleep(0.01)
    assert reading == ["train"], "before it is asked for"
    assert len(list(data.batches("test"))) > 0, "other things may be read meanwhile"
    assert_equal(list(data.train_batches(2)), wanted)
    assert reading == ["train", "test"]
    data.expect(3)
    assert_equal(list(data.train_batches(2, start=1)), wanted[1:])
    data.expect(3)
    data.close()
    assert threading.active_count() == before
    cached = loader(tiny, cache="on")
    cached.expect(1)
    assert threading.active_count() == before, "nothing is to be read"


def test_errors_in_the_background_surface_and_end_the_thread():
    def failing():
        yield 1
        raise OSError("the disk is gone")

    before = threading.active_count()
    items = Background(failing(), 4)
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert threading.active_count() == before


def test_the_cache_is_chosen_by_size(tiny):
    assert loader(tiny, cache="auto").cached
    small = loader(tiny, cache="auto", cache_limit_gib=1e-6)
    assert not small.cached
    assert_equal(list(small.train_batches(1)), list(loader(tiny, cache="on").train_batches(1)))


def test_mistakes_are_named_before_anything_is_read(tiny):
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        loader(tiny, ["imag"])
    with pytest.raises(ConfigError, match="batch_size 8 does not divide among 3 workers"):
        loader(tiny, world=3)
    with pytest.raises(ConfigError, match=r"data.augment.text has 'flip'"):
        loader(tiny, augment={"text": ["flip"]})
    with pytest.raises(DataError, match="no split is called 'val', did you mean 'valid'"):
        loader(tiny).batches("val").__next__()


def test_a_split_knows_the_bytes_of_its_rows(tiny, rows):
    index = loader(tiny).indexes["train"]
    media = sum(len(row["audio"]) + len(row["image"]) for row in rows["train"])
    assert media < index.num_bytes < 2 * media + 1000 * len(index)


def test_windows_are_bounded_by_bytes_too(tmp_path, rows):
    """Noise pictures of a megabyte: of a hundred rows a window of 8 MiB holds few."""
    big = copy.deepcopy(rows)
    noise = np.random.default_rng(0).integers(0, 255, (320, 1100, 3), dtype=np.uint8)
    for row in big["train"]:
        row["image"] = image_bytes(noise)
    card = write_corpus(tmp_path, big)
    data = loader(card, shuffle_mib=8, shuffle_window=1000)
    num_bytes = data.indexes["train"].num_bytes
    windows = plan.epoch_order(data.indexes["train"].group_sizes, 0, 1, 1000, plan.windows_for(num_bytes, 8 * 2**20))
    assert len(windows) > 5
    cached = loader(card, cache="on", shuffle_mib=8, shuffle_window=1000)
    for found in (data, cached):
        assert torch.cat([b["row"] for b in found.train_batches(1)]).tolist() == np.concatenate(windows).tolist()


def test_decoded_rows_are_let_go(tiny):
    data = loader(tiny, cache="off")
    index = data.indexes["train"]
    (unit,) = plan.evaluation_units("train", index.group_pairs, index.group_sizes, block=32, rows=range(32))
    unit = dataclasses.replace(unit, pieces=tuple(plan.Piece(b, 8 * b, 8 * b + 8) for b in range(4)))
    raw = units.read_window(index, unit, data.decoder.modalities)
    left = [len(raw.held)] + [len(raw.held) for _ in units.decode_unit(unit, raw, data.decoder)]
    assert left == [32, 24, 16, 8, 0]
    assert raw.cells(3).keys() == set(data.modalities)  # and can be had again


def test_a_window_is_read_as_far_as_it_is_wanted(tiny):
    data = loader(tiny, cache="off")
    index = data.indexes["train"]
    how = {"seed": 0, "epoch": 1, "batch_size": 8, "shuffle_window": 1000}
    unit = next(plan.rank_units("train", index.group_pairs, index.group_sizes, **how))
    with contextlib.closing(units.Reader(index, data.decoder.modalities)) as reader:
        window = units.Window(index, unit, data.decoder.modalities, reader)
        read = []
        for share in (0.0, 0.3, 0.5, 1.0):
            window.advance(share)
            read.append(len({index.place(row)[:2] for row in window._raw.held}))
        assert read == [0, math.ceil(0.3 * len(unit.groups)), math.ceil(0.5 * len(unit.groups)), len(unit.groups)]
        assert sorted(window.rows().held) == sorted(unit.rows().tolist())


def test_units_can_be_worked_on_elsewhere(tiny):
    """What a task on another machine does: everything crosses as a pickle."""
    data = loader(tiny, cache="off")
    index = data.indexes["train"]
    pieces = []
    for unit in plan.rank_units(
        "train", index.group_pairs, index.group_sizes, seed=0, epoch=1, batch_size=8, shuffle_window=24, max_batches=2
    ):
        sent_index, sent_unit, decoder = pickle.loads(pickle.dumps((index, unit, data.decoder)))
        raw = units.read_window(sent_index, sent_unit, decoder.modalities)
        raw = pickle.loads(pickle.dumps(raw))
        pieces += pickle.loads(pickle.dumps(list(units.decode_unit(sent_unit, raw, decoder))))

    class Elsewhere(LocalData):
        def _decoded_batches(self, split, units):
            yield from pieces

    options = DataOptions(shuffle_window=24, cache="off")
    assert_equal(list(Elsewhere(tiny, batch_size=8, options=options).train_batches(1)), list(data.train_batches(1)))
