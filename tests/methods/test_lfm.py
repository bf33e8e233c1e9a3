"""LFM against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, EpochContext, EpochStats, SplitStats, Stage, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.lfm import LFM, LFMConfig, alignment, learned_weight, scheduled_weight
from counterpoise.models.network import MultimodalNet

P, Q = (0.7, 0.2, 0.1), (0.1, 0.3, 0.6)
NAMES = ("audio", "video")


def logits(*probabilities: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor([p], dtype=torch.float64).log() for p in probabilities]


def test_alignment_is_the_jensen_shannon_divergence() -> None:
    assert alignment(logits(P, Q)).item() == pytest.approx(0.230645, abs=1e-6)
    assert alignment(logits(P, Q), "swapped").item() == pytest.approx(0.295348, abs=1e-6)


def test_the_swapped_form_is_what_torch_computes_from_swapped_arguments() -> None:
    p, q = (torch.tensor([x]) for x in (P, Q))
    middle = (p + q) / 2
    released = (F.kl_div(p.log(), middle, reduction="batchmean") + F.kl_div(q.log(), middle, reduction="batchmean")) / 2
    assert alignment([p.log(), q.log()], "swapped").item() == pytest.approx(released.item(), rel=1e-5)


numbers = st.lists(st.floats(-8, 8), min_size=3, max_size=3)


@given(numbers, numbers)
def test_alignment_is_symmetric_and_between_0_and_log_2(first: list[float], second: list[float]) -> None:
    p, q = torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64)
    value = alignment([p, q]).item()
    assert -1e-12 <= value <= math.log(2) + 1e-12
    assert value == pytest.approx(alignment([q, p]).item(), abs=1e-12)
    assert alignment([p, p + 3]).item() == pytest.approx(0, abs=1e-12), "equal probabilities"


@pytest.mark.parametrize("form", ["jensen_shannon", "swapped"])
def test_certain_predictions_give_finite_gradients(form: str) -> None:
    """Probabilities that underflow to 0 have a log of minus infinity."""
    p, q = torch.tensor([[300.0, 0, 0]], requires_grad=True), torch.tensor([[0, 300.0, 0]], requires_grad=True)
    alignment([p, q], form).sum().backward()
    assert p.grad is not None and q.grad is not None
    assert p.grad.isfinite().all() and q.grad.isfinite().all()


def test_three_modalities_are_aligned_in_pairs() -> None:
    p, q, r = logits(P, Q, (0.2, 0.2, 0.6))
    pairs = [alignment(pair) for pair in ([p, q], [p, r], [q, r])]
    torch.testing.assert_close(alignment([p, q, r]), torch.stack(pairs).mean(dim=0))


def test_the_fitted_weight_is_the_published_polynomial() -> None:
    found = [scheduled_weight("fitted", epoch, 200, 0, 0) for epoch in (1, 11, 21, 101, 178)]
    assert found == pytest.approx([0.2046, 0.2478, 0.3009, 0.5392, 1.0], abs=1e-4)
    assert all(0.2 < scheduled_weight("fitted", epoch, 200, 0, 0) <= 1 for epoch in range(1, 201))
    assert scheduled_weight("fitted", 11, 20, 0, 0) == scheduled_weight("fitted", 101, 200, 0, 0), "stretched"


def test_other_weights_run_from_first_to_last() -> None:
    assert [scheduled_weight("linear", epoch, 5, 0.2, 1.0) for epoch in range(1, 6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1]
    )
    assert scheduled_weight("linear", 1, 1, 0.2, 1.0) == 0.2
    assert [scheduled_weight("constant", epoch, 5, 0.2, 1.0) for epoch in (1, 5)] == [0.2, 0.2]


def test_a_learned_weight_stays_within_bounds_and_its_rate_is_halved_every_20_epochs() -> None:
    assert learned_weight(0.5, 2, 0.1, 19) == pytest.approx(0.7)
    assert learned_weight(0.5, 2, 0.1, 20) == pytest.approx(0.6)
    assert learned_weight(0.5, -2, 0.1, 40) == pytest.approx(0.45)
    assert learned_weight(0.5, 100, 0.1, 1) == 0.95 and learned_weight(0.5, -100, 0.1, 1) == 0.05


def make_lfm(modalities: tuple[str, ...] = NAMES, epochs: int = 200, **config: Any) -> tuple[LFM, MultimodalNet]:
    lfm = LFM(LFMConfig(**config), Setting(modalities, 3, epochs, 0), SingleComm())
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for m in modalities}
    return lfm, MultimodalNet(encoders, lfm.head(dict.fromkeys(modalities, 4)))


def make_batch(rows: int = 8, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    values = {m: torch.randn(rows, 3, generator=rng) for m in (*NAMES, "third")}
    return values | {LABEL: torch.randint(3, (rows,), generator=rng)}


def step(epoch: int = 1) -> Step:
    return Step(epoch, 0, 0, "joint", 8, 1.0, torch.Generator())


@pytest.mark.parametrize("modalities", [NAMES, (*NAMES, "third")])
def test_the_prediction_is_the_mean_of_the_modalities(modalities: tuple[str, ...]) -> None:
    lfm, net = make_lfm(modalities)
    out = net.eval()(make_batch())
    expected = torch.stack([out.unimodal[m] for m in modalities]).mean(dim=0)
    torch.testing.assert_close(lfm.fuse(net, out), expected)
    assert net(make_batch(), ["audio"]).fused is None


def test_the_loss_weighs_labels_and_alignment() -> None:
    """2 (a1 CE + a2 A) with a1 = 0.25."""
    lfm, net = make_lfm(schedule="constant", first=0.25)
    batch = make_batch()
    out = net.eval()(batch)
    assert out.fused is not None
    losses = lfm.losses(out, batch, step())
    apart = alignment([out.unimodal[m] for m in NAMES]).mean()
    torch.testing.assert_close(losses["fused"], 0.5 * F.cross_entropy(out.fused, batch[LABEL]))
    torch.testing.assert_close(losses["alignment"], 1.5 * apart)
    assert lfm.adjust(net, out, batch, step())["label_weight"].item() == 0.25
    swapped, _ = make_lfm(schedule="constant", first=0.25, alignment="swapped")
    assert swapped.losses(out, batch, step())["alignment"] > losses["alignment"]


def context(batches: dict[str, Batch]) -> EpochContext:
    def read(split: str, fraction: float) -> Iterator[Batch]:
        rows = round(fraction * len(batches[split][LABEL]))
        yield {name: value[:rows] for name, value in batches[split].items()}

    sizes = {split: SplitStats(len(batch[LABEL]), {}, {}, {}) for split, batch in batches.items()}
    stats = EpochStats(1, sizes["train"], sizes.get("valid"))
    return EpochContext(1, Stage("train", 200), 1, [stats], read)


def test_a_learned_weight_follows_the_held_out_loss_after_a_small_step() -> None:
    """Against finite differences: the held-out CE after a step of SGD on L, as a function of a1."""
    lfm, net = make_lfm(schedule="learned", first=0.3, rate=1e-3)
    net.double().eval()
    batches = {"train": make_batch(200), "valid": make_batch(40, seed=1)}
    batches = {s: {k: v.double() if k != LABEL else v for k, v in b.items()} for s, b in batches.items()}
    train, held = ({k: v[:rows] for k, v in batches[s].items()} for s, rows in (("train", 64), ("valid", 16)))
    eta, values = 1e-4, []
    start = {name: value.clone() for name, value in net.state_dict().items()}
    for weight in (0.2, 0.4):
        net.load_state_dict(start)
        fused, apart = lfm.terms(net(train), train[LABEL])
        net.zero_grad()
        (2 * (weight * fused + (1 - weight) * apart) / 64).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= eta * parameter.grad
        values.append(lfm.terms(net(held), held[LABEL])[0].item() / 16)
    net.load_state_dict(start)
    slope = -(values[1] - values[0]) / 0.2 / eta
    lfm.end_epoch(net, context(batches))
    assert lfm.weight == pytest.approx(0.3 + 1e-3 * slope, rel=1e-4) and lfm.weight != 0.3
    assert lfm.label_weight(2) == lfm.weight


def test_learning_the_weight_leaves_the_network_alone_and_is_remembered() -> None:
    lfm, net = make_lfm(schedule="learned")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    lfm.end_epoch(net, context({"train": make_batch(200)}))  # without a valid split: training samples
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
    assert net.training and all(p.grad is None for p in net.parameters())
    again, _ = make_lfm(schedule="learned")
    again.load_state_dict(lfm.state_dict())
    assert again.weight == lfm.weight != LFMConfig().first


def test_other_schedules_read_nothing() -> None:
    lfm, net = make_lfm()
    lfm.end_epoch(net, None)  # type: ignore[arg-type]
    assert lfm.state_dict() == {}
