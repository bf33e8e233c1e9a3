from __future__ import annotations

import itertools

import numpy as np
import pytest

from counterpoise.reports.significance import Paired, against, holm, power_note, seeds_needed, sign_flip_p, smallest_p


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10, 16])
def test_when_all_seeds_agree_p_is_the_smallest_there_is(n: int) -> None:
    assert sign_flip_p([0.01 * (i + 1) for i in range(n)]) == pytest.approx(2 / 2**n)
    assert sign_flip_p([-0.01 * (i + 1) for i in range(n)]) == pytest.approx(2 / 2**n)


def test_five_seeds_give_a_sixteenth_and_six_half_of_that() -> None:
    assert sign_flip_p([0.02, 0.01, 0.03, 0.02, 0.01]) == 0.0625
    assert sign_flip_p([0.02, 0.01, 0.03, 0.02, 0.01, 0.04]) == 0.03125


def test_by_hand() -> None:
    # Sums of ±1 ±2 ±3 are 6 4 2 0 0 -2 -4 -6; observed 1 - 2 + 3 = 2: six of eight are as far from 0.
    assert sign_flip_p([1, -2, 3]) == 0.75
    assert sign_flip_p([1, 2, -3]) == 1.0  # nothing is nearer to 0
    assert sign_flip_p([0.5]) == 1.0 and sign_flip_p([0.0] * 7) == 1.0
    assert sign_flip_p([0.1, 0.2, 0.0]) == 0.5  # a zero has no sign to flip
    assert sign_flip_p([1 / 60, 2 / 60, -3 / 60]) == 1.0  # equal sums are equal, whatever rounding makes of them


def test_equals_counting_every_flip() -> None:
    rng = np.random.default_rng(3)
    for n in (4, 7, 9):
        d = rng.normal(0.3, 1, n).round(2)
        sums = [abs(float(np.dot(signs, d))) for signs in itertools.product((1, -1), repeat=n)]
        assert sign_flip_p(d.tolist()) == pytest.approx(np.mean([s >= abs(d.sum()) - 1e-12 for s in sums]))


def test_many_seeds_are_resampled_and_give_the_same_every_time() -> None:
    d = np.random.default_rng(0).normal(0.4, 1, 20).tolist()
    assert sign_flip_p(d) == sign_flip_p(d)
    assert 0.0 < sign_flip_p([0.01] * 20) < 1e-4


def test_nothing_cannot_be_tested() -> None:
    with pytest.raises(ValueError, match="no differences"):
        sign_flip_p([])


@pytest.mark.parametrize(
    ("given", "corrected"),
    [
        ([], []),
        ([0.03], [0.03]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3*.01, 2*.03, and 1*.04 is lifted to the one before
        ([0.0625, 0.5, 0.5, 1.0], [0.25, 1.0, 1.0, 1.0]),
        ([0.02, 0.01, 0.02, 0.005], [0.04, 0.03, 0.04, 0.02]),
    ],
)
def test_holm_by_hand(given: list[float], corrected: list[float]) -> None:
    assert holm(given) == pytest.approx(corrected)


def test_holm_keeps_the_order_and_stays_within_one() -> None:
    ps = np.random.default_rng(1).uniform(0, 1, 30).tolist()
    corrected = holm(ps)
    in_order = [corrected[i] for i in np.argsort(ps)]
    assert in_order == sorted(in_order) and max(corrected) <= 1
    assert all(c >= p for c, p in zip(corrected, ps, strict=True))


def test_pairs_are_of_the_same_seed() -> None:
    scores = {"joint": {0: 0.5, 1: 0.6, 2: 0.7}, "aug": {1: 0.7, 2: 0.9, 3: 0.1}, "late": {}}
    found = against("joint", scores)
    assert list(found) == ["aug", "late"]
    assert found["aug"].seeds == (1, 2) and found["aug"].differences == pytest.approx((0.1, 0.2))
    assert (found["aug"].p, found["aug"].p_holm) == (0.5, 0.5)  # the family is one: late has no seed in common
    assert found["late"] == Paired((), (), None, None) and found["late"].mean is None


def test_a_family_shares_its_correction() -> None:
    five = range(5)
    scores = {"joint": dict.fromkeys(five, 0.5)} | {m: {s: 0.6 + 0.01 * s for s in five} for m in "abcd"}
    assert {pair.p_holm for pair in against("joint", scores).values()} == {0.25}


def test_how_many_seeds_it_takes() -> None:
    assert [seeds_needed(m) for m in (1, 2, 4, 13)] == [6, 7, 8, 10]
    assert smallest_p(10, 13) < 0.05 <= smallest_p(9, 13)
    assert smallest_p(1, 13) == 1.0


def test_too_few_seeds_are_said() -> None:
    def family(n: int, m: int) -> list[Paired]:
        return [Paired(tuple(range(n)), (0.1,) * n, 0.5)] * m

    assert power_note(family(5, 4)) == (
        "5 seeds cannot reach p < 0.05: the smallest possible p with 4 comparisons is 0.25; 8 seeds could."
    )
    assert power_note(family(1, 1)) == (
        "1 seed cannot reach p < 0.05: the smallest possible p with 1 comparison is 1; 6 seeds could."
    )
    assert power_note(family(6, 1)) is None and power_note(family(10, 13)) is None
    assert power_note([Paired((), (), None)]) is None
