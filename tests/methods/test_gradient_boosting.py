"""Gradient boosting against numbers worked out by hand, and what must not move while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.conftest import Done
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.config import Optim
from counterpoise.contracts import (
    LABEL,
    Batch,
    ConfigError,
    Decision,
    EpochContext,
    EpochStats,
    SplitStats,
    Stage,
    Step,
)
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.optim import build_optimizer
from counterpoise.methods.base import Setting
from counterpoise.methods.gradient_boosting import (
    GRID,
    GradientBoosting,
    GradientBoostingConfig,
    StagewiseHead,
    fit_loss,
    line_losses,
    plan,
    residuals,
)
from counterpoise.models.network import MultimodalNet

BEFORE, LABELS = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
NAMES = ("audio", "video")


def test_residuals_are_the_negative_gradient_of_the_cross_entropy() -> None:
    found = residuals(BEFORE, LABELS)
    torch.testing.assert_close(found, torch.tensor([[0.334759, -0.244728, -0.090031]]), atol=1e-6, rtol=0)
    assert found.sum().item() == pytest.approx(0, abs=1e-6)
    logits = BEFORE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), logits)
    torch.testing.assert_close(found, -gradient)


def test_a_step_along_the_residuals_lowers_the_cross_entropy() -> None:
    after = BEFORE + residuals(BEFORE, LABELS)
    torch.testing.assert_close(after, torch.tensor([[2.334759, 0.755272, -0.090031]]), atol=1e-6, rtol=0)
    assert F.cross_entropy(BEFORE, LABELS).item() == pytest.approx(0.407606, abs=1e-6)
    assert F.cross_entropy(after, LABELS).item() == pytest.approx(0.258184, abs=1e-6)


def test_least_squares_vanish_at_the_residuals_and_count_every_class() -> None:
    """At h = 0: .334759^2 + .244728^2 + .090031^2 = .180061."""
    assert fit_loss(residuals(BEFORE, LABELS), BEFORE, LABELS).item() == 0
    assert fit_loss(torch.zeros(1, 3), BEFORE, LABELS).item() == pytest.approx(0.180061, abs=1e-6)


def test_a_soft_target_weighs_the_cross_entropy_by_what_is_left() -> None:
    """p_y = .665241: (1 - .5 p_y) log 3 at h = 0."""
    found = fit_loss(torch.zeros(1, 3), BEFORE, LABELS, lam=0.5)
    assert found.item() == pytest.approx((1 - 0.5 * 0.665241) * math.log(3), abs=1e-6)
    assert fit_loss(torch.zeros(1, 3), BEFORE, LABELS, lam=0).item() == pytest.approx(math.log(3))


def test_no_gradient_reaches_the_earlier_classifiers() -> None:
    before, newest = BEFORE.clone().requires_grad_(), torch.zeros(1, 3, requires_grad=True)
    for lam in (None, 0.5):
        fit_loss(newest, before, LABELS, lam).backward()
    assert before.grad is None and newest.grad is not None


def test_a_line_search_tries_every_step_of_the_grid() -> None:
    found = line_losses(BEFORE, residuals(BEFORE, LABELS), LABELS, (0, 1))
    assert found.tolist() == pytest.approx([0.407606, 0.258184], abs=1e-6)
    assert GRID[0] == 0 and 1.0 in GRID and list(GRID) == sorted(GRID)


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (200, (150, 10, 5)),
        (100, (50, 10, 5)),
        (60, (30, 10, 3)),
        (20, (10, 10, 1)),
        (7, (4, 3, 1)),
        (2, (1, 1, 1)),
        (3, (2, 1, 1)),
    ],
)
def test_boosting_gets_half_of_the_epochs_at_most(epochs: int, expected: tuple[int, int, int]) -> None:
    assert plan(epochs, 10, 5) == expected
    naive, rounds, each = expected
    assert naive + rounds * each == epochs and naive >= rounds * each >= 1


def make(modalities: tuple[str, ...] = NAMES, epochs: int = 8, **config: Any) -> tuple[GradientBoosting, MultimodalNet]:
    settings = {"hidden": 6, "rounds": 2, "round_epochs": 2} | config
    method = GradientBoosting(GradientBoostingConfig(**settings), Setting(modalities, 3, epochs, 0), SingleComm())
    torch.manual_seed(0)
    encoders = {m: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for m in modalities}
    return method, MultimodalNet(encoders, method.head(dict.fromkeys(modalities, 4)))


def make_batch(rows: int = 16) -> Batch:
    rng = torch.Generator().manual_seed(2)
    values = {m: torch.randn(rows, 3, generator=rng) for m in (*NAMES, "third")}
    return values | {LABEL: torch.randint(3, (rows,), generator=rng)}


def head_of(net: MultimodalNet) -> StagewiseHead:
    assert isinstance(net.head, StagewiseHead)
    return net.head


def stats(epoch: int, **correct: int) -> EpochStats:
    return EpochStats(epoch, SplitStats(10, {}, dict.fromkeys(correct, 0), {}), SplitStats(10, {}, correct, {}))


def context(method: GradientBoosting, epoch: int) -> EpochContext:
    places = [(stage, number) for stage in method.stages() for number in range(1, stage.epochs + 1)]

    def read(split: str, fraction: float) -> Iterator[Batch]:
        assert (split, fraction) == ("train", 1)
        yield make_batch(10)
        yield {name: value[10:] for name, value in make_batch().items()}

    return EpochContext(epoch, *places[epoch - 1], [], read)


def boost(method: GradientBoosting, net: MultimodalNet, steps: int = 3, until: int = 99, **optim: Any) -> None:
    """The epochs after naive training, with a few steps each, as the loop would make them."""
    decision = method.decide([stats(method.naive_epochs, fused=9, audio=7, video=3, third=5)])
    assert decision is not None
    method.apply(net, Decision.from_json(decision.to_json()))
    for epoch in range(method.naive_epochs + 1, min(method.setting.epochs, until) + 1):
        where = context(method, epoch)
        if where.stage_epoch == 1:
            optimizer = build_optimizer(Optim(**({"lr": 0.1} | optim)), net, {})
        method.begin_epoch(net, where)
        net.train()
        for _ in range(steps):
            step = Step(epoch, 0, 0, "joint", 16, 1.0, torch.Generator(), stage=where.stage)
            optimizer.zero_grad(set_to_none=not optim.get("legacy_zero_grad_step", False))
            batch = make_batch()
            method.backward(net, method.losses(method.forward(net, batch, step), batch, step), step)
            optimizer.step()
        method.before_evaluation(net, where)
        method.end_epoch(net, where)


def test_stages_are_naive_training_and_then_one_per_classifier() -> None:
    method, _ = make()
    naive, *rounds = method.stages()
    assert naive == Stage("naive", 4, selectable=False)
    assert [r.name for r in rounds] == ["boost 1", "boost 2"]
    assert all(r.fresh_optimizer and r.own_schedule and r.begin == "last" and r.selectable for r in rounds)
    naive, first, second = make(start="best")[0].stages()
    assert naive.selectable and (first.begin, second.begin) == ("best", "last")
    with pytest.raises(ConfigError, match="needs 2 epochs or more"):
        make(epochs=1)


def test_the_modality_that_is_weakest_on_held_out_data_is_boosted() -> None:
    method, _ = make((*NAMES, "third"))
    last = stats(4, fused=9, audio=7, video=3, third=5)
    decision = method.decide([stats(3, audio=1, video=3, third=5), last])
    assert decision is not None and (decision.action, decision.add) == ("boost", ("video",))
    assert decision.inputs["accuracy"] == {"audio": 0.7, "video": 0.3, "third": 0.5}
    assert method.decide([stats(3, audio=1, video=3, third=5)]) is None
    named, _ = make((*NAMES, "third"), boost=("third", "audio"))
    decision = named.decide([last])
    assert decision is not None and decision.add == ("third", "audio")
    with pytest.raises(ConfigError, match=r"method.boost names visual; modalities: audio, video"):
        make(boost=("visual",))


@pytest.mark.parametrize("settings", [{}, {"legacy_zero_grad_step": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("config", [{}, {"soft_ce": True}, {"line_search": True}])
def test_boosting_moves_nothing_but_the_new_classifiers_of_its_modality(config: Any, settings: Any) -> None:
    method, net = make((*NAMES, "third"), **config)
    batch = make_batch()
    if settings:  # gradients and momentum of naive training are still there
        method.losses(net(batch), batch, Step(1, 0, 0, "joint", 16, 1.0, torch.Generator(), stage=Stage("naive", 4)))[
            "fused"
        ].backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    logits = net.eval()(batch).unimodal
    boost(method, net, **settings)
    after = net.eval()(batch).unimodal
    assert all(after[m].equal(logits[m]) for m in ("audio", "third")) and not after["video"].equal(logits["video"])
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    expected = {
        f"head.boosters.video.{t}.{layer}" for t in (0, 1) for layer in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert changed - {"head.steps"} == expected
    assert method.num_classifiers(net) == {"audio": 1, "video": 3, "third": 1}


def test_a_round_leaves_the_classifiers_before_it_alone() -> None:
    found = []
    for until in (6, 8):  # the ends of the rounds
        method, net = make()
        boost(method, net, until=until)
        found.append([booster.state_dict() for booster in head_of(net).boosters["video"]])  # type: ignore[union-attr]
    assert all(value.equal(found[1][0][name]) for name, value in found[0][0].items())
    assert not found[0][1]["0.weight"].equal(found[1][1]["0.weight"])


def test_the_prediction_is_the_naive_one_plus_the_weighted_new_classifiers() -> None:
    method, net = make(line_search=True)
    head, u = head_of(net), torch.randn(5, 4)
    head.rounds["video"] = 2
    head.steps[1, 1] = 0.5
    assert method.classifier_weights(net) == {"audio": [1.0], "video": [1.0, 1.0, 0.5]}
    assert make()[0].classifier_weights(net) == {}, "without a line search all are 1"
    z = [head.linears["video"](u), *(booster(u) for booster in head.boosters["video"])]  # type: ignore[union-attr]
    out = head({"audio": u, "video": u})
    torch.testing.assert_close(out.unimodal["video"], z[0] + z[1] + 0.5 * z[2])
    torch.testing.assert_close(out.unimodal["audio"], head.linears["audio"](u))
    torch.testing.assert_close(out.fused, out.unimodal["audio"] + out.unimodal["video"])
    assert head({"video": u}).fused is None


def test_boosting_lowers_the_training_loss_of_its_modality() -> None:
    def loss(net: MultimodalNet) -> float:
        return F.cross_entropy(net.eval()(batch).unimodal["video"], batch[LABEL]).item()

    batch = make_batch()
    for config in ({}, {"soft_ce": True}, {"line_search": True}):
        method, net = make(**config)
        before = loss(net)
        boost(method, net, steps=40)
        assert loss(net) < before - 0.05


def test_a_line_search_takes_the_best_step_for_the_training_split_at_the_end_of_each_round() -> None:
    method, net = make(line_search=True, rounds=1, epochs=4)
    boost(method, net, steps=40)
    head, batch = head_of(net), make_batch()
    chosen = head.steps[1, 0].item()
    losses = {}
    for step in GRID:
        head.steps[1, 0] = step
        losses[step] = F.cross_entropy(net.eval()(batch).unimodal["video"], batch[LABEL]).item()
    assert losses[chosen] == pytest.approx(min(losses.values()), abs=1e-6) and chosen != 1
    assert head.steps[0].eq(1).all() and head.steps[1, 1:].eq(1).all()


def test_what_is_boosted_is_remembered() -> None:
    method, net = make()
    method.apply(net, Decision(4, "boost", ("video",)))
    again, other = make()
    again.load_state_dict(method.state_dict())
    other.head.restore(net.head.architecture())
    assert again.boosted == ("video",) and again.num_classifiers(other) == {"audio": 1, "video": 2}


def test_a_run_boosts_the_weak_modality_and_never_tests_a_naive_epoch(finished: Callable[[str], Done]) -> None:
    done = finished("gradient_boosting")
    (decision,) = done.records("decision")
    assert (decision["epoch"], decision["add"]) == (3, ["weak"])
    assert [e["classifiers"]["weak"] for e in done.records("epoch")] == [1, 1, 1, 2, 3, 4]
    assert done.summary["selected_epoch"] > 3
    strong = [e["valid"]["score"]["strong"] for e in done.records("epoch")]
    assert len(set(strong[2:])) == 1, "the strong modality is as naive training left it"


def test_boosting_from_the_best_epoch_starts_with_its_weights(finished: Callable[[str], Done]) -> None:
    done = finished("gradient_boosting-search")
    assert [e["stage"] for e in done.records("epoch")] == ["naive"] * 3 + ["boost 1", "boost 2", "boost 3"]
    steps: Tensor = done.weights["head.steps"]
    assert not steps[:, :3].eq(1).all() and steps[:, 3:].eq(1).all()
