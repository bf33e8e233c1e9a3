"""G-Blend against numbers worked out by hand, its probes, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.conftest import Done, settings, write_corpus
from torch.nn import functional as F

from counterpoise.contracts import (
    Batch,
    ConfigError,
    DataError,
    Decision,
    EpochContext,
    EpochStats,
    SplitStats,
    Stage,
    Step,
)
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.g_blend import GBlend, GBlendConfig, blend_weights, normalised
from counterpoise.models.network import MultimodalNet

# --- the formula

BEFORE = {"audio": (2, 2.1), "video": (2, 2.1), "fused": (2, 2.1)}
AFTER = {"audio": (1, 1.5), "video": (1.5, 1.8), "fused": (0.8, 1.4)}


def test_overfitting_that_is_hardly_there_does_not_take_all_the_weight() -> None:
    """G = (.6, .3, .7), dO = (.4, .2, .01): 3.75, 7.5 and 7000, or 70 with a floor of 0.1."""
    after = {**AFTER, "fused": (0.8 + 0.49, 1.4)}
    bare, _, overfitting = blend_weights(BEFORE, after)
    assert overfitting["fused"] == pytest.approx(0.01)
    assert bare["fused"] == pytest.approx(7000 / 7011.25)
    assert blend_weights(BEFORE, after, floor=0.1)[0]["fused"] == pytest.approx(70 / 81.25)
    assert blend_weights(BEFORE, AFTER, floor=0.1)[0] == blend_weights(BEFORE, AFTER)[0]


def test_weights_worked_out_by_hand() -> None:
    """G / dO^2 is 3.75, 7.5 and 2.8."""
    weights, generalisation, overfitting = blend_weights(BEFORE, AFTER)
    assert list(generalisation.values()) == pytest.approx([0.6, 0.3, 0.7])
    assert list(overfitting.values()) == pytest.approx([0.4, 0.2, 0.5])
    assert list(weights.values()) == pytest.approx([0.266904, 0.533808, 0.199288], abs=1e-6)


def test_a_branch_whose_held_out_loss_rises_counts_nothing() -> None:
    """The absolute value, as in a re-implementation, would give it the 3.75 of one that improves by as much."""
    weights, generalisation, _ = blend_weights(BEFORE, {**AFTER, "audio": (2.2, 2.7)})
    assert generalisation["audio"] == pytest.approx(-0.6)
    assert weights["audio"] == 0 and sum(weights.values()) == pytest.approx(1)
    assert weights["video"] == pytest.approx(7.5 / 10.3)


def test_branches_that_learn_nothing_at_all_count_the_same() -> None:
    assert blend_weights(BEFORE, BEFORE)[0] == {"audio": 1 / 3, "video": 1 / 3, "fused": 1 / 3}
    assert blend_weights(BEFORE, {k: (9, 9) for k in BEFORE})[0] == {"audio": 1 / 3, "video": 1 / 3, "fused": 1 / 3}


def test_a_branch_that_does_not_overfit_counts_most_but_not_infinitely() -> None:
    weights, _, overfitting = blend_weights(BEFORE, {**AFTER, "video": (1.5, 1.6)})
    assert overfitting["video"] == pytest.approx(0, abs=1e-12)
    assert 0.9999 < weights["video"] < 1


losses = st.tuples(st.floats(0, 5), st.floats(0, 5))


@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=5))
def test_weights_are_a_distribution_and_follow_an_exchange_of_branches(values: list[Any]) -> None:
    before, after = ({str(k): v[side] for k, v in enumerate(values)} for side in (0, 1))
    weights = blend_weights(before, after)[0]
    assert all(0 <= w <= 1 for w in weights.values()) and sum(weights.values()) == pytest.approx(1)
    names = list(before)[::-1]
    turned = blend_weights({k: before[k] for k in names}, {k: after[k] for k in names})[0]
    assert turned == pytest.approx(weights)


# --- stages

WIDTHS = {"audio": 3, "video": 5}


def made(epochs: int = 5, **options: Any) -> GBlend:
    return GBlend(GBlendConfig(**options), Setting(tuple(WIDTHS), 4, epochs, 0), SingleComm())


def network(method: GBlend) -> tuple[MultimodalNet, Batch]:
    torch.manual_seed(4)
    encoders = {
        m: torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width)) for m, width in WIDTHS.items()
    }
    batch = {m: torch.randn(12, 6) for m in WIDTHS} | {"label": torch.arange(12) % 4}
    return MultimodalNet(encoders, method.head(WIDTHS)), batch


def plan(method: GBlend) -> list[tuple[str, int]]:
    return [(stage.name, stage.epochs) for stage in method.stages()]


def test_offline_probes_every_branch_once_for_as_long_as_the_run() -> None:
    assert plan(made()) == [("probe audio", 5), ("probe video", 5), ("probe fused", 5), ("train", 5)]
    assert plan(made(probe_epochs=2))[0] == ("probe audio", 2)


def test_online_probes_before_every_super_epoch() -> None:
    probes = ["probe audio", "probe video", "probe fused"]
    expected = [(name, n) for n in (2, 2, 1) for name in (*probes, "train")]
    assert plan(made(mode="online", super_epoch=2)) == expected
    assert plan(made(mode="online")) == plan(made(probe_epochs=5)), "a super-epoch is no longer than the run"
    assert plan(made(mode="online", super_epoch=3, probe_epochs=1))[-4:] == [*((p, 1) for p in probes), ("train", 2)]


def test_fixed_weights_need_no_probes() -> None:
    assert plan(made(mode="fixed")) == [("train", 5)]


def test_probes_come_on_top_of_the_budget() -> None:
    for options in ({}, {"mode": "online", "super_epoch": 2}, {"mode": "fixed"}):
        stages = made(**options).stages()
        assert sum(s.epochs for s in stages if not s.aside) == 5
        assert all(s.fresh_optimizer and not s.selectable for s in stages if s.aside)
        assert stages[-1].selectable and not stages[-1].aside


# --- probes and losses


def at(stage: Stage, stage_epoch: int = 1) -> Step:
    return Step(1, 0, 0, "joint", 12, 1.0, torch.Generator(), stage=stage, stage_epoch=stage_epoch)


@pytest.mark.parametrize(
    ("branch", "moved"),
    [
        ("audio", {"encoders.audio", "head.private.audio"}),
        ("video", {"encoders.video", "head.private.video"}),
        ("fused", {"encoders.audio", "encoders.video", "head.linear"}),
    ],
)
def test_a_probe_trains_one_branch_alone(branch: str, moved: set[str]) -> None:
    method = made()
    net, batch = network(method)
    step = at(Stage(f"probe {branch}", 2, aside=True))
    out = method.forward(net, batch, step)
    found = method.losses(out, batch, step)
    assert list(found) == [branch]
    logits = out.fused if branch == "fused" else out.unimodal[branch]
    assert found[branch].equal(F.cross_entropy(logits, batch["label"]))
    method.backward(net, found, step)
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        n for n, _ in net.named_parameters() if n.startswith(tuple(moved))
    }


def test_training_blends_all_losses() -> None:
    method = made(mode="fixed", weights={"audio": 1, "video": 2, "fused": 5})
    net, batch = network(method)
    step = at(Stage("train", 5))
    out = method.forward(net, batch, step)
    expected = {
        k: w * F.cross_entropy(z, batch["label"]).item()
        for k, w, z in (
            ("audio", 1 / 8, out.unimodal["audio"]),
            ("video", 2 / 8, out.unimodal["video"]),
            ("fused", 5 / 8, out.fused),
        )
    }
    assert {k: v.item() for k, v in method.losses(out, batch, step).items()} == pytest.approx(expected)
    assert made(mode="fixed").weights == {"audio": 1 / 3, "video": 1 / 3, "fused": 1 / 3}


def reader(train: list[Batch], valid: list[Batch]) -> Callable[[str, float], Iterator[Batch]]:
    def read(split: str, fraction: float) -> Iterator[Batch]:
        assert fraction == 1
        return iter({"train": train, "valid": valid}[split])

    return read


def test_losses_are_means_over_samples_in_evaluation_mode_before_and_after_a_probe() -> None:
    method = made(epochs=2)
    net, batch = network(method)
    parts = [{k: v[:7] for k, v in batch.items()}, {k: v[7:] for k, v in batch.items()}]
    other = {m: torch.randn(5, 6) for m in WIDTHS} | {"label": torch.tensor([0, 1, 2, 3, 0])}
    read = reader(parts, [other])
    history: list[EpochStats] = []
    number = 0
    net.train()
    for stage in method.stages()[:3]:
        branch = stage.name.removeprefix("probe ")
        for epoch in (1, 2):
            number += 1
            context = EpochContext(number, stage, epoch, history, read)
            method.begin_epoch(net, context)
            assert (branch in method.before) and (branch not in method.after)
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(0.9)
            method.end_epoch(net, context)
            history.append(EpochStats(number, SplitStats(12, {}, {}, {}), None, stage.name))
            decision = method.decide(history)
            assert (decision is not None) == (branch == "fused" and epoch == 2)
        net.eval()
        found = net(batch), net(other)
        for (loss, out), rows in zip(zip(method.after[branch], found, strict=True), (batch, other), strict=True):
            logits = out.fused if branch == "fused" else out.unimodal[branch]
            assert loss == pytest.approx(F.cross_entropy(logits, rows["label"]).item(), abs=1e-5)
        assert net.encoders["audio"][1].num_batches_tracked == 0
        net.train()
    assert (
        decision is not None
        and decision.action == "blend_weights"
        and set(decision.inputs)
        == {
            "weights",
            "generalisation",
            "overfitting",
        }
    )
    assert decision.inputs["weights"] == blend_weights(method.before, method.after, GBlendConfig().floor)[0]
    twin = made(epochs=2)
    twin.load_state_dict(method.state_dict())
    assert twin.decide(history) == decision
    twin.apply(net, Decision.from_json(decision.to_json()))
    assert twin.weights == decision.inputs["weights"] and twin.decide(history) is None
    again = made(epochs=2)
    again.load_state_dict(twin.state_dict())
    assert again.weights == twin.weights


def test_the_joint_head_predicts_or_the_mean_of_all() -> None:
    for inference in ("joint", "average"):
        method = made(mode="fixed", inference=inference)
        net, batch = network(method)
        out = method.predict(net, batch)
        assert out.fused is not None
        mean = (out.unimodal["audio"] + out.unimodal["video"] + out.fused) / 3
        torch.testing.assert_close(method.fuse(net, out), out.fused if inference == "joint" else mean)


def test_weights_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="weights: only with mode fixed"):
        GBlendConfig(weights={"audio": 1.0})
    for weights in ({"audio": -1.0, "fused": 2.0}, {"audio": 0.0}):
        with pytest.raises(ValidationError, match="none may be negative, and one at least must be above 0"):
            GBlendConfig(mode="fixed", weights=weights)
    with pytest.raises(ConfigError, match=r"method\.weights: give all of audio, video, fused, and no others"):
        made(mode="fixed", weights={"audio": 1.0, "video": 1.0})


def test_published_weights_sum_to_one() -> None:
    weights = {"audio": 0.014, "visual": 0.630, "fused": 0.356}
    assert normalised(weights) == pytest.approx(weights)


# --- whole runs


def test_a_run_is_probes_then_a_decision_then_training(run_experiment: Callable[..., Done], corpus: str) -> None:
    found = run_experiment(settings(corpus, method={"name": "g_blend", "probe_epochs": 1}, epochs=2))
    (decision,) = found.records("decision")
    assert decision["action"] == "blend_weights" and decision["epoch"] == 3
    assert [e["stage"] for e in found.records("epoch")] == ["probe strong", "probe weak", "probe fused", *["train"] * 2]
    assert set(found.records("epoch")[0]["train"]["accuracy"]) == {"strong"}
    assert found.summary["selected_epoch"] > 3
    first = found.records("epoch")[3]
    for k, w in decision["inputs"]["weights"].items():
        assert first["train"]["losses"][k] < 2.5 * w, "weighted, and not far from log 4"


def test_a_corpus_without_a_valid_split_is_told_to_carve_one(
    run_experiment: Callable[..., Done], tmp_path: Path
) -> None:
    place = write_corpus(tmp_path / "no-valid", rows={"train": 40, "test": 12})
    content = settings(place, method="g_blend", epochs=1, select="last")
    with pytest.raises(DataError, match=r"carve one from train on its card \(splits\.valid\.carve\)"):
        run_experiment(content)
    run_experiment({**content, "method": {"name": "g_blend", "mode": "fixed"}})
