"""PMR against numbers worked out by hand: distances, coefficients, prototypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from counterpoise.contracts import Batch, EpochContext, Stage, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.pmr import PMR, PMRConfig, entropy, moved_prototypes, prototype_logits, rebalancing
from counterpoise.models.heads import ConcatHead, SumHead
from counterpoise.models.network import MultimodalNet

AUDIO, AUDIO_PROTOTYPES = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
VIDEO, VIDEO_PROTOTYPES = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
LABELS = torch.tensor([0, 1])

# --- the formula


def test_nearest_prototypes_worked_out_by_hand() -> None:
    """Distances of audio are 0 and 5, 5 and 0; of video 1 and 1, 1 and the root of 5."""
    audio, video = prototype_logits(AUDIO, AUDIO_PROTOTYPES), prototype_logits(VIDEO, VIDEO_PROTOTYPES)
    torch.testing.assert_close(audio, torch.tensor([[0.0, -5.0], [-5.0, 0.0]]))
    p_audio, p_video = (torch.softmax(z, dim=1)[torch.arange(2), LABELS] for z in (audio, video))
    assert p_audio.tolist() == pytest.approx([0.993307, 0.993307], abs=1e-6)
    assert p_video.tolist() == pytest.approx([0.5, 0.225121], abs=1e-6)
    assert F.cross_entropy(audio, LABELS).item() == pytest.approx(0.006715, abs=1e-6)
    assert F.cross_entropy(video, LABELS).item() == pytest.approx(1.092132, abs=1e-6)
    assert entropy(audio).item() == pytest.approx(0.040180, abs=1e-6)
    assert entropy(video).item() == pytest.approx(0.613230, abs=1e-6)
    scores = torch.stack([p_audio.sum(), p_video.sum()])
    assert (scores[0] / scores[1]).item() == pytest.approx(2.739700, abs=1e-5)
    pull, hold = rebalancing(scores)
    assert pull.tolist() == [0, 1] and hold.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rho", "beta", "gamma"),
    [(0.5, 1.0, 0.0), (0.8, 0.25, 0.0), (1.0, 0.0, 0.0), (1.3, 0.0, 0.3), (2.7397, 0.0, 1.0)],
)
def test_two_modalities_follow_the_paper(rho: float, beta: float, gamma: float) -> None:
    """beta speeds up the first modality, gamma the second; each holds the other one back."""
    pull, hold = rebalancing(torch.tensor([rho, 1.0]) * 4)
    assert pull.tolist() == pytest.approx([beta, gamma], abs=1e-6)
    assert hold.tolist() == pytest.approx([gamma, beta], abs=1e-6)


def test_released_coefficients_are_zero_or_one() -> None:
    for scores, expected in (([1.0, 3.0], [1, 0]), ([3.0, 2.9], [0, 1]), ([2.0, 2.0], [0, 0]), ([3, 5, 4], [1, 0, 1])):
        pull, hold = rebalancing(torch.tensor(scores), "released")
        assert pull.tolist() == expected and not hold.any()


def test_three_modalities_are_compared_with_the_best_and_the_worst() -> None:
    pull, hold = rebalancing(torch.tensor([6.0, 5.0, 4.0]))
    assert pull.tolist() == pytest.approx([0, 0.2, 0.5], abs=1e-6)
    assert hold.tolist() == pytest.approx([0.5, 0.25, 0], abs=1e-6)


@given(st.lists(st.floats(0, 50), min_size=2, max_size=4))
def test_coefficients_are_bounded_and_follow_an_exchange_of_modalities(values: list[float]) -> None:
    scores = torch.tensor(values)
    for one, other in zip(rebalancing(scores), rebalancing(scores.flip(0)), strict=True):
        assert one.isfinite().all() and (one >= 0).all() and (one <= 1).all()
        torch.testing.assert_close(one.flip(0), other)
    best = scores.argmax()
    assert rebalancing(scores)[0][best] == 0 and rebalancing(scores)[1][scores.argmin()] == 0


def test_a_feature_on_its_prototype_has_a_gradient_without_nan() -> None:
    features = AUDIO.clone().requires_grad_()
    F.cross_entropy(prototype_logits(features, AUDIO_PROTOTYPES), LABELS).backward()
    assert features.grad is not None and features.grad.isfinite().all()


# --- prototypes


def test_prototypes_move_to_the_new_means_and_absent_classes_keep_theirs() -> None:
    old, seen = torch.tensor([[1.0], [5.0], [0.0], [0.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    sums, counts = torch.tensor([[6.0], [0.0], [8.0], [0.0]]), torch.tensor([2.0, 0.0, 2.0, 0.0])
    found = moved_prototypes(old, seen, sums, counts, 0.2)
    assert found.flatten().tolist() == pytest.approx([0.2 * 1 + 0.8 * 3, 5.0, 4.0, 14 / 4])
    assert moved_prototypes(old, seen, 0 * sums, 0 * counts, 0.2).isfinite().all()


WIDTHS = {"audio": 3, "video": 5, "text": 2}


def made(num_modalities: int = 2, epochs: int = 10, **options: Any) -> tuple[PMR, MultimodalNet, Batch]:
    torch.manual_seed(2)
    names = tuple(WIDTHS)[:num_modalities]
    method = PMR(PMRConfig(**options), Setting(names, 4, epochs, 0), SingleComm())
    encoders = {m: torch.nn.Sequential(torch.nn.Linear(6, WIDTHS[m]), torch.nn.BatchNorm1d(WIDTHS[m])) for m in names}
    net = MultimodalNet(encoders, method.head({m: WIDTHS[m] for m in names}))
    batch = {m: torch.randn(12, 6) for m in names} | {"label": torch.arange(12) % 3}
    return method, net, batch


def look(method: PMR, net: MultimodalNet, batches: list[Batch], epoch: int = 1) -> list[tuple[str, float]]:
    """begin_epoch on these batches; what it asked for."""
    asked = []

    def read(split: str, fraction: float) -> Iterator[Batch]:
        asked.append((split, fraction))
        return iter(batches)

    method.begin_epoch(net, EpochContext(epoch, Stage("train", 10), epoch, (), read))
    return asked


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_prototypes_are_class_means_in_evaluation_mode(num_modalities: int) -> None:
    method, net, batch = made(num_modalities, subset=0.25, momentum=0.5)
    net.train()
    halves = [{k: v[:5] for k, v in batch.items()}, {k: v[5:] for k, v in batch.items()}]
    assert look(method, net, halves) == [("train", 0.25)]
    assert net.encoders["audio"][1].num_batches_tracked == 0 and net.training
    net.eval()
    u = torch.cat([net(batch).features[m] for m in net.modalities], dim=1).detach()
    means = torch.stack([u[batch["label"] == k].mean(dim=0) for k in range(3)])
    torch.testing.assert_close(net.head.prototypes[:3], means)
    torch.testing.assert_close(net.head.prototypes[3], u.mean(dim=0))  # never seen
    assert net.head.seen.tolist() == [1, 1, 1, 0]
    later = {**batch, "audio": batch["audio"] + 1, "label": torch.full((12,), 3)}
    look(method, net, [later], 2)
    torch.testing.assert_close(net.head.prototypes[:3], means)
    u = torch.cat([net(later).features[m] for m in net.modalities], dim=1).detach()
    torch.testing.assert_close(net.head.prototypes[3], u.mean(dim=0))  # seen for the first time: no momentum
    look(method, net, [batch], 3)
    look(method, net, [{**later, "label": torch.zeros(12, dtype=torch.int64)}], 4)
    torch.testing.assert_close(net.head.prototypes[0], 0.5 * means[0] + 0.5 * u.mean(dim=0))


# --- the loss


def at(epoch: int) -> Step:
    return Step(epoch, 0, 0, "joint", 12, 1.0, torch.Generator())


@pytest.mark.parametrize("num_modalities", [2, 3])
def test_the_loss_is_the_one_in_the_docstring(num_modalities: int) -> None:
    method, net, batch = made(num_modalities, alpha=2.0, mu=0.1)
    look(method, net, [batch])
    out = method.forward(net, batch, at(1))
    losses = method.losses(out, batch, at(1))
    logits = method.parts(net, out)
    assert set(logits) == {f"{m}/prototype" for m in net.modalities}
    p = [torch.softmax(z, dim=1) for z in logits.values()]
    scores = [x[torch.arange(12), batch["label"]].sum().item() for x in p]
    beta = [min(max(max(scores) / s - 1, 0), 1) for s in scores]
    gamma = [min(max(s / min(scores) - 1, 0), 1) for s in scores]
    pull = 2.0 * sum(b * F.cross_entropy(z, batch["label"]).item() for b, z in zip(beta, logits.values(), strict=True))
    hold = -0.1 * sum(-g * (x * x.log()).sum(dim=1).mean().item() for g, x in zip(gamma, p, strict=True))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {"fused": F.cross_entropy(out.fused, batch["label"]).item(), "prototypes": pull, "entropy": hold}, abs=1e-5
    )
    assert pull > 0 > hold
    found = {name: value.item() for name, value in method.adjust(net, out, batch, at(1)).items()}
    expected = {f"beta/{m}": b for m, b in zip(net.modalities, beta, strict=True)}
    expected |= {f"gamma/{m}": g for m, g in zip(net.modalities, gamma, strict=True)}
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_modality_that_is_behind_is_pulled_and_the_other_feels_the_entropy_only() -> None:
    method, net, batch = made(mu=1.0)
    look(method, net, [batch])
    out = method.forward(net, batch, at(1))
    losses = method.losses(out, batch, at(1))
    beta = method.adjust(net, out, batch, at(1))
    behind, ahead = ("audio", "video") if beta["beta/audio"] > 0 else ("video", "audio")
    features = [out.features[behind], out.features[ahead]]
    pulled, _ = torch.autograd.grad(losses["prototypes"], features, retain_graph=True, materialize_grads=True)
    assert pulled.abs().sum() > 0
    for loss, untouched in (("prototypes", 1), ("entropy", 0)):
        gradients = torch.autograd.grad(losses[loss], features, retain_graph=True, materialize_grads=True)
        assert not gradients[untouched].any() and gradients[1 - untouched].any()


def test_entropies_are_for_the_first_epochs_and_everything_ends_after_the_last() -> None:
    method, net, batch = made()
    look(method, net, [batch])
    names = [list(method.losses(method.forward(net, batch, at(e)), batch, at(e))) for e in (1, 2, 3, 10)]
    assert names == [["fused", "prototypes", "entropy"]] * 2 + [["fused", "prototypes"]] * 2, "a fifth of ten epochs"
    method, net, batch = made(entropy_epochs=0, last_epoch=3)
    look(method, net, [batch])
    names = [list(method.losses(method.forward(net, batch, at(e)), batch, at(e))) for e in (1, 3, 4)]
    assert names == [["fused", "prototypes"]] * 2 + [["fused"]]
    assert method.adjust(net, net(batch), batch, at(4)) == {}


def test_the_released_form_has_no_entropies() -> None:
    method, net, batch = made(form="released", head="sum", alpha=0.5)
    assert isinstance(net.head, SumHead) and isinstance(made()[1].head, ConcatHead)
    look(method, net, [batch])
    out = method.forward(net, batch, at(1))
    losses = method.losses(out, batch, at(1))
    assert list(losses) == ["fused", "prototypes"]
    pulls = [F.cross_entropy(z, batch["label"]).item() for z in method.parts(net, out).values()]
    assert losses["prototypes"].item() in [pytest.approx(0.5 * pull) for pull in pulls]


def test_prototypes_take_no_gradient() -> None:
    method, net, batch = made()
    look(method, net, [batch])
    assert not net.head.prototypes.requires_grad
    assert not [name for name, _ in net.named_parameters() if "prototype" in name]


def test_level_scores_leave_the_joint_loss_alone() -> None:
    scores = torch.tensor([3.0, 3.0, 3.0])
    assert not any(values.any() for values in rebalancing(scores))
