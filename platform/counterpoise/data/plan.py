"""The order of an epoch, and what each worker reads of it: pure functions of (index, seed, epoch, world).

Row groups are shuffled and gathered into windows; rows are shuffled inside a window. Global batch b is
order[bounds[b]:bounds[b + 1]], and worker r of W owns the r-th of W nearly equal contiguous parts of it, so the
global batches are the same for any number of workers. A batch may lie across two windows: then two units each carry
a piece of it, and the reader joins pieces that share a batch number.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from counterpoise.contracts import ConfigError, DataError


def generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on nothing but `parts`; equal in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


@dataclass(frozen=True)
class Piece:
    """A worker's part of one batch, as far as it lies in one window: order[start:stop] of the unit."""

    batch: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """Work that needs the encoded rows of one window only.

    order: rows of the whole window in epoch order (a row that cannot be decoded is replaced from here).
    groups: (file number, row group) pairs that hold the rows of `pieces`.
    """

    split: str
    epoch: int | None  # None in evaluation: rows that cannot be decoded are left out
    window: int
    order: np.ndarray
    groups: tuple[tuple[int, int], ...]
    pieces: tuple[Piece, ...]

    def rows(self) -> np.ndarray:
        """Rows of all pieces, in order."""
        return np.concatenate([self.order[p.start : p.stop] for p in self.pieces])


def windows_for(num_bytes: int, window_bytes: int) -> int:
    """The least number of windows of which each has about `window_bytes` at most."""
    return max(1, -(-num_bytes // window_bytes))


def epoch_order(
    group_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int, shuffle_window: int, least_windows: int = 1
) -> list[np.ndarray]:
    """Windows of row numbers that together hold every row once, in training order.

    Every window has at least `shuffle_window` rows (what remains joins the last one); a split of no more rows than
    that is one full permutation. Where that would be fewer than `least_windows`, there are as many of those as there
    are row groups for, each of nearly as many row groups as the others.
    """
    sizes = np.asarray(group_sizes, dtype=np.int64)
    total = int(sizes.sum())
    rng = generator("order", seed, epoch)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    least_windows = min(least_windows, len(sizes))
    if least_windows > max(1, total // shuffle_window):
        parts = np.array_split(rng.permutation(len(sizes)), least_windows)
        return [rng.permutation(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in part])) for part in parts]
    if total <= shuffle_window:
        return [rng.permutation(total)]
    gathered: list[list[np.ndarray]] = [[]]
    count = 0
    for group in rng.permutation(len(sizes)):
        if count >= shuffle_window:
            gathered.append([])
            count = 0
        gathered[-1].append(np.arange(starts[group], starts[group + 1]))
        count += int(sizes[group])
    if count < shuffle_window and len(gathered) > 1:
        last = gathered.pop()
        gathered[-1].extend(last)
    return [rng.permutation(np.concatenate(rows)) for rows in gathered]


def bounds(num_samples: int, batch_size: int) -> list[int]:
    """Positions where the global batches begin, and the end: ceil(N / B) batches, sizes differ by at most one."""
    if num_samples == 0:
        return [0]
    num_batches = -(-num_samples // batch_size)
    return [i * num_samples // num_batches for i in range(num_batches + 1)]


def rank_slice(lo: int, hi: int, rank: int, world: int) -> tuple[int, int]:
    """The part of [lo, hi) that belongs to worker `rank`."""
    size = hi - lo
    return lo + rank * size // world, lo + (rank + 1) * size // world


def check_batches(num_samples: int, batch_size: int, world: int, even: bool = True) -> None:
    """Raise if a batch cannot be shared among `world` workers. even: shares that were asked for should be equal."""
    if even and batch_size % world:
        divisors = [w for w in range(1, batch_size + 1) if batch_size % w == 0]
        some = ", ".join(map(str, divisors[:3])) + (", ..." if len(divisors) > 3 else "")
        raise ConfigError(
            f"batch_size {batch_size} does not divide among {world} workers; "
            f"choose a multiple of {world}, or {some} workers"
        )
    edges = bounds(num_samples, batch_size)
    smallest = min((b - a for a, b in itertools.pairwise(edges)), default=0)
    if smallest < world:
        raise DataError(
            f"{num_samples} training samples in batches of {batch_size}: the smallest batch has {smallest} samples "
            f"for {world} workers; use fewer workers or a larger batch_size"
        )


def _groups_of(rows: np.ndarray, group_starts: np.ndarray, pairs: np.ndarray) -> tuple[tuple[int, int], ...]:
    numbers = np.unique(np.searchsorted(group_starts, rows, side="right") - 1)
    return tuple((int(pairs[n, 0]), int(pairs[n, 1])) for n in numbers)


def rank_units(
    split: str,
    group_pairs: np.ndarray,
    group_sizes: Sequence[int] | np.ndarray,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    shuffle_window: int,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    max_batches: int | None = None,
    least_windows: int = 1,
) -> Iterator[Unit]:
    """What worker `rank` has to read and decode in an epoch, from global batch `start` on.

    group_pairs: (file number, row group) [G, 2] of the row groups in row order; group_sizes: their rows [G].
    max_batches: at most this many batches in a unit (the same window is then read by several units).
    """
    sizes = np.asarray(group_sizes, dtype=np.int64)
    group_starts = np.concatenate([[0], np.cumsum(sizes)])
    edges = bounds(int(sizes.sum()), batch_size)
    first_batch = start
    lo = 0
    for window, order in enumerate(epoch_order(sizes, seed, epoch, shuffle_window, least_windows)):
        hi = lo + len(order)
        pieces = []
        batch = first_batch
        while batch < len(edges) - 1 and edges[batch] < hi:
            a, b = rank_slice(edges[batch], edges[batch + 1], rank, world)
            a, b = max(a, lo), min(b, hi)
            if a < b:
                pieces.append(Piece(batch, a - lo, b - lo))
            if edges[batch + 1] > hi:
                break
            batch += 1
        first_batch = batch
        size = max_batches or max(len(pieces), 1)
        for i in range(0, len(pieces), size):
            part = tuple(pieces[i : i + size])
            rows = np.concatenate([order[p.start : p.stop] for p in part])
            yield Unit(split, epoch, window, order, _groups_of(rows, group_starts, group_pairs), part)
        lo = hi


def evaluation_units(
    split: str,
    group_pairs: np.ndarray,
    group_sizes: Sequence[int] | np.ndarray,
    *,
    block: int,
    rank: int = 0,
    world: int = 1,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Unit]:
    """Blocks of rows, dealt to the workers in turn: every row (or each of `rows`) exactly once over all workers."""
    sizes = np.asarray(group_sizes, dtype=np.int64)
    group_starts = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.arange(int(sizes.sum())) if rows is None else np.asarray(rows, dtype=np.int64)
    for number, lo in enumerate(range(0, len(chosen), block)):
        if number % world == rank:
            part = chosen[lo : lo + block]
            groups = _groups_of(part, group_starts, group_pairs)
            yield Unit(split, None, number, part, groups, (Piece(number, 0, len(part)),))
