"""OPM against numbers worked out by hand, and who loses what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import Outputs, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.functional import mean_ratios, true_class_scores
from counterpoise.methods.base import Setting
from counterpoise.methods.opm import OPM, OPMConfig, drop_features, drop_probabilities
from counterpoise.models.network import MultimodalNet

NAMES = ("audio", "visual")
RATIOS = torch.tensor([2.6, 1 / 2.6])  # of S = (1.3, 0.5)


def test_the_modality_ahead_is_dropped_and_no_other() -> None:
    q = drop_probabilities(RATIOS, 0.5, 0.5)
    assert q.tolist() == pytest.approx([0.730417, 0.0], abs=1e-6)
    assert drop_probabilities(RATIOS.flip(0), 0.5, 0.5).tolist() == q.flip(0).tolist()
    assert drop_probabilities(RATIOS, 0.5, 2.0).tolist() == pytest.approx([1.0, 0.0]), "1.42 is clipped"


def test_what_is_left_is_scaled_by_the_expected_loss_of_width() -> None:
    """Equal widths: theta = 0.730417 / 2 = 0.365209, 1 / (1 - theta) = 1.575320. Widths 1 and 3: theta = 0.182604."""
    q = drop_probabilities(RATIOS, 0.5, 0.5)
    uniform = torch.tensor([[0.73, 0.0], [0.7305, 0.0]])
    found = drop_features({"audio": torch.ones(2, 4), "visual": torch.ones(2, 4)}, q, uniform)
    assert found["audio"].mean(1).tolist() == pytest.approx([0, 1.575320], abs=1e-5)
    assert found["visual"].mean(1).tolist() == pytest.approx([1.575320, 1.575320], abs=1e-5)
    found = drop_features({"audio": torch.ones(2, 1), "visual": torch.ones(2, 3)}, q, uniform)
    assert found["visual"].mean(1).tolist() == pytest.approx([1 / (1 - 0.730417 / 4)] * 2, abs=1e-5)


def test_level_scores_leave_features_untouched() -> None:
    q = drop_probabilities(mean_ratios(torch.tensor([0.7, 0.7, 0.7])), 0.5, 0.5)
    features = {m: torch.randn(5, 2) for m in "abc"}
    found = drop_features(features, q, torch.rand(5, 3))
    assert q.tolist() == [0, 0, 0] and all(found[m].equal(features[m]) for m in "abc")


@given(
    scores=st.lists(st.floats(0, 1e3), min_size=2, max_size=5),
    q_base=st.floats(0, 1),
    lam=st.floats(0, 3),
    seed=st.integers(0, 999),
)
def test_no_sample_loses_all_its_modalities(scores: list[float], q_base: float, lam: float, seed: int) -> None:
    ratios = mean_ratios(torch.tensor(scores))
    q = drop_probabilities(ratios, q_base, lam)
    assert ((q >= 0) & (q <= 1)).all() and q.min() == 0
    uniform = torch.rand(8, len(scores), generator=torch.Generator().manual_seed(seed))
    found = torch.stack(
        list(drop_features({str(i): torch.ones(8, 2) for i in range(len(scores))}, q, uniform).values())
    )
    assert found.isfinite().all() and (found.amax(dim=(0, 2)) >= 1).all()


def test_three_modalities_may_lose_the_two_that_are_ahead() -> None:
    """S = (6, 4, 2): rho = (2.25, 1.333, 0.417)."""
    ratios = mean_ratios(torch.tensor([6.0, 4.0, 2.0]))
    assert ratios.tolist() == pytest.approx([2.25, 4 / 3, 5 / 12])
    first, second, third = drop_probabilities(ratios, 0.4, 0.5).tolist()
    assert first > second > 0.4 and third == 0


# --- batches


def network() -> MultimodalNet:
    torch.manual_seed(0)
    method = make()
    return MultimodalNet({"audio": nn.Linear(3, 2), "visual": nn.Linear(3, 6)}, method.head({"audio": 2, "visual": 6}))


def make(epochs: int = 10, **options: object) -> OPM:
    return OPM(OPMConfig(**options), Setting(NAMES, 2, epochs, 0), SingleComm())  # type: ignore[arg-type]


BATCH = {"audio": torch.randn(64, 3), "visual": torch.randn(64, 3), "label": torch.arange(64) % 2}


def step(epoch: int = 1, seed: int = 0) -> Step:
    return Step(epoch, 0, 0, "joint", 64, 1.0, torch.Generator().manual_seed(seed))


def passed(method: OPM, *epochs: int, seed: int = 0) -> list[Outputs]:
    net = network()
    method.attach(net)
    return [method.forward(net, BATCH, step(epoch, seed)) for epoch in epochs]


def test_the_loss_is_of_features_with_drops_and_predictions_are_without() -> None:
    method = make(q_of="same_batch", p_exe=1.0)
    (out,) = passed(method, 1)
    net = network()
    plain = net(BATCH)
    for m in NAMES:
        torch.testing.assert_close(out.unimodal[m], plain.unimodal[m])
    assert out.fused is not None and not out.fused.allclose(plain.fused)
    torch.testing.assert_close(method.predict(net, BATCH).fused, plain.fused)
    torch.testing.assert_close(method.losses(out, BATCH, step())["fused"], F.cross_entropy(out.fused, BATCH["label"]))
    found = method.adjust(net, out, BATCH, step())
    assert sorted(v.item() > 0.5 for v in found.values()) == [False, True]


def test_probabilities_come_from_the_batch_before_or_the_same() -> None:
    first, second = passed(make(p_exe=1.0), 1, 1)
    (same,) = passed(make(p_exe=1.0, q_of="same_batch"), 1)
    assert first.extra["q"].tolist() == [0, 0]
    assert second.extra["q"].equal(same.extra["q"]) and second.extra["q"].max() > 0


def test_some_batches_are_left_alone() -> None:
    method = make(q_of="same_batch", p_exe=0.7)
    net = network()
    treated = sum("q" in method.forward(net, BATCH, step(seed=seed)).extra for seed in range(400))
    assert 0.62 < treated / 400 < 0.78
    assert all("q" not in out.extra for out in passed(make(p_exe=0.0), 1, 2))
    (left,) = passed(make(p_exe=0.0), 1)
    assert [v.item() for v in method.adjust(net, left, BATCH, step()).values()] == [0, 0]


def test_drops_begin_after_warm_up_and_end() -> None:
    outs = passed(make(p_exe=1.0, warmup=2, last_epoch=4), 1, 2, 3, 4, 5)
    assert ["q" in out.extra for out in outs] == [False, False, True, True, False]
    assert outs[2].extra["q"].max() > 0, "q is known from the warm-up"
    assert [make(epochs).warmup for epochs in (3, 20, 100)] == [0, 1, 5]


def test_a_part_of_the_batch_gets_its_rows_of_the_masks() -> None:
    method, net = make(q_of="same_batch", p_exe=1.0), network()
    whole = method.forward(net, BATCH, step()).fused
    assert whole is not None

    plain = net(BATCH).unimodal
    scores = torch.stack([true_class_scores(plain[m].detach(), BATCH["label"]).sum() for m in NAMES])

    class Half(SingleComm):
        def sum(self, tensor: Tensor) -> Tensor:
            return scores.clone()

    part = OPM(method.config, method.setting, Half())
    rows = {name: value[24:] for name, value in BATCH.items()}
    half = Step(1, 0, 0, "joint", 64, 40 / 64, torch.Generator().manual_seed(0), start=24)
    fused = part.forward(net, rows, half).fused
    torch.testing.assert_close(fused, whole[24:])
