"""MSLR: whose rate follows what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from pydantic import ValidationError
from tests.conftest import Done, settings
from torch import nn

from counterpoise.config import Optim
from counterpoise.contracts import ConfigError, EpochContext, EpochStats, Outputs, SplitStats, Stage, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.optim import build_optimizer, set_learning_rate
from counterpoise.methods.base import Setting
from counterpoise.methods.mslr import MSLR, MSLRConfig, improvement
from counterpoise.models.heads import SumHead
from counterpoise.models.network import MultimodalNet

NAMES = ("audio", "visual")


def make(names: Sequence[str] = NAMES, **options: object) -> MSLR:
    return MSLR(MSLRConfig(**options), Setting(tuple(names), 2, 20, 0), SingleComm())  # type: ignore[arg-type]


def stats(correct: int) -> SplitStats:
    return SplitStats(100, {"fused": 1.0}, {"fused": 0, "audio": correct, "visual": 50}, {})


def context(accuracies: Sequence[int], valid: bool = True) -> EpochContext:
    """The epoch after those in which audio got so many of a hundred right; visual always 50."""
    other = stats(99)
    history = [
        EpochStats(i, other if valid else stats(a), stats(a) if valid else None) for i, a in enumerate(accuracies, 1)
    ]
    return EpochContext(len(history) + 1, Stage("train", 20), len(history) + 1, history, lambda *_: iter(()))


def network() -> MultimodalNet:
    torch.manual_seed(0)
    return MultimodalNet({m: nn.Linear(3, 2) for m in NAMES}, SumHead(dict.fromkeys(NAMES, 2), 2))


SIX = [40, 60, 50, 45, 55, 60]  # mean of the five before the last: 50


def test_rate_of_a_modality_that_improves() -> None:
    """0.6 after five that average 0.5, base 0.01, audio: 0.01 * 0.9 * 1.2."""
    assert improvement([a / 100 for a in SIX], 5) == pytest.approx(1.2)
    method, net = make(), network()
    method.begin_epoch(net, context(SIX))
    assert 0.01 * method.lr_scales()["audio"] == pytest.approx(0.0108)
    assert 0.01 * method.lr_scales()["visual"] == pytest.approx(0.011)
    optimizer = build_optimizer(Optim(), net, method.lr_groups(net))
    set_learning_rate(optimizer, 0.01, method.lr_scales())
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in optimizer.param_groups}
    assert rates == {"audio": (pytest.approx(0.0108), 4), "visual": (pytest.approx(0.011), 4)}


def test_nothing_is_compared_before_there_are_five_epochs_to_compare_to() -> None:
    assert [improvement(SIX[:n], 5) for n in range(6)] == [1.0] * 6
    assert improvement([10, 20, 60, 30], 2) == pytest.approx(30 / 40), "only the last ones count"


def test_accuracies_of_zero_leave_the_rate_alone() -> None:
    assert improvement([0.0] * 6, 5) == 1.0
    assert improvement([0.0] * 5 + [0.3], 5) == 1.0


@pytest.mark.parametrize("valid", [True, False])
def test_accuracies_are_those_of_valid_or_else_of_train(valid: bool) -> None:
    method = make()
    method.begin_epoch(network(), context(SIX, valid))
    assert method.scales["audio"] == pytest.approx(1.08)


def test_factors_go_by_name_and_default_to_one() -> None:
    assert make(("text", "visual", "audio")).factors == {"text": 1.0, "visual": 1.1, "audio": 0.9}
    assert make(factors={"audio": 0.5}).factors == {"audio": 0.5, "visual": 1.0}
    with pytest.raises(ConfigError, match=r"method.factors names vidoe; modalities: audio, visual"):
        make(factors={"vidoe": 2.0})
    with pytest.raises(ValidationError, match="above 0"):
        MSLRConfig(factors={"audio": 0.0})


def test_kept_rates_never_move() -> None:
    method = make(strategy="keep", factors={"audio": 0.25, "visual": 2.0})
    for length in range(8):
        method.begin_epoch(network(), context([10 + 9 * i for i in range(length)]))
        assert method.lr_scales() == {"audio": 0.25, "visual": 2.0}
    with pytest.raises(ValidationError, match="strategy keep needs factors"):
        MSLRConfig(strategy="keep")


def test_rates_differ_between_the_first_and_the_last_epoch_only() -> None:
    method, found = make(first_epoch=2, last_epoch=3), []
    for length in range(4):
        method.begin_epoch(network(), context(SIX[:length]))
        found.append(method.scales["audio"])
    assert found == [1.0, 0.9, 0.9, 1.0]


@pytest.mark.parametrize("apply", ["lr", "gradients"])
def test_either_rates_or_gradients_are_scaled(apply: str) -> None:
    method, net = make(apply=apply), network()
    method.begin_epoch(net, context(SIX))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    step = Step(7, 0, 0, "joint", 4, 1.0, torch.Generator())
    plotted = method.adjust(net, Outputs({}, {}), {}, step)
    assert {n: v.item() for n, v in plotted.items()} == pytest.approx({"rate/audio": 1.08, "rate/visual": 1.1})
    gradients = {n: p.grad.mean().item() for n, p in net.named_parameters() if p.grad is not None}
    scaled = {"audio": 1.08, "visual": 1.1} if apply == "gradients" else {"audio": 1.0, "visual": 1.0}
    assert gradients == pytest.approx({n: scaled["audio" if "audio" in n else "visual"] for n in gradients})
    assert method.lr_scales() == ({} if apply == "gradients" else method.scales)


def test_with_plain_sgd_scaled_gradients_are_scaled_rates_and_otherwise_not(
    run_experiment: Callable[..., Done], corpus: str
) -> None:
    method = {"name": "mslr", "window": 1, "factors": {"weak": 2.0}}
    for optim, same in (({"momentum": 0.0, "weight_decay": 0.0}, True), ({"weight_decay": 0.1}, False)):
        one, other = (
            run_experiment(settings(corpus, method={**method, "apply": apply}, optim=optim))
            for apply in ("lr", "gradients")
        )
        close = [value.allclose(other.weights[name], atol=1e-5) for name, value in one.weights.items()]
        assert all(close) == same
        assert all(math.isfinite(loss) for loss in one.losses())


def test_rates_reach_the_records(run_experiment: Callable[..., Done], corpus: str) -> None:
    done = run_experiment(settings(corpus, method={"name": "mslr", "window": 1, "factors": {"weak": 2.0}}))
    accuracies = [r["valid"]["accuracy"] for r in done.records("epoch")]
    found = [r["coefficients"] for r in done.records("epoch")]
    assert found[1] == pytest.approx({"rate/strong": 1.0, "rate/weak": 2.0})
    expected = {f"rate/{m}": c * accuracies[1][m] / accuracies[0][m] for m, c in (("strong", 1.0), ("weak", 2.0))}
    assert found[2] == pytest.approx(expected)
