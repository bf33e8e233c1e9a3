"""MAIE (IGM) against numbers worked out by hand, SAM against one written out, and P against its definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import ConfigError, EpochContext, EpochStats, SplitStats, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.functional import soft_cross_entropy
from counterpoise.methods.base import Setting
from counterpoise.methods.maie import (
    MAIE,
    AlternatingHead,
    MAIEConfig,
    damping,
    mean_of_probabilities,
    mixup_loss,
    plan,
)
from counterpoise.models.network import MultimodalNet

NAMES = ("audio", "video")


# --- formulas


def test_the_strongest_direction_is_damped_most() -> None:
    """s = (4, 1, 0), T = 0.4: exp(-0.4), exp(-0.1), 1."""
    expected = torch.tensor([0.670320, 0.904837, 1.0])
    torch.testing.assert_close(damping(torch.diag(torch.tensor([4.0, 1, 0])), 0.4), torch.diag(expected))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    found = damping(rotation @ torch.diag(torch.tensor([4.0, 1, 0])) @ rotation.T, 0.4)
    torch.testing.assert_close(found, rotation @ torch.diag(expected) @ rotation.T)


def test_damping_knows_no_scale_and_no_temperature_is_no_damping() -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = values.T @ values
    torch.testing.assert_close(damping(covariance, 0.4), damping(1e6 * covariance, 0.4))
    torch.testing.assert_close(damping(covariance, 0.0), torch.eye(4, dtype=torch.float64))
    assert torch.linalg.eigvalsh(damping(covariance, 0.4)).tolist()[::3] == pytest.approx([math.exp(-0.4), 1])


def test_an_input_that_was_never_used_damps_nothing() -> None:
    torch.testing.assert_close(damping(torch.zeros(3, 3), 0.4), torch.eye(3))
    torch.testing.assert_close(damping(torch.full((1, 1), 2.0), 0.4), torch.eye(1))


def test_mixed_labels_are_a_soft_target() -> None:
    rng = torch.Generator().manual_seed(2)
    logits, labels, partners = (
        torch.randn(5, 3, generator=rng),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.tensor([1, 1, 0, 2, 0]),
    )
    target = 0.3 * F.one_hot(labels, 3) + 0.7 * F.one_hot(partners, 3)
    torch.testing.assert_close(mixup_loss(logits, labels, partners, 0.3), soft_cross_entropy(logits, target).mean())
    torch.testing.assert_close(mixup_loss(logits, labels, partners, 1.0), F.cross_entropy(logits, labels))


def test_prediction_is_the_mean_of_probabilities() -> None:
    """(0.9, 0.1) and (0.2, 0.8): (0.55, 0.45). The sum of logits would choose the same class; (0.999, .) shows more."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]).log()
    torch.testing.assert_close(mean_of_probabilities(logits).exp(), torch.tensor([[0.55, 0.45]]))
    sure = torch.tensor([[[0.99999, 0.00001]], [[0.1, 0.9]], [[0.1, 0.9]]]).log()
    assert sure.sum(dim=0).argmax() == 0 and mean_of_probabilities(sure).argmax() == 1
    assert mean_of_probabilities(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]])).isfinite().all()


# --- stages


def test_published_schedules_come_out_as_published() -> None:
    assert plan(450, {"audio": 25, "video": 50}, 6) == [("audio", 25), ("video", 50)] * 6
    assert plan(300, {"depth": 1, "rgb": 1, "flow": 1}, 2) == [(m, 50) for m in ("depth", "rgb", "flow")] * 2


@pytest.mark.parametrize("ratios", [{"a": 1, "b": 1}, {"a": 1, "b": 40}, {"a": 3, "b": 1, "c": 2}])
def test_every_modality_has_its_stages_in_any_budget(ratios: dict[str, float]) -> None:
    for epochs in range(len(ratios), 120):
        stages = plan(epochs, ratios, 6)
        assert sum(n for _, n in stages) == epochs and min(n for _, n in stages) >= 1
        names = [name for name, _ in stages]
        assert names == list(ratios) * (len(names) // len(ratios)) and len(names) <= 6 * len(ratios)


def test_stages_begin_with_the_best_weights_and_a_fresh_optimizer() -> None:
    stages = make(epochs=90, lengths={"video": 2.0}, rounds=3)[0].stages()
    assert [(s.name, s.epochs) for s in stages] == [("audio", 10), ("video", 20)] * 3
    assert all(s.begin == "best" and s.fresh_optimizer and s.own_schedule and s.selectable for s in stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": {"visual": 2.0}}, "names visual; modalities: audio, video"),
        ({"lengths": {"video": 0.0}}, "length above 0"),
        ({"epochs": 1}, "epochs is 1, it needs 2 or more"),
    ],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


# --- the method


def make(
    modalities: tuple[str, ...] = NAMES, epochs: int = 12, width: int = 4, **config: Any
) -> tuple[MAIE, MultimodalNet]:
    settings: dict[str, Any] = {"hidden": 6, "bottleneck": 5} | config
    method = MAIE(MAIEConfig(**settings), Setting(modalities, 3, epochs, 0), SingleComm())
    torch.manual_seed(3)
    widths = {m: width if m == modalities[-1] else 4 for m in modalities}
    encoders = {m: nn.Sequential(nn.Linear(3, widths[m]), nn.BatchNorm1d(widths[m])) for m in modalities}
    return method, MultimodalNet(encoders, method.head(widths))


def batch_of(modalities: tuple[str, ...], rows: int = 8, seed: int = 2) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    values = {m: torch.randn(rows, 3, generator=rng) for m in modalities}
    return values | {"label": torch.randint(3, (rows,), generator=rng)}


def head_of(net: MultimodalNet) -> AlternatingHead:
    assert isinstance(net.head, AlternatingHead)
    return net.head


def step_of(method: MAIE, name: str, seed: int = 0) -> Step:
    stage = next(s for s in method.stages() if s.name == name)
    return Step(1, 0, 0, "joint", 8, 1.0, torch.Generator().manual_seed(seed), stage=stage)


def train(method: MAIE, net: MultimodalNet, name: str = "audio") -> dict[str, Tensor]:
    net.train()
    net.zero_grad(set_to_none=True)
    batch, step = batch_of(method.modalities), step_of(method, name)
    losses = method.losses(method.forward(net, batch, step), batch, step)
    method.backward(net, losses, step)
    return losses


def gradients(net: MultimodalNet) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def mixed_loss(method: MAIE, net: MultimodalNet) -> Tensor:
    """L_mix of audio, as the step's generator draws it."""
    batch = batch_of(NAMES)
    mixed, partners, share = method._mix(batch["audio"], batch["label"], step_of(method, "audio"))
    return mixup_loss(net({"audio": mixed}, ["audio"]).unimodal["audio"], batch["label"], partners, share)


def test_a_stage_trains_its_modality_alone() -> None:
    method, net = make()
    before = {name: value.clone() for name, value in net.encoders["video"].state_dict().items()}
    train(method, net)
    assert {name.split(".")[1 if name.startswith("enc") else 2] for name in gradients(net)} == {"audio"}
    assert all(value.equal(before[name]) for name, value in net.encoders["video"].state_dict().items())


def test_flat_term_is_that_of_sharpness_aware_minimisation() -> None:
    """Against weights that are really moved by 0.05 along the gradient, and back."""
    method, net = make(radius=0.05, flat_weight=0.3)
    other = copy.deepcopy(net)
    losses = train(method, net)
    other.train()
    own = [p for name, p in other.named_parameters() if "audio" in name]
    mixed = mixed_loss(method, other)
    first = torch.autograd.grad(mixed, own)
    norm = torch.cat([g.reshape(-1) for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(own, first, strict=True):
            p.add_(0.05 * g / norm)
    flat = mixed_loss(method, other)
    second = torch.autograd.grad(flat, own)
    expected = [0.7 * a + 0.3 * b for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(losses["mixup"], 0.7 * mixed.detach())
    torch.testing.assert_close(losses["flat"].detach(), 0.3 * flat.detach())
    torch.testing.assert_close(list(gradients(net).values()), expected)
    assert flat > mixed, "uphill"


def test_second_pass_leaves_weights_and_running_statistics_alone() -> None:
    found = {}
    for sam in ("full", "none"):
        method, net = make(sam=sam)
        train(method, net)
        found[sam] = net.state_dict()
    assert all(value.equal(found["none"][name]) for name, value in found["full"].items())
    assert found["full"]["encoders.audio.1.num_batches_tracked"] == 1


def test_released_flat_term_is_a_loss_at_the_same_weights_with_labels_that_are_not_mixed() -> None:
    method, net = make(sam="released")
    losses = train(method, net)
    batch = batch_of(NAMES)
    net.train()
    mixed, _, _ = method._mix(batch["audio"], batch["label"], step_of(method, "audio"))
    logits = net({"audio": mixed}, ["audio"]).unimodal["audio"]
    torch.testing.assert_close(losses["flat"], 0.3 * F.cross_entropy(logits, batch["label"]))
    torch.testing.assert_close(losses["mixup"], 0.7 * mixed_loss(method, net))


def test_without_sam_mixup_is_all_there_is() -> None:
    method, net = make(sam="none")
    losses = train(method, net)
    assert set(losses) == {"mixup"}
    torch.testing.assert_close(losses["mixup"], mixed_loss(method, net))
    zero, other = make(flat_weight=0.0)
    train(zero, other)
    torch.testing.assert_close(gradients(other), gradients(net))


def test_a_gradient_of_zero_moves_nothing_and_gives_no_nan() -> None:
    method, net = make()
    for p in net.parameters():
        p.data.zero_()
    net.encoders["audio"][1].weight.data.zero_()  # type: ignore[index]
    batch, step = batch_of(NAMES) | {"label": torch.tensor([0, 1, 2] * 2)}, step_of(method, "audio")
    batch = {name: value[:6] for name, value in batch.items()}
    step = Step(1, 0, 0, "joint", 6, 1.0, torch.Generator(), stage=step.stage)
    method.backward(net, method.losses(method.forward(net, batch, step), batch, step), step)
    assert all(g.isfinite().all() for g in gradients(net).values())


def test_partners_come_from_the_whole_batch_and_tokens_stay_whole() -> None:
    method, _ = make()
    x, labels = torch.arange(8.0).unsqueeze(1), torch.arange(8)
    mixed, partners, share = method._mix(x, labels, step_of(method, "audio"))
    torch.testing.assert_close(mixed, share * x + (1 - share) * x[partners])
    assert 0 < share < 1 and sorted(partners.tolist()) == list(range(8))
    assert method._mix(x, labels, step_of(method, "audio", 1))[2] != share
    tokens = torch.randint(9, (8, 4))
    assert method._mix(tokens, labels, step_of(method, "audio")) == (tokens, labels, 1.0)
    assert make(mixup_alpha=0.0)[0]._mix(x, labels, step_of(method, "audio")) == (x, labels, 1.0)


# --- P


def begin(method: MAIE, net: MultimodalNet, name: str, epoch: int = 7, stage_epoch: int = 1) -> list[str]:
    read = []

    def blocks(split: str, fraction: float) -> Any:
        read.append(split)
        return iter([batch_of(method.modalities, 5, 8), batch_of(method.modalities, 3, 9)])

    stage = next(s for s in method.stages() if s.name == name)
    history = [EpochStats(e, SplitStats(1, {}, {}, {}), None) for e in range(1, epoch)]
    method.begin_epoch(net, EpochContext(epoch, stage, stage_epoch, history, blocks))
    return read


def test_inputs_of_the_modality_before_are_looked_at_between_stages() -> None:
    method, net = make(temperature=0.7)
    net.train()
    before = copy.deepcopy(net.state_dict())
    assert begin(method, net, "audio", epoch=1) == [] and begin(method, net, "video", stage_epoch=2) == []
    assert begin(method, net, "video") == ["train"]
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"head.classifiers.audio.{i}.damping" for i in (0, 2, 3)}
    assert all(module.training for module in net.modules())
    net.eval()
    first, second, third = head_of(net).linears("audio")
    sums = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for rows, seed in ((5, 8), (3, 9)):
            u = net.encoders["audio"](batch_of(NAMES, rows, seed)["audio"])
            h = torch.relu(first(u))
            for i, x in enumerate((u, h, second(h))):
                sums[i] += torch.outer(x.mean(dim=0), x.mean(dim=0))
    for layer, covariance in zip((first, second, third), sums, strict=True):
        torch.testing.assert_close(layer.damping, damping(covariance, 0.7), atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]


def test_gradients_of_linears_are_damped_where_shapes_agree() -> None:
    for width, damped in ((4, (0, 2, 3)), (7, (2, 3))):
        method, net = make(width=width)
        begin(method, net, "video")
        train(method, net, "video")
        before = gradients(net)
        coefficients = method.adjust(net, net(batch_of(NAMES)), batch_of(NAMES), step_of(method, "video"))
        after = gradients(net)
        changed = {name for name in after if not after[name].equal(before[name])}
        assert changed == {f"head.classifiers.video.{i}.weight" for i in damped}
        for i in damped:
            matrix = net.state_dict()[f"head.classifiers.audio.{i}.damping"]
            name = f"head.classifiers.video.{i}.weight"
            torch.testing.assert_close(after[name], before[name] @ matrix)
        assert math.exp(-0.4) - 1e-6 <= coefficients["kept/video"] < 1


def test_gradients_of_the_first_stage_are_left_alone() -> None:
    method, net = make()
    begin(method, net, "audio", epoch=1)
    train(method, net, "audio")
    before = gradients(net)
    kept = method.adjust(net, net(batch_of(NAMES)), batch_of(NAMES), step_of(method, "audio"))
    assert all(value.equal(before[name]) for name, value in gradients(net).items())
    assert kept["kept/audio"] == 1


def test_of_three_modalities_the_one_before_is_the_previous_in_the_circle() -> None:
    method, net = make(("a", "b", "c"))
    for name, before in (("b", "a"), ("c", "b"), ("a", "c")):
        other = copy.deepcopy(net)
        begin(method, other, name)
        changed = {
            key.split(".")[2] for key, value in other.state_dict().items() if not value.equal(net.state_dict()[key])
        }
        assert changed == {before}


def test_a_classifier_has_the_published_layers() -> None:
    head = AlternatingHead({"audio": 512}, 6, 256, 64)
    assert [tuple(layer.weight.shape) for layer in head.linears("audio")] == [(256, 512), (64, 256), (6, 64)]
    assert [type(layer).__name__ for layer in head.classifiers["audio"].children()].count("ReLU") == 1
