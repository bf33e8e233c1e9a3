"""MMPareto against numbers worked out by hand, and what its update promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.mmpareto import MMPareto, MMParetoConfig, joint_share, pareto_gradients, trained
from counterpoise.models.network import MultimodalNet

numbers = st.floats(-3, 3).map(lambda x: round(x, 3))
vectors = st.lists(numbers, min_size=3, max_size=3)


def tensors(*values: list[float]) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


# --- the formula


@pytest.mark.parametrize(
    ("g", "h", "cosine", "share", "final"),
    [
        ([1.0, 0.0], [-1.0, 2.0], -0.447214, 0.75, [2.121320, 2.121320]),
        ([3.0, 0.0], [-1.0, 0.5], -0.894427, 0.261538, [0.383557, 3.068449]),
        ([1.0, 0.0], [1.0, 2.0], 0.447214, 0.5, [3.0, 3.0]),  # they agree: 1.5 (g + h)
        ([0.0, 1.0], [2.0, 0.0], 0.0, 0.8, [1.5, 3.0]),  # at right angles: no agreement
    ],
)
def test_numbers_worked_out_by_hand(
    g: list[float], h: list[float], cosine: float, share: float, final: list[float]
) -> None:
    (made,), found, angle = pareto_gradients(tensors(g), tensors(h), 1.5)
    assert found.item() == pytest.approx(share, abs=1e-6)
    assert angle.item() == pytest.approx(cosine, abs=1e-6)
    assert made.tolist() == pytest.approx(final, abs=2e-6)


def test_the_shortest_vector_lies_at_equal_angles_to_both() -> None:
    g, h = tensors([1.0, 0.0], [-1.0, 2.0])
    shortest = 0.75 * g + 0.25 * h
    assert shortest.tolist() == [0.5, 0.5]
    assert (shortest @ g).item() == (shortest @ h).item() == 0.5


def test_the_share_is_of_the_whole_encoder_and_the_length_of_every_tensor() -> None:
    """g.h = -1 + 6 > 0 over both tensors, although the first ones are in conflict."""
    g, h = tensors([1.0, 0.0], [2.0, 0.0]), tensors([-1.0, 2.0], [3.0, 0.0])
    made, share, _ = pareto_gradients(g, h, 1.0)
    assert share.item() == 0.5
    for one, left, right in zip(made, g, h, strict=True):
        torch.testing.assert_close(one, left + right)
    g, h = tensors([1.0, 0.0], [0.0, 0.1]), tensors([-1.0, 2.0], [0.0, 0.1])
    made, share, _ = pareto_gradients(g, h, 1.0)
    assert share.item() == pytest.approx((5.01 + 0.99) / (1.01 + 5.01 + 1.98), abs=1e-6)
    for one, left, right in zip(made, g, h, strict=True):
        direction = 2 * share * left + 2 * (1 - share) * right
        longest = max((left + right).norm().item(), direction.norm().item())
        assert one.norm().item() == pytest.approx(longest, rel=1e-5)


@given(vectors, vectors)
def test_an_update_descends_on_both_and_is_no_shorter_than_their_sum(one: list[float], other: list[float]) -> None:
    (g,), (h,) = tensors(one), tensors(other)
    (made,), share, cosine = pareto_gradients([g], [h], 1.5)
    assert 0.001 <= share <= 0.999 and -1.00001 <= cosine <= 1.00001
    assert made.isfinite().all()
    length = (g + h).norm().item()
    opposite = (g + h).norm() < 1e-3 * (g.norm() + h.norm()) or cosine < -0.999
    if not opposite:
        assert made.norm().item() >= 1.5 * length * (1 - 1e-3)
        if 0.01 < share < 0.99:  # clipping takes the promise away
            assert (made @ g).item() >= -1e-3 and (made @ h).item() >= -1e-3


@given(vectors, vectors)
def test_exchanging_the_losses_exchanges_the_shares(one: list[float], other: list[float]) -> None:
    g, h = tensors(one, other)
    if g.norm() < 0.01 and h.norm() < 0.01:
        return
    share, back = (joint_share(a @ a, b @ b, a @ b).item() for a, b in ((g, h), (h, g)))
    assert share + back == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("own", [[0.0, 0.0], [-2.0, 1.0], [2.0, -1.0]])
def test_gradients_that_vanish_or_cancel_give_no_nan(own: list[float]) -> None:
    for g, h in ((tensors([2.0, -1.0]), tensors(own)), (tensors([0.0, 0.0]), tensors(own))):
        (made,), _, cosine = pareto_gradients(g, h, 1.5)
        assert made.isfinite().all() and cosine.isfinite()


def test_gamma_scales_the_update() -> None:
    g, h = tensors([1.0, 0.0]), tensors([-1.0, 2.0])
    (one,), _, _ = pareto_gradients(g, h, 1.0)
    (two,), _, _ = pareto_gradients(g, h, 2.0)
    torch.testing.assert_close(two, 2 * one)


# --- the method

WIDTHS = {"audio": 3, "video": 5, "text": 2}


@pytest.fixture(params=[2, 3], ids=["two", "three"])
def parts(request: pytest.FixtureRequest) -> tuple[MMPareto, MultimodalNet, dict[str, Tensor], Step]:
    torch.manual_seed(3)
    names = tuple(WIDTHS)[: request.param]
    method = MMPareto(MMParetoConfig(), Setting(names, 4, 1, 0), SingleComm())
    encoders = {m: torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, WIDTHS[m])) for m in names}
    net = MultimodalNet(encoders, method.head({m: WIDTHS[m] for m in names}))
    batch = {m: torch.randn(8, 6) for m in names} | {"label": torch.randint(4, (8,))}
    return method, net, batch, Step(1, 0, 0, "joint", 8, 1.0, torch.Generator())


def test_heads_follow_the_plain_sum_and_encoders_the_composed_gradient(
    parts: tuple[MMPareto, MultimodalNet, dict[str, Tensor], Step],
) -> None:
    method, net, batch, step = parts
    out = method.forward(net, batch, step)
    losses = method.losses(out, batch, step)
    assert list(losses) == ["fused", *net.modalities]
    summed = torch.autograd.grad(sum(losses.values()), list(net.head.parameters()), retain_graph=True)
    expected = {}
    for name in net.modalities:
        parameters = trained(net.encoders[name])
        g, h = (torch.autograd.grad(losses[k], parameters, retain_graph=True) for k in ("fused", name))
        expected[name] = pareto_gradients(g, h, 1.5)
    method.backward(net, losses, step)
    coefficients = method.adjust(net, out, batch, step)
    for parameter, gradient in zip(net.head.parameters(), summed, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    for name, (gradients, share, cosine) in expected.items():
        for parameter, gradient in zip(net.encoders[name].parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        torch.testing.assert_close(coefficients[f"joint_share/{name}"], share)
        torch.testing.assert_close(coefficients[f"cosine/{name}"], cosine)


def test_frozen_parameters_stay_without_a_gradient(
    parts: tuple[MMPareto, MultimodalNet, dict[str, Tensor], Step],
) -> None:
    method, net, batch, step = parts
    net.encoders["audio"].requires_grad_(False)
    out = method.forward(net, batch, step)
    method.backward(net, method.losses(out, batch, step), step)
    coefficients = method.adjust(net, out, batch, step)
    assert all(p.grad is None for p in net.encoders["audio"].parameters())
    assert "joint_share/audio" not in coefficients and "joint_share/video" in coefficients


def test_the_joint_head_predicts_and_private_heads_speak_for_modalities(
    parts: tuple[MMPareto, MultimodalNet, dict[str, Tensor], Step],
) -> None:
    method, net, batch, _ = parts
    out = method.predict(net, batch)
    joined = torch.cat([out.features[m] for m in net.modalities], dim=1)
    torch.testing.assert_close(method.fuse(net, out), F.linear(joined, net.head.linear.weight, net.head.linear.bias))
    torch.testing.assert_close(out.unimodal["audio"], net.head.private["audio"](out.features["audio"]))
