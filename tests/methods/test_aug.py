"""AUG against numbers worked out by hand, and properties of its head."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.config import Optim
from counterpoise.contracts import ConfigError, Decision, EpochStats, SplitStats, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.optim import build_optimizer
from counterpoise.functional import soft_cross_entropy, true_class_scores
from counterpoise.methods.aug import (
    AUG,
    AUGConfig,
    assignment,
    boosting_losses,
    check_epochs,
    confidence_state,
    residual_label,
)
from counterpoise.methods.base import Setting
from counterpoise.models.heads import BoostedHead, WeightNetwork, cumulative_logits
from counterpoise.models.network import MultimodalNet

PREVIOUS, NEW, THIRD = [2.0, 1.0, 0.0], [0.5, 0.0, -0.5], [0.3, -0.1, 0.2]
LABELS = torch.tensor([0])


def stack_of(*classifiers: list[float]) -> Tensor:
    """One sample's logits of several classifiers [1, n, K]."""
    return torch.tensor([classifiers])


# --- the loss


@pytest.mark.parametrize(
    ("lam", "target", "residual", "total"),
    [(0.2, 0.866952, 0.589761, 1.238678), (0.5, 0.667379, 0.453998, 1.102915), (1.0, 0.334759, 0.227726, 0.876644)],
)
def test_second_classifier_learns_what_the_first_left_over(
    lam: float, target: float, residual: float, total: float
) -> None:
    """p(first) = (0.665241, 0.244728, 0.090031), CE(new, y) = 0.680270, CE(both, y) = 0.241311."""
    stack = stack_of(PREVIOUS, NEW)
    assert residual_label(stack, 1.0, LABELS, lam, "cumulative").item() == pytest.approx(target, abs=1e-6)
    losses = boosting_losses(stack, 1.0, LABELS, lam=lam)
    assert {name: round(value.item(), 6) for name, value in losses.items()} == pytest.approx(
        {"residual": residual, "all": 0.241311, "previous": 0.407606}, abs=1.1e-6
    )
    assert sum(losses.values()).item() == pytest.approx(total, abs=2e-6)


@pytest.mark.parametrize(
    ("lam", "gradient"), [(0.2, (-0.427858, 0.266324, 0.161534)), (0.5, (-0.329365, 0.205016, 0.124349))]
)
def test_gradient_of_the_residual_term_is_a_smaller_one_in_the_same_direction(
    lam: float, gradient: tuple[float, ...]
) -> None:
    new = torch.tensor(NEW, requires_grad=True)
    stack = torch.stack([torch.tensor(PREVIOUS), new]).unsqueeze(0)
    boosting_losses(stack, 1.0, LABELS, lam=lam, terms=("residual",))["residual"].backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("form", "target", "residual"), [("cumulative", 0.607201, 0.574358), ("sum_of_probabilities", 0.414139, 0.391739)]
)
def test_third_classifier_in_both_forms(form: str, target: float, residual: float) -> None:
    stack = stack_of(PREVIOUS, NEW, THIRD)
    assert residual_label(stack, 1.0, LABELS, 0.5, form).item() == pytest.approx(target, abs=1e-6)
    found = boosting_losses(stack, 1.0, LABELS, lam=0.5, residual=form)
    assert found["residual"].item() == pytest.approx(residual, abs=1e-6)


def test_paper_form_is_clamped_where_three_sure_classifiers_would_make_it_negative() -> None:
    """p_y = 0.8, 0.9, 0.95: 1 - lam * 2.65 is 0.47, 0.1255, -0.325 and -1.65."""
    sure = [[math.log(p), math.log((1 - p) / 2), math.log((1 - p) / 2)] for p in (0.8, 0.9, 0.95)]
    stack = stack_of(*sure, NEW)
    found = [residual_label(stack, 1.0, LABELS, lam, "sum_of_probabilities").item() for lam in (0.2, 0.33, 0.5, 1.0)]
    assert found == pytest.approx([0.47, 0.1255, 0.0, 0.0], abs=1e-6)


@given(
    seed=st.integers(0, 10**6),
    lam=st.floats(0, 1),
    classifiers=st.integers(2, 5),
    weight=st.floats(0.1, 1),
    scale=st.floats(0.1, 20),
)
def test_residual_term_is_a_weighted_cross_entropy(
    seed: int, lam: float, classifiers: int, weight: float, scale: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    stack = scale * torch.randn(6, classifiers, 4, generator=rng)
    labels = torch.randint(4, (6,), generator=rng)
    target = residual_label(stack, weight, labels, lam, "cumulative")
    assert (target >= 1 - lam - 1e-6).all() and (target <= 1).all()
    before = cumulative_logits(stack, weight, classifiers - 1)
    plain = F.cross_entropy(weight * stack[:, -1], labels, reduction="none")
    identity = ((1 - lam * true_class_scores(before, labels)) * plain).mean()
    printed = soft_cross_entropy(weight * stack[:, -1], F.one_hot(labels, 4) * target.unsqueeze(1)).mean()
    found = boosting_losses(stack, weight, labels, lam=lam)
    for expected in (identity, printed):
        torch.testing.assert_close(found["residual"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["previous"], F.cross_entropy(before, labels), atol=1e-6, rtol=1e-5)
    everything = F.cross_entropy(cumulative_logits(stack, weight), labels)
    torch.testing.assert_close(found["all"], everything, atol=1e-6, rtol=1e-5)


def test_target_of_the_residual_has_no_gradient() -> None:
    stack = torch.randn(5, 3, 4, requires_grad=True)
    labels = torch.randint(4, (5,))
    boosting_losses(stack, 1.0, labels, lam=0.7, terms=("residual",))["residual"].backward()
    assert stack.grad is not None
    assert (stack.grad[:, :-1] == 0).all() and (stack.grad[:, -1] != 0).any()


def test_one_classifier_has_the_plain_cross_entropy() -> None:
    stack, labels = torch.randn(7, 1, 3), torch.randint(3, (7,))
    losses = boosting_losses(stack, 0.5, labels, lam=0.5)
    assert list(losses) == ["first"]
    assert losses["first"].equal(F.cross_entropy(stack[:, 0], labels))


OBJECTIVES = [c for n in (1, 2, 3) for c in itertools.combinations(("residual", "all", "previous"), n)]


@pytest.mark.parametrize("chosen", OBJECTIVES, ids="+".join)
def test_objectives_are_switched_one_by_one(chosen: tuple[str, ...]) -> None:
    config = AUGConfig(objectives={name: name in chosen for name in ("residual", "all", "previous")})  # type: ignore[arg-type]
    assert config.objectives.terms == chosen
    stack, labels = torch.randn(4, 2, 3), torch.randint(3, (4,))
    everything = boosting_losses(stack, 1.0, labels, lam=0.5)
    some = boosting_losses(stack, 1.0, labels, lam=0.5, terms=chosen)
    assert list(some) == list(chosen)
    for name in chosen:
        torch.testing.assert_close(some[name], everything[name])


def test_no_objective_at_all_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one of residual, all, previous"):
        AUGConfig(objectives={"residual": False, "all": False, "previous": False})  # type: ignore[arg-type]


# --- assignment


def test_two_modalities_strengthen_the_weak_one() -> None:
    """p_y of audio .9 .8 .7 .6, of video .5 .4 .3 .4: ratio 3.0 / 1.6 = 1.875, mean difference 0.35."""
    scores = {"audio": sum((0.9, 0.8, 0.7, 0.6)), "video": sum((0.5, 0.4, 0.3, 0.4))}
    assert (scores["audio"] - scores["video"]) / 4 == pytest.approx(0.35)
    add, ratios = assignment(scores, 1.0, 0.01, "weakest_only")
    assert add == ("video",) and ratios["audio"] == pytest.approx(1.875)
    swapped, _ = assignment({"audio": scores["video"], "video": scores["audio"]}, 1.0, 0.01, "weakest_only")
    assert swapped == ("audio",)


@pytest.mark.parametrize("ratio", [0.991, 1.0, 1.009])
def test_ratios_in_the_dead_zone_change_nothing(ratio: float) -> None:
    assert assignment({"audio": ratio, "video": 1.0}, 1.0, 0.01, "weakest_only")[0] == ()


@pytest.mark.parametrize(("ratio", "weak"), [(1.02, ("video",)), (0.98, ("audio",))])
def test_ratios_beyond_the_dead_zone_do(ratio: float, weak: tuple[str, ...]) -> None:
    assert assignment({"audio": ratio, "video": 1.0}, 1.0, 0.01, "weakest_only")[0] == weak


def test_of_three_modalities_all_below_their_share_are_strengthened() -> None:
    """S = (6, 3, 2): shares 1.2, 0.375, 0.2222 of the others; below 0.4 is a ratio below 0.8."""
    add, ratios = assignment({"rgb": 6, "flow": 3, "depth": 2}, 0.8, 0.0, "all_below")
    assert add == ("flow", "depth")
    assert [ratio / 2 for ratio in ratios.values()] == pytest.approx([1.2, 0.375, 0.2222], abs=1e-4)
    assert assignment({"rgb": 6, "flow": 3, "depth": 2}, 0.8, 0.0, "weakest_only")[0] == ("depth",)
    level, ratios = assignment({"rgb": 1, "flow": 1, "depth": 1}, 0.8, 0.0, "all_below")
    assert level == () and list(ratios.values()) == [1, 1, 1]


def test_checks_fall_on_the_first_epoch_and_every_tenth_of_the_run_but_never_on_the_last() -> None:
    assert check_epochs(200, 20) == [1, 20, 40, 60, 80, 100, 120, 140, 160, 180]
    assert check_epochs(100, 10) == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert check_epochs(1, 1) == [] and check_epochs(2, 5) == [1]


def make_aug(epochs: int = 20, modalities: tuple[str, ...] = ("audio", "video"), **config: Any) -> AUG:
    return AUG(AUGConfig(**config), Setting(modalities, 3, epochs, 0), SingleComm())


def epoch_stats(epoch: int, **scores: float) -> EpochStats:
    return EpochStats(epoch, SplitStats(10, {}, {}, scores), None)


def test_decision_carries_the_numbers_that_led_to_it() -> None:
    decision = make_aug().decide([epoch_stats(1, audio=6, video=3)])
    assert decision is not None
    assert decision.add == ("video",) and decision.epoch == 1
    assert decision.inputs["scores"] == {"audio": 0.6, "video": 0.3}
    assert decision.inputs["ratios"] == {"audio": 2, "video": 0.5}
    assert decision.inputs["sigma"] == 1.0 and decision.inputs["tau"] == 0.01
    assert Decision.from_json(decision.to_json()) == decision


def test_epochs_between_checks_have_no_decision() -> None:
    assert make_aug().decide([epoch_stats(3, audio=6, video=3)]) is None
    assert make_aug(assign="fixed").decide([epoch_stats(1, audio=6, video=3)]) is None
    assert make_aug(modalities=("audio",)).decide([epoch_stats(1, audio=6)]) is None


def test_defaults_follow_the_number_of_modalities() -> None:
    two, three = make_aug(), make_aug(modalities=("rgb", "flow", "depth"))
    assert (two.sigma, two.tau, two.policy, two.every) == (1.0, 0.01, "weakest_only", 2)
    assert (three.sigma, three.tau, three.policy) == (0.8, 0.0, "all_below")


@pytest.mark.parametrize("field", ["classifiers", "fusion_weights"])
def test_settings_for_a_modality_that_is_not_there_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{field} names visual; modalities: audio, video"):
        make_aug(**{field: {"visual": 1}})


def test_a_modality_without_a_classifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one classifier"):
        make_aug(classifiers={"audio": 0})


# --- learned weights


def test_state_of_the_weight_network_mixes_batch_and_epoch() -> None:
    """Batch sums 3 then 4 against 2 then 1: q = 3/2, then (4/2 + 7/2) / (1/2 + 3/2) = 2.75."""
    state, target = confidence_state([3, 2], [3, 2], 0)
    assert state == pytest.approx([1.5, 2 / 3]) and target == [0, 1]
    state, target = confidence_state([4, 1], [7, 3], 1)
    assert state == pytest.approx([2.75, 1 / 2.75]) and target == [0, 1]
    assert confidence_state([1, 2], [1, 2], 0)[1] == [1, 0]


def test_state_of_three_modalities_is_a_share() -> None:
    state, target = confidence_state([6, 3, 2], [6, 3, 2], 0)
    assert state == pytest.approx([1.2, 0.375, 2 / 9]) and target == [0, 1, 1]


def test_weight_loss_is_the_squared_distance_from_who_is_weak() -> None:
    aug = make_aug(weights="learned")
    aug._batch_scores = {"audio": torch.tensor(3.0), "video": torch.tensor(2.0)}
    assert aug._weight_loss(torch.tensor([0.5, 0.5])).item() == pytest.approx(0.25)


def test_weight_network_has_the_released_size_and_range() -> None:
    network = WeightNetwork()
    assert sum(p.numel() for p in network.parameters()) == 33_921
    weights = network(torch.tensor([0.0, 1.5, 100.0]))
    assert weights.shape == (3,) and ((weights >= 0) & (weights <= 1)).all()


def test_only_the_weight_loss_trains_the_weight_network() -> None:
    aug, net = aug_and_net(weights="learned", classifiers={"audio": 2, "video": 2})
    batch = make_batch()
    for phase in ("audio", "video"):
        step_through(aug, net, batch, phase)
    head = boosted(net)
    assert head.weigher is not None
    assert all(p.grad is None for p in head.weigher.parameters())
    net.zero_grad(set_to_none=True)
    step_through(aug, net, batch, "weights")
    assert all(p.grad is not None for p in head.weigher.parameters())
    assert all(p.grad is None for name, p in net.named_parameters() if "weigher" not in name)
    (group, parameters), *_ = aug.lr_groups(net).items()
    assert aug.lr_scales()[group] == 0.1 and set(parameters) == set(head.weigher.parameters())


# --- the head


def boosted(net: MultimodalNet) -> BoostedHead:
    assert isinstance(net.head, BoostedHead)
    return net.head


def make_head(**changes: Any) -> BoostedHead:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden": 6,
        "initial": {"audio": 1, "video": 1},
        "capacity": {"audio": 4, "video": 4},
        "fusion_weights": {"audio": 0.5, "video": 0.5},
    }
    return BoostedHead({"audio": 5, "video": 7}, 3, **(settings | changes))


def features(rows: int = 4) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"audio": torch.randn(rows, 5, generator=rng), "video": torch.randn(rows, 7, generator=rng)}


def aug_and_net(**config: Any) -> tuple[AUG, MultimodalNet]:
    """AUG over linear encoders of two modalities of three numbers."""
    aug = make_aug(**({"hidden": 6} | config))
    torch.manual_seed(3)
    net = MultimodalNet({m: nn.Linear(3, 4) for m in ("audio", "video")}, aug.head({"audio": 4, "video": 4}))
    return aug, net


def make_batch(rows: int = 8) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    values = {m: torch.randn(rows, 3, generator=rng) for m in ("audio", "video")}
    return values | {"label": torch.randint(3, (rows,), generator=rng)}


def step_through(aug: AUG, net: MultimodalNet, batch: dict[str, Tensor], phase: str) -> dict[str, Tensor]:
    step = Step(1, 0, 0, phase, len(batch["label"]), 1.0, torch.Generator())
    losses = aug.losses(aug.forward(net, batch, step), batch, step)
    aug.backward(net, losses, step)
    return losses


def train_step(aug: AUG, net: MultimodalNet, optimizer: torch.optim.Optimizer, phases: tuple[str, ...]) -> None:
    for phase in phases:
        optimizer.zero_grad(set_to_none=True)
        step_through(aug, net, make_batch(), phase)
        optimizer.step()


def test_one_product_equals_a_loop_over_classifiers() -> None:
    head = make_head(initial={"audio": 3, "video": 2}, weight=0.75)
    inputs = features()
    out = head(inputs)
    for name, count in (("audio", 3), ("video", 2)):
        layers = zip(head.layer1_weight[name], head.layer1_bias[name], strict=True)  # type: ignore[arg-type]
        one_by_one = [head.layer2(torch.relu(F.linear(inputs[name], w, b))) for w, b in layers][:count]
        torch.testing.assert_close(out.stacks[name], torch.stack(one_by_one, dim=1))
        expected = one_by_one[0] + 0.75 * sum(one_by_one[1:])
        torch.testing.assert_close(out.unimodal[name], expected)


def test_prediction_weighs_modalities() -> None:
    """Z_a = (1, 0, 0), Z_v = (0, 2, 0), alpha .4 and .6: z = (0.4, 1.2, 0)."""
    head = make_head(fusion_weights={"audio": 0.4, "video": 0.6})
    merged = head.fuse({"audio": torch.tensor([[1.0, 0, 0]]), "video": torch.tensor([[0, 2.0, 0]])})
    torch.testing.assert_close(merged, torch.tensor([[0.4, 1.2, 0.0]]))
    inputs = features()
    out = head(inputs)
    assert out.fused is not None
    torch.testing.assert_close(out.fused, 0.4 * out.unimodal["audio"] + 0.6 * out.unimodal["video"])
    assert head({"audio": inputs["audio"]}).fused is None


def test_a_classifier_has_the_published_size() -> None:
    """512 * 256 + 256 of its own; Layer2 is one for all."""
    head = BoostedHead(
        {"audio": 512},
        6,
        hidden=256,
        initial={"audio": 1},
        capacity={"audio": 2},
        fusion_weights={"audio": 1},
    )
    assert sum(p[1].numel() for p in (head.layer1_weight["audio"], head.layer1_bias["audio"])) == 131_328
    assert head.layer2.weight.shape == (6, 256)


def test_more_room_changes_no_classifier() -> None:
    small, large = make_head(), make_head(capacity={"audio": 9, "video": 4})
    inputs = features()
    for _ in range(2):
        assert small(inputs).unimodal["audio"].equal(large(inputs).unimodal["audio"])
        small.grow("audio")
        large.grow("audio")


def test_a_new_classifier_is_trained_from_its_first_step() -> None:
    aug, net = aug_and_net()
    optimizer = build_optimizer(Optim(lr=0.1), net, {})
    aug.apply(net, Decision(1, "assign_classifier", ("video",)))
    assert aug.num_classifiers(net) == {"audio": 1, "video": 2}
    head = boosted(net)
    new = head.layer1_weight["video"][1]  # type: ignore[index]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(new) in held
    before = new.detach().clone()
    train_step(aug, net, optimizer, ("audio", "video"))
    assert not new.equal(before)


def test_frozen_new_classifiers_stay_while_the_shared_layer_learns() -> None:
    aug, net = aug_and_net(train_new_classifiers=False)
    optimizer = build_optimizer(Optim(lr=0.1), net, {})
    aug.apply(net, Decision(1, "assign_classifier", ("video",)))
    head = boosted(net)
    new, first = (head.layer1_weight["video"][i] for i in (1, 0))  # type: ignore[index]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(new) not in held
    before = [p.detach().clone() for p in (new, first, head.layer2.weight)]
    train_step(aug, net, optimizer, ("audio", "video"))
    assert new.equal(before[0])
    assert not first.equal(before[1]) and not head.layer2.weight.equal(before[2])


def test_a_classifier_that_starts_at_zero_adds_only_the_shared_bias() -> None:
    head = make_head(new_classifiers="zero")
    nn.init.normal_(head.layer2.bias)
    inputs = features()
    before = head(inputs).unimodal["video"]
    head.grow("video")
    torch.testing.assert_close(head(inputs).unimodal["video"], before + head.layer2.bias)
    assert (head.layer1_weight["video"][1] == 0).all()  # type: ignore[index]


def test_a_classifier_that_starts_at_zero_can_still_learn() -> None:
    """With relu'(0) = 0 it would stay at zero for good."""
    aug, net = aug_and_net(new_classifiers="zero")
    optimizer = build_optimizer(Optim(lr=0.1, weight_decay=0), net, {})
    aug.apply(net, Decision(1, "assign_classifier", ("video",)))
    for _ in range(3):
        train_step(aug, net, optimizer, ("audio", "video"))
    assert (boosted(net).layer1_weight["video"][1] != 0).any()  # type: ignore[index]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_classifiers_that_are_not_yet_there_are_not_touched(optimizer: str) -> None:
    aug, net = aug_and_net()
    made = build_optimizer(Optim(name=optimizer, lr=0.1, weight_decay=0.1), net, {})  # type: ignore[arg-type]
    head = boosted(net)
    waiting = [p for m in ("audio", "video") for p in [*head.layer1_weight[m]][1:]]  # type: ignore[misc]
    before = [p.detach().clone() for p in waiting]
    for _ in range(3):
        train_step(aug, net, made, ("audio", "video"))
    assert all(p.grad is None for p in waiting)
    assert all(p.equal(old) for p, old in zip(waiting, before, strict=True))
    assert not any(p in made.state for p in waiting)


def test_a_modalitys_step_leaves_the_others_encoder_alone() -> None:
    aug, net = aug_and_net()
    made = build_optimizer(Optim(lr=0.1), net, {})
    before = {name: p.detach().clone() for name, p in net.encoders.named_parameters()}
    train_step(aug, net, made, ("audio",))
    changed = {name for name, p in net.encoders.named_parameters() if not p.equal(before[name])}
    assert changed == {"audio.weight", "audio.bias"}


def test_fixed_classifiers_are_there_from_the_start() -> None:
    aug, net = aug_and_net(assign="fixed", classifiers={"video": 5})
    assert aug.num_classifiers(net) == {"audio": 1, "video": 5}
    assert boosted(net).capacity("video") == 5 and boosted(net).capacity("audio") == 1
    assert net(make_batch()).stacks["video"].shape == (8, 5, 3)


def test_fixed_weight_scales_every_classifier_but_the_first() -> None:
    _, net = aug_and_net(assign="fixed", classifiers={"video": 3}, weights="fixed", weight=0.25)
    out = net(make_batch())
    stack = out.stacks["video"]
    torch.testing.assert_close(out.unimodal["video"], stack[:, 0] + 0.25 * (stack[:, 1] + stack[:, 2]))


@pytest.mark.parametrize("weights", ["fixed", "learned"])
def test_weights_that_are_reported_are_those_of_the_prediction(weights: str) -> None:
    aug, net = aug_and_net(assign="fixed", classifiers={"audio": 2, "video": 4}, weights=weights, weight=0.25)
    boosted(net).confidence.copy_(torch.tensor([0.4, 2.5]))
    reported = aug.classifier_weights(net)
    assert {name: len(values) for name, values in reported.items()} == aug.num_classifiers(net)
    out = net(make_batch())
    for name, values in reported.items():
        rebuilt = (out.stacks[name] * torch.tensor(values).view(1, -1, 1)).sum(dim=1)
        torch.testing.assert_close(out.unimodal[name], rebuilt)
    assert reported["audio"][0] == reported["video"][0] == 1.0
    assert weights == "learned" or reported["video"] == [1.0, 0.25, 0.25, 0.25]


def test_classifiers_that_all_weigh_1_have_no_weights_to_report() -> None:
    aug, net = aug_and_net(assign="fixed", classifiers={"video": 3})
    assert aug.classifier_weights(net) == {}
