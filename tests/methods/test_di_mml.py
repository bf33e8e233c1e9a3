"""DI-MML against numbers worked out by hand, and which layers learn in which stage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import ConfigError, EpochContext, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.di_mml import (
    DIMML,
    DetachedHead,
    DIMMLConfig,
    fuse_by_confidence,
    nearest_mean_hits,
    unidirectional_contrast,
)
from counterpoise.models.network import MultimodalNet

AUDIO = torch.tensor([[1.0, 0, 2], [0, 1, 1]])
VIDEO = torch.tensor([[0.5, 1, 0], [1, 0, 1]])
NAMES = ("audio", "video")


# --- the contrastive term


def test_contrast_is_over_chosen_dimensions_only() -> None:
    """Dimensions 0 and 2: logits ((0.5, 0), (3, 1)), losses ln(1 + e^-0.5) and ln(1 + e^2)."""
    chosen = torch.tensor([True, False, True])
    loss = unidirectional_contrast(VIDEO, AUDIO, chosen, 1.0)
    assert loss.item() == pytest.approx(1.300503, abs=1e-6)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(2))) / 2)
    changed = VIDEO.clone()
    changed[:, 1] = 9
    assert unidirectional_contrast(changed, AUDIO, chosen, 1.0).equal(loss)


def test_a_high_temperature_levels_the_contrast() -> None:
    loss = unidirectional_contrast(VIDEO, AUDIO, torch.ones(3, dtype=torch.bool), 1e6)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_only_the_student_learns_and_nobody_without_dimensions() -> None:
    student, teacher = VIDEO.clone().requires_grad_(), AUDIO.clone().requires_grad_()
    unidirectional_contrast(student, teacher, torch.tensor([True, False, True]), 1.0).backward()
    assert teacher.grad is None and student.grad is not None
    assert (student.grad[:, 1] == 0).all() and (student.grad[:, [0, 2]] != 0).any()
    student.grad = None
    loss = unidirectional_contrast(student, teacher, torch.zeros(3, dtype=torch.bool), 1.0)
    loss.backward()
    assert loss.item() == 0 and (student.grad == 0).all()  # type: ignore[attr-defined]


def test_large_dot_products_do_not_overflow() -> None:
    loss = unidirectional_contrast(1e4 * VIDEO, 1e4 * AUDIO, torch.ones(3, dtype=torch.bool), 1.0)
    assert loss.isfinite()


def test_parts_of_a_batch_have_the_negatives_of_all_of_it() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(7, 4, generator=rng), torch.randn(7, 4, generator=rng)
    chosen = torch.tensor([True, True, False, True])
    whole = unidirectional_contrast(student, teacher, chosen, 2.0)
    first = unidirectional_contrast(student[:3], teacher, chosen, 2.0, 0)
    second = unidirectional_contrast(student[3:], teacher, chosen, 2.0, 3)
    torch.testing.assert_close(whole, (3 * first + 4 * second) / 7)


# --- effective dimensions


def test_a_row_is_a_hit_where_its_classes_mean_is_the_nearest() -> None:
    """Means (0, 0), (1, 4), (2, 8). Row (0.4, 5): nearest are classes 0 and 1; row (1.6, 7) of class 2: both right."""
    means = torch.tensor([[0.0, 0], [1, 4], [2, 8]])
    rows, labels = torch.tensor([[0.4, 5], [1.6, 7]]), torch.tensor([1, 2])
    assert nearest_mean_hits(rows, labels, means).tolist() == [1, 2]
    assert nearest_mean_hits(rows, labels, means, chunk=1).tolist() == [1, 2]


def test_of_equally_near_classes_the_first_counts_and_absent_ones_never() -> None:
    means = torch.tensor([[torch.inf], [1.0], [-1.0]])
    rows = torch.zeros(3, 1)
    assert nearest_mean_hits(rows, torch.tensor([1, 1, 2]), means).tolist() == [2]
    assert nearest_mean_hits(rows, torch.tensor([1, 1, 2]), means, chunk=1).tolist() == [2]
    assert nearest_mean_hits(rows, torch.tensor([0, 0, 0]), means).tolist() == [0]


# --- the prediction


@pytest.mark.parametrize(
    ("temperature", "weights"), [(1.0, (0.401760, 0.269307, 0.328933)), (3.0, (0.355786, 0.311374, 0.332840))]
)
def test_confident_heads_weigh_more(temperature: float, weights: tuple[float, ...]) -> None:
    """Largest probabilities 0.9, 0.5 and 0.7."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]], [[0.3, 0.7]]]).log()
    expected = sum(w * z for w, z in zip(weights, logits, strict=True))
    torch.testing.assert_close(fuse_by_confidence(logits, temperature), expected, atol=2e-6, rtol=0)


def test_every_sample_has_weights_of_its_own() -> None:
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 4, generator=rng)
    whole = fuse_by_confidence(logits, 0.1)
    torch.testing.assert_close(whole[2:3], fuse_by_confidence(logits[:, 2:3], 0.1))
    torch.testing.assert_close(fuse_by_confidence(logits, 1e9), logits.mean(dim=0))
    torch.testing.assert_close(fuse_by_confidence(logits[[1, 2, 0]], 0.1), whole)


# --- the method


def make(
    modalities: tuple[str, ...] = NAMES, epochs: int = 10, width: int = 4, **config: Any
) -> tuple[DIMML, MultimodalNet]:
    method = DIMML(
        DIMMLConfig(**({"contrast_temperature": 2.0} | config)), Setting(modalities, 3, epochs, 0), SingleComm()
    )
    torch.manual_seed(3)
    encoders = {m: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, width)) for m in modalities[1:]}
    encoders[modalities[0]] = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    widths = {m: 4 if m == modalities[0] else width for m in modalities}
    return method, MultimodalNet({m: encoders[m] for m in modalities}, method.head(widths))


def batch_of(modalities: tuple[str, ...], rows: int = 12, seed: int = 2) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    values = {m: torch.randn(rows, 3, generator=rng) for m in modalities}
    return values | {"label": torch.randint(3, (rows,), generator=rng)}


def head_of(net: MultimodalNet) -> DetachedHead:
    assert isinstance(net.head, DetachedHead)
    return net.head


def train(method: DIMML, net: MultimodalNet, name: str, epoch: int) -> dict[str, Tensor]:
    stage = next(s for s in method.stages() if s.name == name)
    step = Step(epoch, 0, 0, "joint", 12, 1.0, torch.Generator(), stage=stage, stage_epoch=epoch)
    net.zero_grad(set_to_none=True)
    net.train()
    batch = batch_of(method.modalities)
    losses = method.losses(method.forward(net, batch, step), batch, step)
    method.backward(net, losses, step)
    return losses


def begin(method: DIMML, net: MultimodalNet, epoch: int, stage: str = "unimodal") -> int:
    """How many passes over a split of two blocks a method makes before an epoch."""
    passes = []

    def read(split: str, fraction: float) -> Any:
        passes.append(split)
        return iter([batch_of(method.modalities, 9, 5), batch_of(method.modalities, 4, 6)])

    found = next(s for s in method.stages() if s.name == stage)
    method.begin_epoch(net, EpochContext(epoch, found, epoch, (), read))
    assert set(passes) <= {"train"}
    return len(passes)


def test_stages_have_the_published_shares() -> None:
    published = make(epochs=170)[0]
    assert [(s.name, s.epochs) for s in published.stages()] == [("unimodal", 150), ("fusion", 20)]
    assert published.contrast_after == 20
    unimodal, fusion = published.stages()
    assert not unimodal.selectable and fusion.selectable and fusion.fresh_optimizer and fusion.own_schedule
    for epochs in range(2, 60):
        method = make(epochs=epochs)[0]
        assert sum(s.epochs for s in method.stages()) == epochs and method.contrast_after >= 1
    chosen = make(epochs=10, fusion_epochs=4, contrast_after=2)[0]
    assert [s.epochs for s in chosen.stages()] == [6, 4] and chosen.contrast_after == 2


@pytest.mark.parametrize(("epochs", "fusion"), [(1, None), (4, 4), (4, 9)])
def test_a_run_without_room_for_both_stages_is_refused(epochs: int, fusion: int | None) -> None:
    with pytest.raises(ConfigError, match="it needs"):
        make(epochs=epochs, fusion_epochs=fusion)


def test_effective_dimensions_are_found_once_and_are_better_than_the_average() -> None:
    method, net = make(epochs=20, contrast_after=3)
    assert [begin(method, net, epoch) for epoch in (1, 2, 3, 4, 5)] == [0, 0, 0, 2, 0]
    assert begin(method, net, 4, "fusion") == 0
    net.eval()
    parts = [batch_of(NAMES, 9, 5), batch_of(NAMES, 4, 6)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    with torch.no_grad():
        features = net(whole).features
    for index, name in enumerate(NAMES):
        u, y = features[name], whole["label"]
        means = torch.stack([u[y == k].mean(dim=0) for k in range(3)])
        accuracy = ((u.unsqueeze(1) - means).abs().argmin(dim=1) == y.unsqueeze(1)).float().mean(dim=0)
        assert head_of(net).effective[index].equal(accuracy > accuracy.mean())
    assert head_of(net).effective.any()


def test_looking_at_the_data_changes_neither_statistics_nor_modes() -> None:
    method, net = make(contrast_after=1)
    before = {name: value.clone() for name, value in net.state_dict().items() if "effective" not in name}
    net.train()
    begin(method, net, 2)
    assert all(net.state_dict()[name].equal(value) for name, value in before.items())
    assert all(module.training for module in net.modules())


def test_encoders_meet_in_a_shared_classifier_and_from_then_on_in_contrast() -> None:
    method, net = make(contrast_after=2)
    effective = head_of(net).effective
    effective.copy_(torch.tensor([[True, True, False, False], [False, True, True, False]]))
    assert set(train(method, net, "unimodal", 2)) == {"audio", "video", "shared/audio", "shared/video"}
    losses = train(method, net, "unimodal", 3)
    assert head_of(net).fusion.weight.grad is None
    assert all(p.grad is not None for p in [*net.encoders.parameters(), *head_of(net).shared.parameters()])
    net.train()
    batch = batch_of(NAMES)
    out = net(batch)
    audio, video = (out.features[m].detach() for m in NAMES)
    only_audio, only_video = (torch.eye(4, dtype=torch.bool)[i] for i in (0, 2))
    expected = {
        "audio": F.cross_entropy(out.unimodal["audio"], batch["label"]),
        "shared/video": F.cross_entropy(head_of(net).shared(video), batch["label"]),
        "contrast/audio-video": unidirectional_contrast(video, audio, only_audio, 2.0),
        "contrast/video-audio": unidirectional_contrast(audio, video, only_video, 2.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_three_modalities_have_a_term_for_every_ordered_pair() -> None:
    method, net = make(("a", "b", "c"), contrast_after=1)
    losses = train(method, net, "unimodal", 2)
    pairs = {name for name in losses if name.startswith("contrast/")}
    assert pairs == {f"contrast/{x}-{y}" for x in "abc" for y in "abc" if x != y}
    assert all(losses[name].item() == 0 for name in pairs), "no effective dimension is known"


def test_weights_of_terms_scale_them() -> None:
    found = []
    for weights in ({}, {"shared_weight": 0.5, "contrast_weight": 3.0}):
        method, net = make(contrast_after=1, **weights)  # type: ignore[arg-type]
        head_of(net).effective[0] = True
        found.append(train(method, net, "unimodal", 2))
    torch.testing.assert_close(0.5 * found[0]["shared/audio"], found[1]["shared/audio"])
    torch.testing.assert_close(3 * found[0]["contrast/audio-video"], found[1]["contrast/audio-video"])
    assert found[0]["audio"].equal(found[1]["audio"])


def test_fusion_trains_the_fusion_layer_alone() -> None:
    method, net = make()
    before = {name: value.clone() for name, value in net.named_buffers()}
    assert set(train(method, net, "fusion", 1)) == {"fusion"}
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {"head.fusion.weight", "head.fusion.bias"}
    assert all(value.equal(before[name]) for name, value in net.named_buffers())


def test_prediction_is_of_all_classifiers_and_parts_show_the_fusion_one() -> None:
    method, net = make(width=6, fusion_temperature=0.5)
    assert set(head_of(net).adapters.linears) == {"audio"} and head_of(net).fusion.in_features == 12
    net.eval()
    out = method.predict(net, batch_of(NAMES))
    fusion = head_of(net).fusion(torch.cat([out.features[m] for m in NAMES], dim=1))
    expected = fuse_by_confidence(torch.stack([out.unimodal["audio"], out.unimodal["video"], fusion]), 0.5)
    torch.testing.assert_close(method.fuse(net, out), expected)
    torch.testing.assert_close(method.parts(net, out)["fusion"], fusion)
    assert net(batch_of(NAMES), ["video"]).fused is None
