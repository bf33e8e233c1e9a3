import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data import plan

SIZES = [8, 8, 5, 8, 3, 8, 8, 1, 7]  # 56 rows
PAIRS = np.array([[i // 3, i % 3] for i in range(len(SIZES))])


def rows_by_batch(rank=0, world=1, start=0, window=20, batch_size=8, epoch=1, seed=0, **options):
    result = {}
    for unit in plan.rank_units(
        "train",
        PAIRS,
        SIZES,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        shuffle_window=window,
        rank=rank,
        world=world,
        start=start,
        **options,
    ):
        for piece in unit.pieces:
            result.setdefault(piece.batch, []).extend(unit.order[piece.start : piece.stop].tolist())
    return result


@pytest.mark.parametrize("window", [1, 7, 20, 56, 1000])
def test_every_row_comes_once_per_epoch(window):
    batches = rows_by_batch(window=window)
    assert sorted(row for rows in batches.values() for row in rows) == list(range(56))
    assert list(batches) == list(range(7))


@pytest.mark.parametrize("window", [1, 20, 1000])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_workers(window, world):
    alone = rows_by_batch(window=window)
    shared = [rows_by_batch(window=window, rank=r, world=world) for r in range(world)]
    for batch, rows in alone.items():
        assert [row for part in shared for row in part.get(batch, [])] == rows


@pytest.mark.parametrize("start", [0, 1, 3, 6, 7])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(start):
    whole = rows_by_batch(rank=1, world=2)
    assert rows_by_batch(rank=1, world=2, start=start) == {b: r for b, r in whole.items() if b >= start}


def test_epochs_and_seeds_differ_and_repeat():
    assert rows_by_batch(epoch=1) == rows_by_batch(epoch=1)
    assert rows_by_batch(epoch=1) != rows_by_batch(epoch=2)
    assert rows_by_batch(seed=1) != rows_by_batch(seed=2)


def test_windows_hold_whole_row_groups_and_enough_rows():
    windows = plan.epoch_order(SIZES, seed=3, epoch=1, shuffle_window=20)
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    assert len(windows) == 2
    for window in windows:
        assert len(window) >= 20
        for a, b in pairwise(starts):
            assert np.isin(np.arange(a, b), window).sum() in (0, b - a)


@pytest.mark.parametrize("least", [1, 2, 3, 5, 9, 40])
def test_windows_can_be_more_than_rows_ask_for_and_hold_all_rows(least):
    windows = plan.epoch_order(SIZES, seed=3, epoch=1, shuffle_window=20, least_windows=least)
    assert len(windows) == min(max(least, 2), len(SIZES))
    assert sorted(np.concatenate(windows)) == list(range(56))
    if least > 2:  # as many row groups in each, give or take one
        starts = np.cumsum(SIZES)
        groups = [len(set(np.searchsorted(starts, w, side="right"))) for w in windows]
        assert max(groups) - min(groups) <= 1
    else:
        usual = plan.epoch_order(SIZES, seed=3, epoch=1, shuffle_window=20)
        assert all(np.array_equal(a, b) for a, b in zip(windows, usual, strict=True))


def test_as_many_windows_as_their_bytes_ask_for():
    assert plan.windows_for(0, 100) == 1
    assert plan.windows_for(100, 100) == 1
    assert plan.windows_for(101, 100) == 2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_small_windows_make_the_same_batches_for_any_number_of_workers(world):
    alone = rows_by_batch(least_windows=5)
    together = {}
    for rank in range(world):
        for batch, rows in rows_by_batch(rank=rank, world=world, least_windows=5).items():
            together.setdefault(batch, []).extend(rows)
    assert together == alone


def test_a_small_split_is_one_permutation_across_row_groups():
    (window,) = plan.epoch_order(SIZES, seed=0, epoch=1, shuffle_window=56)
    assert sorted(window) == list(range(56))


def test_units_name_the_row_groups_of_their_rows():
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    for unit in plan.rank_units("train", PAIRS, SIZES, seed=0, epoch=1, batch_size=8, shuffle_window=20, world=2):
        groups = np.searchsorted(starts, unit.rows(), side="right") - 1
        assert {tuple(PAIRS[g]) for g in groups} == set(unit.groups)
        assert pickle.loads(pickle.dumps(unit)).groups == unit.groups


def test_units_can_be_made_smaller_without_changing_batches():
    assert rows_by_batch(max_batches=1) == rows_by_batch()


@given(st.integers(1, 500), st.integers(1, 64))
def test_batches_differ_in_size_by_at_most_one(num_samples, batch_size):
    edges = plan.bounds(num_samples, batch_size)
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == num_samples
    assert len(sizes) == -(-num_samples // batch_size)
    assert sizes.max() - sizes.min() <= 1 and sizes.max() <= batch_size


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
)
def test_any_layout_gives_every_row_once(sizes, window, batch_size, world):
    pairs = np.stack([np.zeros(len(sizes), int), np.arange(len(sizes))], axis=1)
    seen = []
    for rank in range(world):
        for unit in plan.rank_units(
            "train", pairs, sizes, seed=1, epoch=2, batch_size=batch_size, shuffle_window=window, rank=rank, world=world
        ):
            seen += unit.rows().tolist()
    assert sorted(seen) == list(range(sum(sizes)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_row_once(world):
    seen = []
    for rank in range(world):
        for unit in plan.evaluation_units("test", PAIRS, SIZES, block=10, rank=rank, world=world):
            assert unit.epoch is None
            seen += unit.rows().tolist()
    assert sorted(seen) == list(range(56))


def test_a_batch_must_divide_among_the_workers():
    with pytest.raises(ConfigError) as error:
        plan.check_batches(1000, 64, 3)
    assert str(error.value) == (
        "batch_size 64 does not divide among 3 workers; choose a multiple of 3, or 1, 2, 4, ... workers"
    )


def test_no_worker_may_go_without_samples():
    with pytest.raises(DataError, match="the smallest batch has 3 samples for 4 workers"):
        plan.check_batches(3, 64, 4)
