"""MLA against numbers worked out by hand: the projection of the head's gradient and the fusion by entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import ConfigError, EpochContext, Stage, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.mla import MLA, MLAConfig, entropy_weights, without_direction
from counterpoise.models.network import MultimodalNet

EYE = torch.eye(2)

# --- the projection


def test_one_step_of_recursive_least_squares() -> None:
    mean = torch.tensor([3.0, 4.0])
    projection = without_direction(EYE, mean, 0.1)
    torch.testing.assert_close(
        projection, torch.tensor([[0.641434, -0.478088], [-0.478088, 0.362550]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(projection @ mean, torch.tensor([0.011952, 0.015936]), atol=1e-6, rtol=0)
    gradient = torch.tensor([[1.0, 1.0], [0.0, 2.0]]) @ projection.T
    expected = torch.tensor([[0.163347, -0.115538], [-0.956175, 0.725100]])
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=4), st.floats(0.01, 1))
def test_a_direction_is_damped_to_a_share_and_those_across_it_stay(values: list[float], a: float) -> None:
    """|P h| / |h| = a / (a + |h|^2)."""
    mean = torch.tensor(values, dtype=torch.float64)
    projection = without_direction(torch.eye(4, dtype=torch.float64), mean, a)
    torch.testing.assert_close(projection @ mean, mean * a / (a + mean @ mean))
    across = torch.tensor([values[1], -values[0], values[3], -values[2]], dtype=torch.float64)
    torch.testing.assert_close(projection @ across, across)
    torch.testing.assert_close(projection, projection.T)
    assert torch.linalg.eigvalsh(projection).min() > 0


def test_many_steps_never_turn_a_gradient_around() -> None:
    torch.manual_seed(0)
    projection = torch.eye(8)
    for number in range(300):
        projection = without_direction(projection, torch.rand(8) * 3, 0.1 ** (1 + number % 10 / 10))
    assert torch.linalg.eigvalsh((projection + projection.T) / 2).min() > -1e-4
    assert projection.norm() < 8**0.5


# --- the prediction


def test_the_surer_modality_counts_more() -> None:
    logits = torch.tensor([[[2.0, 0.0]], [[0.5, 0.0]]])
    assert entropy_weights(logits).squeeze(1).tolist() == pytest.approx([0.573835, 0.426165], abs=1e-6)


def test_entropy_by_sample_does_not_depend_on_the_company_and_by_batch_it_does() -> None:
    """Entropies of (2, 0) and (0, 1) are 0.365334 and 0.582203 by sample, 0.947537 together over the batch."""
    one = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    level = torch.zeros(2, 2)  # entropy log 2 = 0.693147 by sample, 1.386294 over the batch
    stack = torch.stack([one, level])
    by_sample = entropy_weights(stack)
    expected = torch.softmax(-torch.tensor([[0.365334, 0.582203], [0.693147, 0.693147]]), dim=0)
    torch.testing.assert_close(by_sample, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy_weights(stack[:, :1]), by_sample[:, :1])
    by_batch = entropy_weights(stack, "batch")
    assert by_batch.shape == (2, 1)
    expected = torch.softmax(-torch.tensor([[0.947537], [1.386294]]), dim=0)
    torch.testing.assert_close(by_batch, expected, atol=1e-6, rtol=0)
    assert not entropy_weights(stack[:, :1], "batch").allclose(by_batch)


@given(st.integers(2, 4), st.integers(1, 5))
def test_weights_sum_to_one_and_follow_an_exchange_of_modalities(num_modalities: int, size: int) -> None:
    torch.manual_seed(num_modalities * 10 + size)
    logits = 3 * torch.randn(num_modalities, size, 4)
    weights = entropy_weights(logits)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(size))
    torch.testing.assert_close(entropy_weights(logits.flip(0)), weights.flip(0))
    level = entropy_weights(logits[:1].expand(num_modalities, -1, -1))
    torch.testing.assert_close(level, torch.full_like(level, 1 / num_modalities))


def test_very_sure_modalities_give_no_nan() -> None:
    assert entropy_weights(torch.tensor([[[200.0, -200.0]], [[0.0, 0.0]]])).isfinite().all()


# --- the method

WIDTHS = {"audio": 3, "video": 5}


def made(**options: Any) -> tuple[MLA, MultimodalNet, dict[str, Tensor]]:
    torch.manual_seed(1)
    method = MLA(MLAConfig(**options), Setting(("audio", "video"), 4, 2, 0), SingleComm())
    net = MultimodalNet({m: torch.nn.Linear(6, width) for m, width in WIDTHS.items()}, method.head(WIDTHS))
    batch = {m: torch.randn(8, 6) for m in WIDTHS} | {"label": torch.randint(4, (8,))}
    return method, net, batch


def update(method: MLA, net: MultimodalNet, batch: dict[str, Tensor], phase: str, number: int) -> tuple[Tensor, Tensor]:
    """Gradients of the head's weight and bias after one phase."""
    step = Step(1, number, number, phase, 8, 1.0, torch.Generator(), num_batches=4)
    net.zero_grad()
    out = method.forward(net, batch, step)
    method.backward(net, method.losses(out, batch, step), step)
    with torch.no_grad():
        method.adjust(net, out, batch, step)
    layer = net.head.layers
    return layer.weight.grad, layer.bias.grad


def plain(net: MultimodalNet, batch: dict[str, Tensor], name: str) -> list[Tensor]:
    loss = F.cross_entropy(net(batch, [name]).unimodal[name], batch["label"])
    return list(torch.autograd.grad(loss, [net.head.layers.weight, net.head.layers.bias]))


def test_a_gradient_keeps_off_the_mean_feature_of_the_modality_before() -> None:
    method, net, batch = made()
    weight, bias = plain(net, batch, "audio")
    found = update(method, net, batch, "audio", 2)
    torch.testing.assert_close(found[0], weight)  # nothing was there before
    torch.testing.assert_close(found[1], bias)
    mean = net(batch, ["audio"]).features["audio"].detach().mean(dim=0)
    assert mean.shape == (5,), "adapted to the widest"
    projection = without_direction(torch.eye(5), mean, 0.1**1.5)
    torch.testing.assert_close(net.head.projection, projection)
    weight, bias = plain(net, batch, "video")
    found = update(method, net, batch, "video", 2)
    torch.testing.assert_close(found[0], weight @ projection.T)
    torch.testing.assert_close(found[1], bias)  # never projected
    assert (found[0] @ mean).norm() < 0.2 * (weight @ mean).norm()


def test_only_the_modality_of_a_phase_and_the_head_move() -> None:
    method, net, batch = made()
    assert method.phases(1) == ("audio", "video")
    update(method, net, batch, "video", 0)
    assert all(p.grad is None for p in net.encoders["audio"].parameters())
    assert all(p.grad is not None for p in net.encoders["video"].parameters())


def test_the_released_projection_is_none() -> None:
    method, net, batch = made(projection="released")
    assert not [name for name, _ in net.named_buffers()]
    for name in ("audio", "video", "audio"):
        expected = plain(net, batch, name)
        for found, gradient in zip(update(method, net, batch, name, 1), expected, strict=True):
            torch.testing.assert_close(found, gradient)


def test_a_normalised_projection_keeps_its_length_and_the_other_shrinks() -> None:
    norms = {}
    for name in ("recursive", "normalised"):
        method, net, batch = made(projection=name)
        for number in range(20):
            update(method, net, batch, "audio" if number % 2 else "video", number % 4)
        norms[name] = net.head.projection.norm().item()
    assert norms["normalised"] == pytest.approx(1)
    assert norms["recursive"] < 5**0.5


def test_the_projection_is_made_symmetric_at_the_start_of_an_epoch() -> None:
    method, net, _ = made()
    net.head.projection[0, 1] += 0.2
    method.begin_epoch(net, EpochContext(2, Stage("train", 2), 2, (), lambda split, fraction: iter(())))
    assert net.head.projection[0, 1] == net.head.projection[1, 0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"fusion": "fixed"}, (0.5, 0.5)),
        ({"fusion": "fixed", "weights": {"audio": 0.55, "video": 0.45}}, (0.55, 0.45)),
        ({"fusion": "entropy"}, None),
        ({"fusion": "entropy_of_batch"}, None),
    ],
)
def test_the_prediction_is_a_weighted_sum(options: dict[str, Any], weights: tuple[float, float] | None) -> None:
    method, net, batch = made(**options)
    out = method.predict(net, batch)
    stack = torch.stack([out.unimodal["audio"], out.unimodal["video"]])
    if weights is None:
        found = entropy_weights(stack, "classes" if options["fusion"] == "entropy" else "batch")
    else:
        found = torch.tensor(weights).view(2, 1)
    torch.testing.assert_close(method.fuse(net, out), found[0, :, None] * stack[0] + found[1, :, None] * stack[1])


def test_weights_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="weights: only with fusion fixed"):
        MLAConfig(weights={"audio": 1.0})
    with pytest.raises(ConfigError, match=r"method\.weights: give all of audio, video, and no others"):
        made(fusion="fixed", weights={"audio": 1.0, "text": 2.0})
