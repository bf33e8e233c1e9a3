from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from counterpoise.config import Optim, Schedule
from counterpoise.engine.optim import (
    build_optimizer,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)


def rates(epochs: int, **schedule: object) -> list[float]:
    optim = Optim(lr=1.0, schedule=Schedule(**schedule))  # type: ignore[arg-type]
    return [round(learning_rate(optim, epoch, epochs), 6) for epoch in range(1, epochs + 1)]


def test_a_constant_rate_stays() -> None:
    assert rates(3) == [1, 1, 1]


def test_steps_fall_after_every_so_many_epochs() -> None:
    """The released code drops one epoch early, at 0-based epochs 69 and 139; here 70 whole epochs pass."""
    assert rates(5, name="step", every=2, factor=0.5) == [1, 1, 0.5, 0.5, 0.25]
    optim = Optim(lr=0.01, schedule=Schedule(name="step"))
    assert [learning_rate(optim, e, 200) for e in (1, 70, 71, 140, 141)] == pytest.approx(
        [1e-2, 1e-2, 1e-3, 1e-3, 1e-4]
    )


def test_cosine_goes_from_the_whole_rate_towards_zero() -> None:
    found = rates(4, name="cosine")
    assert found == [round(0.5 * (1 + math.cos(math.pi * k / 4)), 6) for k in range(4)]
    assert found[0] == 1 and 0 < found[-1] < 0.2


def test_warm_up_is_linear_and_comes_first() -> None:
    assert rates(5, warmup=3) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(6, warmup=2, name="cosine")[2] == 1
    assert rates(2, warmup=5) == [round(1 / 6, 6), round(2 / 6, 6)]


KINDS = [
    Optim(lr=0.1, momentum=0.9, weight_decay=0.01),
    Optim(lr=0.1, momentum=0.0, weight_decay=0.01),
    Optim(name="adam", lr=0.1, weight_decay=0.01),
    Optim(name="adamw", lr=0.1, weight_decay=0.01),
]
REFERENCE = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def names_of(optim: Optim) -> str:
    return f"{optim.name}-{optim.momentum}"


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def step(net: nn.Sequential, optimizer: torch.optim.Optimizer, number: int, layers: int) -> None:
    """One step on the first `layers` layers; the others have no gradient."""
    optimizer.zero_grad(set_to_none=True)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    net[:layers](x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optim", KINDS, ids=names_of)
def test_steps_are_those_of_torchs_plain_loop_also_for_parameters_that_come_later(optim: Optim) -> None:
    ours, theirs = make_net(), make_net()
    made = build_optimizer(optim, ours, {})
    more = {"momentum": optim.momentum} if optim.name == "sgd" else {"betas": optim.betas}
    plain = REFERENCE[optim.name](
        theirs.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, foreach=False, fused=False, **more
    )
    for number, layers in enumerate((1, 2, 1, 3, 3)):
        step(ours, made, number, layers)
        step(theirs, plain, number, layers)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optim", KINDS, ids=names_of)
def test_saved_by_name_and_loaded_an_optimizer_goes_on_bit_for_bit(optim: Optim) -> None:
    net = make_net()
    made = build_optimizer(optim, net, {"slow": [net[1].weight]})
    for number, layers in enumerate((1, 2, 2)):
        step(net, made, number, layers)
    saved, weights = optimizer_state(made, net), {k: v.clone() for k, v in net.state_dict().items()}
    assert all(not key.split(":")[1].startswith("2.") for key in saved), "a layer without a gradient has no state"
    twin = make_net()
    twin.load_state_dict(weights)
    again = build_optimizer(optim, twin, {"slow": [twin[1].weight]})
    load_optimizer_state(again, twin, saved)
    for number, layers in ((3, 2), (4, 3)):
        step(net, made, number, layers)
        step(twin, again, number, layers)
    assert all(a.equal(b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    before, after = optimizer_state(made, net), optimizer_state(again, twin)
    assert set(before) == set(after) and all(after[key].equal(value) for key, value in before.items())


def test_rates_of_single_parameters_scale_with_the_base_rate() -> None:
    net = make_net()
    made = build_optimizer(Optim(lr=0.5), net, {"slow": [net[0].weight]})
    set_learning_rate(made, 0.2, {"slow": 0.1})
    by_parameter = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    assert by_parameter[id(net[0].weight)] == pytest.approx(0.02)
    assert by_parameter[id(net[1].weight)] == 0.2


def test_frozen_parameters_are_left_out() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    made = build_optimizer(Optim(), net, {})
    assert sum(len(group["params"]) for group in made.param_groups) == 4
