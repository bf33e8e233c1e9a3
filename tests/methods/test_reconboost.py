"""ReconBoost against numbers worked out by hand, and who is trained when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import EpochContext, EpochStats, SplitStats, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.loop import epoch_plan
from counterpoise.functional import true_class_scores
from counterpoise.methods.base import Setting
from counterpoise.methods.reconboost import (
    EnsembleHead,
    ReconBoost,
    ReconBoostConfig,
    boosting_loss,
    consolidation_loss,
    turns,
)
from counterpoise.models.network import MultimodalNet

LOGITS, OTHERS, LABELS = torch.tensor([[1.0, 0, 0]]), torch.tensor([[2.0, 1, 0]]), torch.tensor([0])
NAMES = ("audio", "video")


# --- the loss


def test_what_the_others_know_counts_less() -> None:
    """CE = 0.551445, softmax(others)_y = 0.665241, (5 - 0.665241) CE = 2.390379."""
    loss = boosting_loss(LOGITS, OTHERS, LABELS, 5, 1)
    assert loss.item() == pytest.approx(2.390379, abs=2e-6)
    assert loss.item() / 3 == pytest.approx(0.796793, abs=1e-6), "the released mean over three classes"


def test_boosting_loss_is_that_of_a_residual_label_in_other_words() -> None:
    """w1 - w2 p = w1 (1 - lambda p) with lambda = w2 / w1."""
    rng = torch.Generator().manual_seed(0)
    logits, others = torch.randn(6, 4, generator=rng), torch.randn(6, 4, generator=rng)
    labels = torch.randint(4, (6,), generator=rng)
    residual = 5 * (1 - 0.2 * true_class_scores(others, labels)) * F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(boosting_loss(logits, others, labels, 5, 1), residual.mean())


def test_others_that_know_nothing_leave_a_scaled_cross_entropy() -> None:
    loss = boosting_loss(LOGITS, torch.zeros(1, 3), LABELS, 5, 1)
    torch.testing.assert_close(loss, (5 - 1 / 3) * F.cross_entropy(LOGITS, LABELS))


def test_consolidation_is_a_mean_over_samples_and_classes() -> None:
    """softmax(ln 3, 0) = (3/4, 1/4) against (1/2, 1/2): each differs by 1/4."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    assert consolidation_loss(logits, torch.zeros(1, 2)).item() == pytest.approx(1 / 16)
    assert consolidation_loss(logits, logits).item() == 0


def test_no_gradient_reaches_what_others_said() -> None:
    logits, others = LOGITS.clone().requires_grad_(), OTHERS.clone().requires_grad_()
    (boosting_loss(logits, others, LABELS, 5, 1) + consolidation_loss(logits, others)).backward()
    assert others.grad is None and logits.grad is not None and (logits.grad != 0).all()


# --- turns


def test_turns_go_round_and_the_last_is_cut() -> None:
    assert turns(29, NAMES, 4, 4) == [("audio", 4, 4), ("video", 4, 4), ("audio", 4, 4), ("video", 4, 1)]
    assert turns(26, NAMES, 4, 4)[-1] == ("video", 2, 0)
    assert turns(5, ("a", "b", "c"), 1, 0) == [(m, 1, 0) for m in ("a", "b", "c", "a", "b")]


@pytest.mark.parametrize("modalities", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("phases", [(4, 4), (1, 1), (3, 0), (1, 6)])
def test_a_short_run_gives_everybody_a_turn(modalities: tuple[str, ...], phases: tuple[int, int]) -> None:
    for epochs in range(1, 60):
        config = ReconBoostConfig(phase1_epochs=phases[0], phase2_epochs=phases[1])
        method = ReconBoost(config, Setting(modalities, 3, epochs, 0), SingleComm())
        stages = method.stages()
        assert sum(stage.epochs for stage in stages) == epochs
        assert all(stage.fresh_optimizer and not stage.aside for stage in stages)
        boosts = [stage.name for stage in stages if stage.name.startswith("boost")]
        expected = [f"boost {m}" for m in modalities] if epochs >= len(modalities) else []
        assert boosts[: len(modalities)] == expected


def test_turns_of_a_short_run_are_as_even_as_epochs_allow() -> None:
    assert turns(10, NAMES, 4, 4) == [("audio", 2, 3), ("video", 2, 3)]
    assert turns(3, NAMES, 4, 4) == [("audio", 1, 0), ("video", 1, 1)]
    assert turns(1, NAMES, 4, 4) == []


# --- the method


def make(modalities: tuple[str, ...] = NAMES, epochs: int = 32, **config: Any) -> tuple[ReconBoost, MultimodalNet]:
    """ReconBoost over encoders with batch normalisation."""
    method = ReconBoost(ReconBoostConfig(**({"hidden": 6} | config)), Setting(modalities, 3, epochs, 0), SingleComm())
    torch.manual_seed(3)
    encoders = {m: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for m in modalities}
    return method, MultimodalNet(encoders, method.head(dict.fromkeys(modalities, 4)))


def batch_of(modalities: tuple[str, ...]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    values = {m: torch.randn(8, 3, generator=rng) for m in modalities}
    return values | {"label": torch.randint(3, (8,), generator=rng)}


def train(method: ReconBoost, net: MultimodalNet, epoch: int) -> dict[str, Tensor]:
    """The losses of one batch of an epoch; gradients stay in the network."""
    plan = epoch_plan(method.stages())
    stage, number = plan[epoch - 1]
    history = [EpochStats(e, SplitStats(1, {}, {}, {}), None, s.name) for e, (s, _) in enumerate(plan, 1) if e < epoch]
    method.begin_epoch(net, EpochContext(epoch, stage, number, history, lambda *_: iter(())))
    net.zero_grad(set_to_none=True)
    net.train()
    batch = batch_of(method.modalities)
    step = Step(epoch, 0, 0, "joint", 8, 1.0, torch.Generator(), stage=stage, stage_epoch=number)
    out = method.forward(net, batch, step)
    losses = method.losses(out, batch, step)
    method.backward(net, losses, step)
    return losses


def moved(net: MultimodalNet) -> set[str]:
    return {name for name in net.modalities if any(p.grad is not None for p in net.encoders[name].parameters())}


def ensemble(net: MultimodalNet) -> EnsembleHead:
    assert isinstance(net.head, EnsembleHead)
    return net.head


def test_one_net_learns_while_those_of_the_others_keep_still() -> None:
    method, net = make()
    before = {name: value.clone() for name, value in net.encoders["audio"].named_buffers()}
    train(method, net, 9)
    assert moved(net) == {"video"} and ensemble(net).scale.grad is None
    assert all(p.grad is not None for p in ensemble(net).layers.parameters())
    assert all(value.equal(before[name]) for name, value in net.encoders["audio"].named_buffers())
    assert net.encoders["audio"].training


def test_all_who_had_a_turn_are_trained_together_and_so_is_their_scale() -> None:
    method, net = make()
    assert set(train(method, net, 13)) == {"fused"}
    assert moved(net) == {"audio", "video"} and ensemble(net).scale.grad is not None


def test_a_modality_joins_the_ensemble_with_its_first_turn() -> None:
    method, net = make(("a", "b", "c"), 48)
    for epoch, members in ((1, ("a",)), (8, ("a",)), (9, ("a", "b")), (17, ("a", "b", "c")), (25, ("a", "b", "c"))):
        train(method, net, epoch)
        assert ensemble(net).members == members
        assert set(method.modalities) >= set(members) >= moved(net)
        out = method.predict(net, batch_of(method.modalities))
        expected = torch.stack([out.unimodal[m] for m in members]).sum(dim=0)
        torch.testing.assert_close(method.fuse(net, out), expected)
    _, other = make(("a", "b", "c"), 48)
    other.head.restore({"members": ["b"]})
    assert other.head.architecture() == {"members": ["b"]}


def test_losses_of_a_turn_are_the_formula() -> None:
    method, net = make()
    train(method, net, 8)
    losses = train(method, net, 9)
    batch = batch_of(NAMES)
    net.encoders["audio"].eval()
    with torch.no_grad():
        out = net(batch)
    boost = boosting_loss(out.unimodal["video"], out.unimodal["audio"], batch["label"], 1, 0.2)
    torch.testing.assert_close(losses["boost"].detach(), boost)
    term = 0.5 * consolidation_loss(out.unimodal["video"], out.unimodal["audio"])
    torch.testing.assert_close(losses["consolidation"].detach(), term)


def test_consolidation_is_towards_the_modality_that_had_the_turn_before() -> None:
    method, net = make(("a", "b", "c"), 48)
    assert "consolidation" not in train(method, net, 1)
    for epoch, before in ((9, "a"), (17, "b"), (25, "c")):
        losses = train(method, net, epoch)
        name = method.stages()[2 * ((epoch - 1) // 8)].name.removeprefix("boost ")
        batch = batch_of(method.modalities)
        with torch.no_grad():
            net.eval()
            teacher = net(batch, [before]).unimodal[before]
            net.train()
            student = net(batch, [name]).unimodal[name]
        torch.testing.assert_close(losses["consolidation"].detach(), 0.5 * consolidation_loss(student, teacher))


def test_released_consolidation_adds_a_number_and_trains_nothing() -> None:
    found = {}
    for form in ("trained", "detached", "none"):
        method, net = make(consolidation=form)
        losses = train(method, net, 9)
        gradient = net.encoders["video"][0].weight.grad  # type: ignore[index]
        found[form] = (losses, gradient)
    assert found["trained"][0]["consolidation"].equal(found["detached"][0]["consolidation"])
    assert "consolidation" not in found["none"][0]
    assert found["detached"][1].equal(found["none"][1]) and not found["trained"][1].equal(found["none"][1])


def test_released_reduction_is_one_over_the_number_of_classes() -> None:
    first, second = (train(*make(reduction=form), 9)["boost"] for form in ("sum", "released"))
    torch.testing.assert_close(first / 3, second)


def test_a_factor_below_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"w2 is 2\.0, w1 1\.0"):
        ReconBoostConfig(w1=1, w2=2)


def test_parts_are_the_shared_heads_logits() -> None:
    method, net = make()
    assert method.probe
    out = method.predict(net, batch_of(NAMES))
    assert {name: z.equal(out.unimodal[name.split("/")[0]]) for name, z in method.parts(net, out).items()} == {
        "audio/shared_head": True,
        "video/shared_head": True,
    }
