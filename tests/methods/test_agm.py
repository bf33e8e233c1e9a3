"""AGM against numbers worked out by hand, its Shapley values, and the gradients of its two modes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import InputSpec, Outputs, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.agm import (
    AGM,
    AGMConfig,
    Coalition,
    clip,
    modulation,
    ratios,
    shapley_logits,
    with_gradient_scaled,
)
from counterpoise.methods.base import Setting
from counterpoise.models.encoders import EncoderConfig, build_encoder
from counterpoise.models.network import MultimodalNet

NAMES = ("audio", "visual")


def test_shapley_logits_of_two_modalities() -> None:
    """F(a,v) = (3, 1), F(a,0) = (2, 0), F(0,v) = (1, .5)."""
    values: dict[Coalition, Tensor] = {
        NAMES: torch.tensor([[3.0, 1.0]]),
        ("audio",): torch.tensor([[2.0, 0.0]]),
        ("visual",): torch.tensor([[1.0, 0.5]]),
    }
    found = shapley_logits(values)
    assert found["audio"].tolist() == [[2.0, 0.25]] and found["visual"].tolist() == [[1.0, 0.75]]
    losses = [F.cross_entropy(found[m], torch.tensor([0])).item() for m in NAMES]
    assert losses == pytest.approx([0.160224, 0.575939], abs=1e-6)


def random_values(names: tuple[str, ...], seed: int) -> dict[Coalition, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        members: torch.randn(3, 4, generator=rng)
        for size in range(1, len(names) + 1)
        for members in itertools.combinations(names, size)
    }


@given(count=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_shapley_logits_are_the_mean_gain_over_all_orders_of_joining(count: int, seed: int) -> None:
    names = tuple("abcd"[:count])
    values = random_values(names, seed)
    found = shapley_logits(values)
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), values[names], atol=1e-5, rtol=1e-5)
    for name in names:
        gains = []
        for order in itertools.permutations(names):
            before = tuple(m for m in names if m in order[: order.index(name)])
            after = tuple(m for m in names if m in (*before, name))
            gains.append(values[after] - (values[before] if before else 0))
        torch.testing.assert_close(found[name], torch.stack(gains).mean(0), atol=1e-5, rtol=1e-5)


def test_logits_of_modalities_that_add_up_are_those_that_are_added() -> None:
    parts = {m: torch.randn(2, 3) for m in "abc"}
    values: dict[Coalition, Tensor] = {
        members: torch.stack([parts[m] for m in members]).sum(0)
        for size in (1, 2, 3)
        for members in itertools.combinations("abc", size)
    }
    for name, logits in shapley_logits(values).items():
        torch.testing.assert_close(logits, parts[name], atol=1e-6, rtol=1e-5)


def test_the_modality_that_is_further_ahead_than_usual_is_slowed() -> None:
    scores, running = torch.tensor([0.160224, 0.575939]), torch.tensor([0.30, 0.40])
    assert ratios(scores).tolist() == pytest.approx([1.515454, 0.659868], abs=1e-5)
    assert ratios(running).tolist() == pytest.approx([1.105171, 0.904837], abs=1e-6)
    assert modulation(scores, running, 1.0, 10.0).tolist() == pytest.approx([0.663462, 1.277582], abs=1e-5)
    swapped = modulation(scores.flip(0), running.flip(0), 1.0, 10.0)
    torch.testing.assert_close(swapped.flip(0), modulation(scores, running, 1.0, 10.0))


@given(scores=st.lists(st.floats(0, 18), min_size=2, max_size=4), alpha=st.floats(0, 2.5))
def test_nothing_is_modulated_where_a_batch_is_as_usual(scores: list[float], alpha: float) -> None:
    tensor = torch.tensor(scores)
    assert modulation(tensor, tensor, alpha, 10.0).tolist() == [1.0] * len(scores)
    assert modulation(torch.full_like(tensor, 2.0), torch.full_like(tensor, 0.5), alpha, 10.0).eq(1).all()


def test_exponents_are_capped() -> None:
    scores, running = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0])
    for cap in (10.0, 7.0):
        assert modulation(scores, running, 0.5, cap)[0].item() == pytest.approx(math.exp(0.5 * cap))


def test_scaling_a_gradient_leaves_the_value_to_the_bit() -> None:
    x = torch.randn(50, requires_grad=True)
    y = with_gradient_scaled(x, torch.tensor(0.3))
    y.sum().backward()
    assert y.equal(x) and x.grad is not None and x.grad.allclose(torch.tensor(0.3))


# --- in a network


def make(names: tuple[str, ...] = NAMES, **options: object) -> AGM:
    return AGM(AGMConfig(**options), Setting(names, 2, 10, 0), SingleComm())  # type: ignore[arg-type]


BATCH = {"audio": torch.randn(6, 3) + 1, "visual": torch.randn(6, 5), "label": torch.arange(6) % 2}


def network(method: AGM, norm: bool = False) -> MultimodalNet:
    torch.manual_seed(0)
    kinds: dict[str, nn.Module] = {"audio": nn.Linear(3, 2), "visual": nn.Linear(5, 4)}
    if norm:
        kinds = {m: nn.Sequential(e, nn.BatchNorm1d(e.out_features)) for m, e in kinds.items()}  # type: ignore[arg-type]
    net = MultimodalNet(kinds, method.head({"audio": 2, "visual": 4}))
    method.attach(net)
    return net


def step(epoch: int = 1, index: int = 0) -> Step:
    return Step(epoch, index, index, "joint", 6, 1.0, torch.Generator())


def gradients(method: AGM, net: MultimodalNet, index: int = 0) -> tuple[dict[str, Tensor], Outputs]:
    """What an optimizer would see, and the pass it is from."""
    net.zero_grad()
    out = method.forward(net, BATCH, step(index=index))
    method.backward(net, method.losses(out, BATCH, step(index=index)), step(index=index))
    method.adjust(net, out, BATCH, step(index=index))
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}, out


def test_without_modulation_it_is_plain_joint_training() -> None:
    for mode in ("hook", "scale"):
        method = make(alpha=0.0, clip=None, mode=mode)
        net = network(method)
        found, _ = gradients(method, net)
        net.zero_grad()
        F.cross_entropy(net(BATCH).fused, BATCH["label"]).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)


def test_passes_with_zeros_take_part_in_the_gradient() -> None:
    """F(a,v) gets (k_a + k_v) / 2, F(a,0) gets (k_a - k_v) / 2, F(0,v) gets (k_v - k_a) / 2 of the gradient."""
    method = make(clip=None)
    net = network(method)
    found, out = gradients(method, net)
    k_a, k_v = out.extra["modulation"].unbind()
    zero = {m: torch.zeros_like(BATCH[m]) for m in NAMES}
    both, audio, visual = (
        net(batch).fused for batch in (BATCH, {**BATCH, "visual": zero["visual"]}, {**BATCH, "audio": zero["audio"]})
    )
    assert both is not None and audio is not None and visual is not None
    torch.testing.assert_close(out.unimodal["audio"], (both - visual + audio) / 2)
    torch.testing.assert_close(out.unimodal["visual"], (both - audio + visual) / 2)
    received = both.detach().requires_grad_()
    F.cross_entropy(received, BATCH["label"]).backward()
    net.zero_grad()
    for value, factor in ((both, (k_a + k_v) / 2), (audio, (k_a - k_v) / 2), (visual, (k_v - k_a) / 2)):
        value.backward(factor * received.grad, retain_graph=True)
    assert k_a != k_v
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head", ["concat", "sum"])
def test_the_path_of_real_inputs_through_an_encoder_is_scaled_by_its_coefficient(head: str) -> None:
    """Encoders without bias give zeros for zeros, so that there is no other path."""
    torch.manual_seed(0)
    for mode in ("hook", "scale"):
        method = make(clip=None, head=head, mode=mode)
        kinds = {"audio": nn.Linear(3, 2, bias=False), "visual": nn.Linear(5, 4, bias=False)}
        net = MultimodalNet(kinds, method.head({"audio": 2, "visual": 4}))
        method.attach(net)
        found, out = gradients(method, net)
        net.zero_grad()
        F.cross_entropy(net(BATCH).fused, BATCH["label"]).backward()
        for m, k in zip(NAMES, out.extra["modulation"], strict=True):
            weight = net.encoders[m].weight
            assert abs(k - 1) > 1e-3
            torch.testing.assert_close(found[f"encoders.{m}.weight"], k * weight.grad)


def test_modes_differ_in_the_head() -> None:
    one, other = (gradients(method, network(method))[0] for method in (make(clip=None), make(clip=None, mode="scale")))
    assert not one["head.linear.weight"].allclose(other["head.linear.weight"])


def test_running_means_count_every_batch_alike_and_lag_one_behind() -> None:
    method = make(clip=None, alpha=0.7)
    net = network(method)
    seen: list[Tensor] = []
    for index in range(4):
        with torch.no_grad():
            net.head.linear.weight.mul_(1.5)
        _, out = gradients(method, net, index)
        before = torch.stack(seen).mean(0) if seen else torch.zeros(2)
        scores = torch.stack([F.cross_entropy(out.unimodal[m], BATCH["label"]) for m in NAMES]).detach()
        torch.testing.assert_close(out.extra["modulation"], modulation(scores, before, 0.7, 10.0))
        seen.append(scores)
        torch.testing.assert_close(net.get_buffer("running_scores"), torch.stack(seen).mean(0))


def test_scores_are_bounded_where_a_probability_is_zero() -> None:
    method = make(clip=None)
    net = network(method)
    with torch.no_grad():
        net.head.linear.weight.mul_(1e6)
    found, _ = gradients(method, net)
    assert net.get_buffer("running_scores").max() <= -math.log(1e-8) + 1e-4
    assert all(g.isfinite().all() for g in found.values())


def test_modulation_happens_between_its_first_and_last_epoch_and_means_run_on() -> None:
    method = make(first_epoch=2, last_epoch=3)
    net, modulated = network(method), []
    for epoch in range(1, 6):
        before = net.get_buffer("running_scores").clone()
        out = method.forward(net, BATCH, step(epoch, 2 * epoch))
        modulated.append(bool((out.extra["modulation"] != 1).all()))
        assert not net.get_buffer("running_scores").equal(before)
    assert modulated == [False, True, True, False, False]


def test_large_gradients_are_clipped_together_and_small_ones_left_alone() -> None:
    net = network(make())
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.9)
    clip(net, 1.0)
    assert all(p.grad is not None and p.grad.eq(0.9).all() for p in net.parameters()), "the norm is above 1"
    net.head.linear.weight.grad[0, 0] = -1.1
    clip(net, 2.0)
    norm = torch.stack([p.grad.square().sum() for p in net.parameters() if p.grad is not None]).sum().sqrt()
    assert norm.item() == pytest.approx(2.0, rel=1e-4)
    method = make(clip=1e-3)
    plain, small = gradients(make(clip=None), network(method))[0], gradients(method, network(method))[0]
    assert plain["head.linear.weight"].abs().max() < 1 and all(small[n].equal(g) for n, g in plain.items())


@pytest.mark.parametrize("padded", ["features", "network"])
def test_zeros_leave_running_statistics_alone(padded: str) -> None:
    """They move once, by the main pass."""
    method = make(padded=padded)
    net, plain = network(method, norm=True), network(method, norm=True)
    gradients(method, net)
    plain(BATCH)
    for name, buffer in plain.named_buffers():
        if name != "running_scores":
            torch.testing.assert_close(net.get_buffer(name), buffer)
    assert all(part.training for part in net.modules())


def test_released_code_mixes_two_kinds_of_features_under_batch_normalisation() -> None:
    outs = {}
    for norm, padded in itertools.product((False, True), ("features", "network")):
        method = make(padded=padded)
        out = gradients(method, network(method, norm))[1]
        outs[norm, padded] = out.unimodal["audio"]
        torch.testing.assert_close(out.unimodal["audio"] + out.unimodal["visual"], out.fused)
    torch.testing.assert_close(outs[False, "features"], outs[False, "network"])
    assert not outs[True, "features"].allclose(outs[True, "network"], atol=1e-3)


def test_predictions_are_shapley_logits_too() -> None:
    method = make()
    net = network(method, norm=True).eval()
    with torch.no_grad():
        out = method.predict(net, BATCH)
    plain = net(BATCH)
    torch.testing.assert_close(out.fused, plain.fused)
    torch.testing.assert_close(out.unimodal["audio"] + out.unimodal["visual"], plain.fused)
    without = {m: net({**BATCH, m: torch.zeros_like(BATCH[m])}).fused for m in NAMES}
    torch.testing.assert_close(out.unimodal["audio"], (plain.fused - without["audio"] + without["visual"]) / 2)


def test_zeros_of_a_text_are_padding() -> None:
    method = make(("text", "image"))
    encoders = {
        "text": build_encoder(InputSpec("text", (5,), 9), EncoderConfig(name="text", width=4, hidden=3)),
        "image": build_encoder(InputSpec("image", (1, 4, 4)), EncoderConfig(name="cnn", channels=(2,), width=3)),
    }
    net = MultimodalNet(encoders, method.head({"text": 4, "image": 3}))
    method.attach(net)
    batch = {"text": torch.randint(1, 9, (4, 5)), "image": torch.randn(4, 1, 4, 4), "label": torch.arange(4) % 2}
    out = method.forward(net, batch, step())
    padded = net({**batch, "text": torch.zeros_like(batch["text"])}).fused
    blank = net({**batch, "image": torch.zeros_like(batch["image"])}).fused
    assert out.fused is not None and padded is not None and blank is not None
    torch.testing.assert_close(out.unimodal["image"], (out.fused - blank + padded) / 2)
