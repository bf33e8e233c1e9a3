from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from counterpoise.functional import (
    accuracy_gap,
    derived_seed,
    seeded_generator,
    soft_cross_entropy,
    true_class_scores,
)


def test_score_is_the_probability_of_the_true_class() -> None:
    scores = true_class_scores(torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 2]))
    torch.testing.assert_close(scores, torch.tensor([0.665241, 0.090031]), atol=1e-6, rtol=0)


def test_scores_take_leading_dimensions() -> None:
    logits, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    flat = true_class_scores(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(true_class_scores(logits, labels), flat.view(3, 5))


def test_soft_cross_entropy_of_one_hot_targets_is_cross_entropy() -> None:
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(labels, 4).float()), expected)


def test_soft_targets_need_not_sum_to_one() -> None:
    found = soft_cross_entropy(torch.tensor([[0.5, 0.0, -0.5]]), torch.tensor([[0.667379, 0.0, 0.0]]))
    assert found.item() == pytest.approx(0.453998, abs=1e-5)


def test_gap_leaves_the_fused_accuracy_out() -> None:
    assert accuracy_gap({"fused": 0.99, "audio": 0.7, "visual": 0.4}) == pytest.approx(0.3)
    assert accuracy_gap({"fused": 0.9, "audio": 0.7}) == 0
    assert accuracy_gap({"fused": 0.9}) == 0


def test_derived_seeds_stay_what_they_are() -> None:
    """Every shuffle, start and dropout of every saved run hangs on these."""
    assert derived_seed(0, "encoder", "audio") == 2174451189368758086
    assert derived_seed(0) != derived_seed("0/0") and derived_seed("a", "b") != derived_seed("b", "a")
    assert 0 <= derived_seed("x") < 2**63


def test_generators_of_equal_parts_draw_equal_numbers() -> None:
    first, second = (torch.rand(3, generator=seeded_generator(1, "step", 2)) for _ in range(2))
    assert first.equal(second) and not first.equal(torch.rand(3, generator=seeded_generator(1, "step", 3)))
