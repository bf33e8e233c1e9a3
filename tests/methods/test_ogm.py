"""OGM and OGM-GE against numbers worked out by hand, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from counterpoise.contracts import Outputs, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.functional import mean_ratios
from counterpoise.methods.base import Setting
from counterpoise.methods.ogm import OGM, OGMGE, OGMConfig, OGMGEConfig, modulation, noise_like
from counterpoise.models.heads import ConcatHead, SumHead
from counterpoise.models.network import MultimodalNet

POSITIVE = st.floats(1e-3, 1e3)


def test_coefficients_of_two_modalities() -> None:
    """p_y = (.6, .7) and (.3, .2): S = (1.3, 0.5), rho = 2.6."""
    ratios = mean_ratios(torch.tensor([0.6 + 0.7, 0.3 + 0.2]))
    assert ratios.tolist() == pytest.approx([2.6, 1 / 2.6])
    for alpha, slowed in ((0.1, 0.745704), (0.3, 0.347293), (0.8, 0.030735)):
        assert modulation(ratios, alpha).tolist() == pytest.approx([slowed, 1.0], abs=1e-6)
    for alpha, slowed in ((0.1, 0.907833), (0.3, 0.723500), (0.8, 0.262665)):
        assert modulation(ratios, alpha, "continuous").tolist() == pytest.approx([slowed, 1.0], abs=1e-6)


def test_ratios_of_three_modalities_are_means_of_pairs() -> None:
    assert mean_ratios(torch.tensor([6.0, 3.0, 2.0])).tolist() == pytest.approx([2.5, 1.0, 0.5 * (2 / 6 + 2 / 3)])


@given(scores=st.lists(POSITIVE, min_size=2, max_size=5))
def test_ratios_do_not_depend_on_order_or_scale_and_never_exceed_one_for_the_weakest(scores: list[float]) -> None:
    tensor = torch.tensor(scores)
    ratios = mean_ratios(tensor)
    torch.testing.assert_close(mean_ratios(tensor.flip(0)).flip(0), ratios)
    torch.testing.assert_close(mean_ratios(tensor * 4), ratios)
    assert ratios[tensor.argmin()] <= 1 <= ratios[tensor.argmax()]


@given(scores=st.lists(POSITIVE, min_size=2, max_size=4), alpha=st.floats(0.01, 3))
@pytest.mark.parametrize("form", ["tanh", "continuous"])
def test_coefficients_slow_down_and_never_turn_around(form: str, scores: list[float], alpha: float) -> None:
    ratios = mean_ratios(torch.tensor(scores))
    found = modulation(ratios, alpha, form)
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[ratios <= 1] == 1).all()


def test_only_the_continuous_form_starts_at_one() -> None:
    ahead = torch.tensor([1.0001])
    assert modulation(ahead, 0.1).item() == pytest.approx(0.9003, abs=1e-4)
    assert modulation(ahead, 0.1, "continuous").item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("form", ["tanh", "continuous"])
def test_a_modality_without_any_score_gives_no_nan(form: str) -> None:
    for scores in ((1.0, 0.0), (0.0, 0.0), (3.0, 0.0, 0.0)):
        assert modulation(mean_ratios(torch.tensor(scores)), 0.3, form).isfinite().all()


# --- gradients


class Pictures(nn.Module):
    """An encoder with every kind of tensor: convolution, normalisation, matrix, biases."""

    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network(head: type[ConcatHead] | type[SumHead] = ConcatHead) -> tuple[MultimodalNet, dict[str, Tensor]]:
    torch.manual_seed(3)
    net = MultimodalNet({"audio": Pictures(), "visual": Pictures()}, head({"audio": 3, "visual": 3}, 2))
    batch = {m: torch.randn(6, 1, 4, 4) for m in ("audio", "visual")} | {"label": torch.tensor([0, 1, 0, 1, 0, 1])}
    return net, batch


def step(epoch: int = 1, seed: int = 0) -> Step:
    return Step(epoch, 0, 0, "joint", 6, 1.0, torch.Generator().manual_seed(seed))


def scored(a: float, v: float) -> dict[str, Tensor]:
    """Logits whose true class has probability a and v in every one of six samples."""
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 3)
    return {m: signs * torch.logit(torch.tensor(p)) / 2 for m, p in (("audio", a), ("visual", v))}


def adjusted(
    method: OGM, a: float = 0.78, v: float = 0.3, epoch: int = 1, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Gradients before and after `adjust`, and the coefficients; rho is a / v."""
    net, batch = network()
    out = method.forward(net, batch, step())
    method.backward(net, method.losses(out, batch, step()), step())
    before = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    coefficients = method.adjust(net, Outputs({}, scored(a, v)), batch, step(epoch, seed))
    return before, {n: p.grad for n, p in net.named_parameters() if p.grad is not None}, coefficients


def make(kind: type[OGM] = OGM, **options: object) -> OGM:
    return kind(kind.Config(**options), Setting(("audio", "visual"), 2, 10, 0), SingleComm())  # type: ignore[arg-type]


def test_weights_of_the_encoder_ahead_are_scaled_and_nothing_else() -> None:
    before, after, coefficients = adjusted(make(alpha=0.1))
    assert {m: round(k.item(), 6) for m, k in coefficients.items()} == {
        "modulation/audio": 0.745704,
        "modulation/visual": 1.0,
    }
    for name, gradient in before.items():
        ahead = name.startswith("encoders.audio") and gradient.dim() >= 2
        torch.testing.assert_close(after[name], gradient * 0.745704 if ahead else gradient)


def test_released_code_scales_convolutions_only() -> None:
    before, after, _ = adjusted(make(tensors="conv"))
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed == ["encoders.audio.layers.0.weight"]
    before, after, _ = adjusted(make())
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed == ["encoders.audio.layers.0.weight", "encoders.audio.layers.3.weight"]


def test_swapping_the_modalities_swaps_the_coefficients() -> None:
    one, other = adjusted(make(), 0.7, 0.4)[2], adjusted(make(), 0.4, 0.7)[2]
    assert one["modulation/audio"].item() == pytest.approx(other["modulation/visual"].item())
    assert one["modulation/visual"].item() == other["modulation/audio"].item() == 1


@pytest.mark.parametrize("form", ["tanh", "continuous"])
def test_level_scores_leave_gradients_alone(form: str) -> None:
    before, after, coefficients = adjusted(make(form=form), 0.6, 0.6)
    assert all(after[name].equal(gradient) for name, gradient in before.items())
    assert [k.item() for k in coefficients.values()] == [1.0, 1.0]


def test_modulation_happens_between_its_first_and_last_epoch() -> None:
    for kind in (OGM, OGMGE):
        method = make(kind, first_epoch=3, last_epoch=5)
        touched = []
        for epoch in range(1, 9):
            before, after, coefficients = adjusted(method, epoch=epoch)
            different = any(not after[name].equal(gradient) for name, gradient in before.items())
            assert different == bool(coefficients)
            touched.append(different)
        assert [epoch for epoch, yes in enumerate(touched, 1) if yes] == [3, 4, 5]


def test_enhancement_adds_noise_of_the_size_of_the_gradient_before_it_was_scaled() -> None:
    rng = torch.Generator().manual_seed(1)
    gradient = 3 + 0.5 * torch.randn(200, 300, generator=rng)
    noise = noise_like(gradient, rng)
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and abs(noise.mean().item()) < 0.01
    before, plain, _ = adjusted(make())
    _, noisy, _ = adjusted(make(OGMGE))
    rng = torch.Generator().manual_seed(0)
    for name, gradient in before.items():
        if name.startswith("encoders.") and gradient.dim() >= 2:
            expected = gradient.std() + 1e-8
            drawn = torch.randn(gradient.shape, generator=rng)
            torch.testing.assert_close(noisy[name], plain[name] + expected * drawn)
        else:
            assert noisy[name].equal(gradient)


def test_noise_goes_to_all_modalities_also_where_nothing_is_scaled() -> None:
    before, after, coefficients = adjusted(make(OGMGE), 0.6, 0.6)
    assert [k.item() for k in coefficients.values()] == [1.0, 1.0]
    for m in ("audio", "visual"):
        assert not after[f"encoders.{m}.layers.0.weight"].equal(before[f"encoders.{m}.layers.0.weight"])


def test_noise_is_that_of_the_step() -> None:
    one, again, other = (adjusted(make(OGMGE), seed=seed)[1] for seed in (1, 1, 2))
    name = "encoders.audio.layers.0.weight"
    assert one[name].equal(again[name]) and not one[name].equal(other[name])


def test_noise_of_a_single_weight_is_no_nan() -> None:
    assert noise_like(torch.ones(1, 1), torch.Generator()).abs().item() < 1e-6


def test_either_head_and_one_config_each() -> None:
    assert type(make(head="sum").head({"audio": 2, "visual": 5})) is SumHead
    assert type(make(OGMGE).head({"audio": 2, "visual": 5})) is ConcatHead
    assert OGM.Config is OGMConfig and OGMGE.Config is OGMGEConfig
