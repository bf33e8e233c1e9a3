"""`counterpoise plan`: the arithmetic by hand, what is counted from real networks, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.cases import SMALL
from tests.conftest import settings as experiment_on

from counterpoise.cli import main
from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, DataError, ResourceError
from counterpoise.data import plan as order
from counterpoise.planning import calibrate, command
from counterpoise.planning.facts import Facts, facts_for, table
from counterpoise.planning.model import Model, daly_goodput, limits, read_amplification, ring_seconds, scaled
from counterpoise.planning.text import quantity
from counterpoise.planning.workload import Workload, of_experiment, of_numbers

NUMBERS = {
    "model.parameters": 25e6,
    "model.flops": 80e9,
    "model.activation_bytes": 200e6,
    "model.batch_size": 1024,
    "model.small_messages": 80,
    "model.epochs": 10,
    "shards.train": 1e6,
    "shards.valid": 50_000,
    "shards.bytes_per_sample": 1e5,
}
FAST = {"network.latency_s": 0, "node.link_latency_s": 0, "collective.start_s": 0, "collective.call_s": 0,
        "network.bytes_per_s": 1e30, "node.link_bytes_per_s": 1e30, "device.bytes_per_s": 1e30}  # fmt: skip


def model_of(
    changes: Mapping[str, float] | None = None,
    work: Mapping[str, float] | None = None,
    per_node: int = 8,
    kind: str = "h100",
) -> Model:
    facts = facts_for(kind, "ib3200", "s3", 96).changed(changes or {})
    return Model(of_numbers(NUMBERS | dict(work or {})), facts, per_node, kind == "cpu")


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments, "--json"])
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COUNTERPOISE_HOME", str(tmp_path / "home"))


# --- all-reduces


def test_a_ring_is_two_rounds_of_hops_and_parts() -> None:
    # 4 workers: 6 hops of 1 ms; each sends 2 * 3/4 of 800 bytes at 100 bytes/s
    assert ring_seconds(800, 4, 6e-3, 100) == pytest.approx(12.006)


def test_an_all_reduce_within_a_node_by_hand() -> None:
    slow = {"node.link_latency_s": 1e-3, "node.link_bytes_per_s": 1000, "node.link_share": 0.1, "collective.tree": 0,
            "collective.start_s": 0.5, "collective.call_s": 0.25}  # fmt: skip
    assert model_of(slow).all_reduce_s(800, 4) == pytest.approx(0.75 + 6e-3 + 2 * 3 / 4 * 800 / 100)


def test_across_nodes_the_faster_of_ring_and_tree_counts() -> None:
    facts = {"node.link_latency_s": 1e-3, "network.latency_s": 10e-3, "network.bytes_per_s": 1000, "network.share": 1,
             "collective.start_s": 0, "collective.call_s": 0}  # fmt: skip
    model = model_of(facts)  # 64 workers on 8 nodes
    ring = 2 * (56 * 1e-3 + 7 * 10e-3)
    tree = 2 * (7 * 1e-3 + 3 * 10e-3)
    assert model.all_reduce_s(1, 64) == pytest.approx(tree + 2 / 900)
    assert model.all_reduce_s(1e6, 64) == pytest.approx(ring + 2 * 63 / 64 * 1000)


def test_one_device_sends_nothing() -> None:
    model = model_of()
    step = model.step(1, 1024)
    assert model.all_reduce_s(1e9, 1) == 0
    assert (step.communication, step.gradients, step.small) == (0, 0, 0)


# --- a step


def test_an_operation_takes_the_longer_of_arithmetic_and_memory() -> None:
    facts = {"device.share": 0.5, "device.flops": 2e12, "device.bytes_per_s": 1e12, "device.kernel_s": 0}
    work = {"model.flops": 1e9, "model.activation_bytes": 0, "model.kernels": 1}
    assert model_of(facts, work).compute_s(of_numbers(NUMBERS | work).alone.ops, 8) == pytest.approx(8e-3)
    heavy = of_numbers(NUMBERS | work | {"model.activation_bytes": 1e9})  # three times the bytes move, half a TB/s
    assert model_of(facts).compute_s(heavy.alone.ops, 1) == pytest.approx(3e9 / 0.5e12)


def test_a_small_batch_on_a_gpu_waits_for_python_to_issue() -> None:
    model = model_of({"device.kernel_s": 1e-3}, {"model.kernels": 500})
    assert model.compute_s(model.workload.alone.ops, 1e-6) == pytest.approx(0.5)


def test_infinite_networks_scale_perfectly_while_the_batch_grows() -> None:
    model = model_of(FAST)
    for workers in (2, 8, 64, 1024):
        assert model.efficiency(workers, 64, growing=True) == pytest.approx(1, rel=1e-6)


@given(
    workers=st.sampled_from([1, 2, 8, 64, 256]),
    name=st.sampled_from(["network.bytes_per_s", "node.link_bytes_per_s", "device.flops", "device.bytes_per_s",
                          "device.share", "store.stream_bytes_per_s", "store.get_per_s", "store.node_bytes_per_s",
                          "decode.samples_per_core_s", "node.cores", "store.prefixes"]),
    factor=st.floats(1, 1000),
)  # fmt: skip
def test_more_of_anything_is_never_slower(workers: int, name: str, factor: float) -> None:
    before = model_of()
    after = model_of({name: before.facts[name].value * factor})
    assert after.step(workers, 1024).total <= before.step(workers, 1024).total * (1 + 1e-9)


@given(st.sampled_from([1, 2, 4, 8, 16, 64, 256, 1024]), st.floats(1e-6, 1e-3), st.floats(1e8, 1e12))
def test_sharing_a_batch_never_scales_better_than_perfectly(workers: int, latency: float, bandwidth: float) -> None:
    model = model_of({"network.latency_s": latency, "network.bytes_per_s": bandwidth})
    assert 0 < model.efficiency(workers, 1024) <= 1 + 1e-9


@pytest.mark.parametrize("kind", sorted(table()["devices"]))
def test_every_device_of_the_table_can_be_planned_for(kind: str) -> None:
    model = model_of(kind=kind, work={"model.batch_size": 8, "model.activation_bytes": 1e6})
    model.check(8, 8)
    assert 0 < model.step(8, 8).total < 100
    assert all(row["source"] for row in table()["devices"].values())


# --- reading


@pytest.mark.parametrize(("workers", "group_rows"), [(1, 64), (2, 8), (4, 16), (16, 64)])
def test_read_amplification_is_what_the_plan_of_an_epoch_reads(workers: int, group_rows: int) -> None:
    groups = 200
    pairs = np.array([(0, g) for g in range(groups)])
    sizes = np.full(groups, group_rows)
    read = 0
    for rank in range(workers):
        units = order.rank_units("train", pairs, sizes, seed=0, epoch=1, batch_size=16 * workers,
                                 shuffle_window=50 * group_rows, rank=rank, world=workers)  # fmt: skip
        read += sum(len(unit.groups) for unit in units)
    assert read / groups == pytest.approx(read_amplification(workers, group_rows), rel=0.05)


def test_ever_more_workers_read_a_corpus_as_often_as_a_group_has_rows() -> None:
    assert read_amplification(1, 64) == 1
    assert read_amplification(10**6, 64) == pytest.approx(64, rel=1e-3)


def test_the_slowest_of_decoding_and_store_bounds_the_input() -> None:
    source = model_of({"decode.samples_per_core_s": 1}).input(8, 1024)
    assert source.bound == "decoding"
    assert source.slowest == pytest.approx(1024 / (2 * 8 * 1))  # two threads of each of eight workers
    assert model_of({"store.latency_s": 100}).input(8, 1024).bound == "one connection of a worker"
    assert model_of({"store.get_per_s": 1e-3}).input(8, 1024).bound == "the store's requests"


def test_opening_a_corpus_asks_for_every_footer_and_every_row_group() -> None:
    facts = {"store.latency_s": 0.1, "store.open_requests": 3, "store.get_per_s": 1e9}
    model = model_of(facts, {"shards.files": 10, "shards.group_rows": 100, "shards.train": 9000, "shards.valid": 1000})
    assert model.opening_s(1) == pytest.approx(0.1 * (10 * 3 + 100))
    crowded = model_of(facts | {"store.get_per_s": 130.0}, {"shards.files": 10, "shards.group_rows": 100,
                                                            "shards.train": 9000, "shards.valid": 1000})  # fmt: skip
    assert crowded.opening_s(64) == pytest.approx(64)


# --- checkpoints and failures


def test_without_failures_only_checkpoints_cost() -> None:
    assert daly_goodput(60, 1, 1e15, 90) == pytest.approx(60 / 61)


def test_rare_failures_cost_half_an_interval_and_a_restart_each() -> None:
    assert daly_goodput(600, 6, 1e6, 90) == pytest.approx(600 / 606 * (1 - (303 + 90) / 1e6), rel=1e-4)


def test_a_cluster_that_fails_all_the_time_gets_nowhere() -> None:
    assert daly_goodput(600, 6, 1, 90) == 0


def test_youngs_interval_by_hand() -> None:
    model = model_of({"checkpoint.fixed_s": 1, "checkpoint.bytes_per_s": 200e6, "failure.device_mtbf_h": 64 * 2})
    run = model.run(64, 1024)
    assert run.checkpoint_s == pytest.approx(1 + 2 * 4 * 25e6 / 200e6)  # weights and momentum
    assert run.best_interval_s == pytest.approx(math.sqrt(2 * 2 * 7200))


@given(st.floats(1, 1e6), st.floats(1, 100))
def test_more_reliable_devices_never_take_longer(hours: float, factor: float) -> None:
    before, after = (model_of({"failure.device_mtbf_h": h}).run(64, 1024).wall_s for h in (hours, hours * factor))
    assert after <= before * (1 + 1e-9)


# --- what cannot be


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1024 does not divide among 24 workers.*batch_size=1032"):
        model_of().check(24, 1024)
    with pytest.raises(ConfigError, match="does not divide among 2048"):
        model_of().check(2048, 1024)


def test_a_model_that_does_not_fit_is_refused_with_the_bytes() -> None:
    with pytest.raises(ResourceError, match=r"80 GB.*for weights.*activations of 128 samples"):
        model_of(work={"model.activation_bytes": 2e9}).check(8, 1024)
    with pytest.raises(ResourceError, match="80 GB"):
        model_of(work={"model.parameters": 7e9}).check(8, 1024)


def test_a_node_needs_more_cores_than_gpus() -> None:
    with pytest.raises(ConfigError, match="give --cores above 8"):
        model_of({"node.cores": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.shar": 1}, "did you mean 'network.share'"),
        ({"network.share": 1.5}, "0 to 1"),
        ({"device.flops": 0}, "above 0"),
        ({"device.flops": -1}, "above 0"),
        ({"device.flops": float("nan")}, "give a number"),
    ],
)
def test_a_wrong_assumption_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(changes)


# --- what is listed is used


def changed_parts(name: str, value: float, cluster: command.Cluster, kind: str, asked: Any = None) -> bool:
    """Whether the plan, apart from its assumptions, differs for some other value of one."""
    workload = of_numbers(NUMBERS)
    base = command.plan(workload, kind, cluster, None, {}, 64, asked)
    others = [1.0 - value] if name == "collective.tree" else [f * value for f in (1e-2, 0.5, 0.99, 100)]
    if value == 0:
        others = [1.0, 1e-3, 100.0]
    for other in others:
        try:
            plan = command.plan(workload, kind, cluster, None, {name: other}, 64, asked)
        except (ConfigError, ResourceError):
            continue
        if {**plan, "assumptions": 0} != {**base, "assumptions": 0}:
            return True
    return False


@pytest.mark.parametrize(("kind", "per_node"), [("h100", 8), ("cpu", 4)])
def test_every_listed_assumption_changes_the_plan(kind: str, per_node: int) -> None:
    cluster = command.Cluster(kind, 8, per_node, 96 if kind != "cpu" else 16, "ethernet100", "s3")
    plan = command.plan(of_numbers(NUMBERS), kind, cluster, None, {}, 64)
    names = {fact["name"]: fact["value"] for fact in plan["assumptions"]}
    idle = [name for name, value in names.items() if not changed_parts(name, value, cluster, kind)]
    assert not idle
    assert len(names) > 30


def test_every_assumption_has_an_origin() -> None:
    for fact in facts_for("h100", "ib3200", "s3", 96).values():
        assert fact.meaning
        assert fact.origin in ("measured", "data sheet", "documented", "assumed", "given", "counted")
        assert fact.source or fact.origin == "assumed", fact.name


# --- what breaks first


def test_limits_come_in_the_order_in_which_they_are_met() -> None:
    model = model_of()
    found = limits(model, 64, 1024, 64)
    for axis in {limit.axis for limit in found}:
        at = [limit.at for limit in found if limit.axis == axis]
        assert at == sorted(at)
    assert all(limit.remedy for limit in found)


def test_a_slow_network_is_named_as_what_breaks() -> None:
    found = limits(model_of({"network.bytes_per_s": 1e8}, {"model.small_messages": 0}), 8, 1024, 64)
    growing = [limit for limit in found if limit.axis == "devices, growing batch" and "efficiency" in limit.what]
    assert growing[0].at == 9, "the ninth device is on another node"
    assert "gradients" in growing[0].what


def test_a_limit_is_the_first_number_of_devices_that_breaks() -> None:
    model = model_of()
    [limit] = [found for found in limits(model, 64, 1024, 64) if "nodes than Ray" in found.what]
    assert limit.at == 250 * 8 + 1


def test_the_index_fills_a_node_at_the_size_that_can_be_worked_out() -> None:
    model = model_of({"node.memory_bytes": 400e9, "index.bytes_per_row": 250})
    [limit] = [found for found in limits(model, 64, 1024, 64) if "ids and places" in found.what]
    assert limit.at == pytest.approx(200e9 / 8 / 250 * 1e5, rel=0.03)  # half the memory, 8 workers, 100 kB a row


def test_a_corpus_grows_with_its_files() -> None:
    model = model_of()
    grown = scaled(model, 1e14).workload.shards
    assert sum(grown.samples.values()) * grown.bytes_per_sample == pytest.approx(1e14, rel=1e-3)
    assert grown.files == pytest.approx(1e14 / 256e6, rel=0.01)


# --- counting


def workload_on(corpus: str, **changes: Any) -> Workload:
    return of_experiment(resolve(experiment_on(corpus, **changes))[0])


def test_flops_of_a_perceptron_by_hand(corpus: str) -> None:
    found = workload_on(corpus)  # two of 12 -> 16 -> 8 and a head of 16 -> 4
    layers = [12 * 16, 16 * 8]
    head = 16 * 4
    forward = 2 * (2 * sum(layers) + 2 * head)  # the head makes logits of each modality, and fused ones
    # twice the forward for gradients, but none of the input
    backward = 2 * (2 * (layers[0] + 2 * layers[1]) + 2 * head)
    assert found.forward.total_flops(1) == pytest.approx(forward)
    assert found.alone.ops.total_flops(10) == pytest.approx(10 * (forward + backward))
    assert found.parameters == 2 * (12 * 16 + 16 + 16 * 8 + 8) + 16 * 4 + 4
    assert found.alone.updated == found.parameters
    assert found.shards.samples == {"train": 240, "valid": 60, "test": 60}
    assert found.shards.known


def test_joint_training_sends_one_message_of_gradients_and_loss(corpus: str) -> None:
    found = workload_on(corpus)
    assert found.alone.messages.number == 0
    assert found.shared.messages.at(32).tolist() == [4 * (found.parameters + 1)]


def test_synchronised_batch_normalisation_sends_two_messages_per_layer(corpus_with_media: str) -> None:
    small = {"name": "cnn", "channels": [4, 6], "width": 8, "norm": "batch"}
    pictures = {"modalities": {"image": small, "sound": small}, "data": {"cache": "off"}}
    found = workload_on(corpus_with_media, **pictures)
    sizes = sorted(found.shared.messages.at(32).tolist())[:-1]
    forward, backward = [4.0 * (2 * c + 1) for c in (4, 6)], [4.0 * 2 * c for c in (4, 6)]  # how many goes with sums
    assert sizes == sorted([*forward, *backward] * 2)
    assert found.batch_norm == "sync"
    local = workload_on(corpus_with_media, batch_norm="local", **pictures)
    assert local.shared.messages.number == 1
    assert local.shared.ops.kernels < found.shared.ops.kernels


@pytest.mark.parametrize("name", ["aug", "ogm_ge", "g_blend", "gradient_boosting", "reconboost", "pmr"])
def test_methods_are_counted_whatever_they_do(corpus: str, name: str) -> None:
    found = workload_on(corpus, method=SMALL[name])
    assert found.shared.messages.number >= 1
    assert found.alone.ops.total_flops(1) > found.forward.total_flops(1)


def test_work_is_linear_in_the_batch(corpus: str) -> None:
    ops = workload_on(corpus).alone.ops
    assert ops.total_bytes(20) - ops.total_bytes(10) == pytest.approx(ops.total_bytes(30) - ops.total_bytes(20))
    assert ops.total_bytes(0) > 0, "weights are read for the smallest batch"


def test_a_corpus_that_is_not_there_is_planned_from_its_card() -> None:
    content = {"corpus": "cremad", "modalities": {"audio": "cnn", "visual": "cnn"}, "method": "joint"}
    experiment, _ = resolve(content)
    with pytest.raises(DataError, match=r"--set shards\.train"):
        of_experiment(experiment)
    found = of_experiment(experiment, {"shards.train": 6026})
    assert found.shards.samples["train"] == 6026
    assert not found.shards.known
    assert "not prepared" in found.notes[0]


# --- calibration


def measured(kind: str, **values: float) -> dict[str, Any]:
    facts = {"processor": "Test CPU", "cores": 2, "load_before": 0.1}
    listed = {name.replace("__", "."): {"value": value, "note": "test"} for name, value in values.items()}
    return {"format": 1, "measured": "2026-11-21T12:00:00+00:00", "machine": facts, "device": kind, "values": listed}


def test_what_was_measured_on_another_device_holds_for_decoding_and_checkpoints_alone() -> None:
    found = measured("cpu", device__flops=1e9, decode__samples_per_core_s=7.0, checkpoint__fixed_s=3.0)
    gpu = calibrate.applied(facts_for("h100", "ib3200", "s3", 96), found, "h100")
    assert gpu["device.flops"].origin == "data sheet"
    assert (gpu["decode.samples_per_core_s"].value, gpu["checkpoint.fixed_s"].value) == (7.0, 3.0)
    cpu = calibrate.applied(facts_for("cpu", "ib3200", "s3", 2), found, "cpu")
    assert (cpu["device.flops"].value, cpu["device.flops"].origin) == (1e9, "measured")
    assert "2026-11-21 12:00 UTC, Test CPU" in cpu["device.flops"].source


def test_two_steps_give_the_share_of_peak_and_the_time_to_issue() -> None:
    # 100 operations of 1 ms each, and work that runs at a quarter of full speed
    share, issue = calibrate.fit_steps((1.0, 4.0), 100, (0.1 + 4.0, 0.1 + 16.0), serial=True)
    assert (share, issue) == (pytest.approx(0.25), pytest.approx(1e-3))
    assert calibrate.fit_steps((1.0, 4.0), 100, (5.0, 8.0), serial=False) == (0.5, 0.05)


def test_a_calibration_explains_the_step_it_was_made_of(corpus: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibrate, "collectives", lambda device: {"collective.call_s": (1e-3, "test")})
    monkeypatch.setattr(calibrate, "_CHECKPOINT", (2**16, 2**20))
    monkeypatch.setattr(calibrate, "_DECODE_S", 0.1)
    experiment, _ = resolve(experiment_on(corpus, batch_size=64))
    workload = of_experiment(experiment)
    found = calibrate.calibrate(experiment, workload, str(tmp_path / "runs"), "cpu", lambda text: None)
    place = str(tmp_path / "calibration.json")
    calibrate.save(found, place)
    facts = calibrate.applied(facts_for("cpu", "ethernet100", "disk", 1), calibrate.load(place) or {}, "cpu")
    assert {facts[f"device.{n}"].origin for n in ("flops", "bytes_per_s", "share", "kernel_s")} == {"measured"}
    assert facts["collective.call_s"].value == 1e-3
    assert facts["decode.samples_per_core_s"].value > 0
    assert not any((tmp_path / "runs").iterdir()), "what was written to measure is gone"
    step = Model(workload, facts.changed({"node.cores": 1}), 1, cpu=True).step(1, 64)
    noted = found["values"]["device.share"]["note"]
    measured_s = float(noted.rsplit(" and ", 1)[1].split()[0])
    assert step.compute + step.optimizer == pytest.approx(measured_s, rel=0.3)


def test_processes_are_measured_while_they_exchange_messages() -> None:
    small, large = calibrate._all_reduces(2, "cpu")
    assert 0 < small < large


def test_collectives_are_explained_by_calls_hops_and_bandwidth(monkeypatch: Any) -> None:
    monkeypatch.setattr(calibrate.os, "cpu_count", lambda: 4)
    call, hop, rate = 1e-4, 2e-5, 1e9  # bytes/s of all together
    times = {w: call + 2 * (w - 1) * hop for w in (2, 4)}
    monkeypatch.setattr(
        calibrate,
        "_all_reduces",
        lambda w, device: (times[w], times[w] + 2 * (w - 1) * calibrate.LARGE / rate),
    )
    found = calibrate.collectives(torch.device("cpu"))
    assert found["collective.call_s"][0] == pytest.approx(call)
    assert found["node.link_latency_s"][0] == pytest.approx(hop)
    assert found["node.link_bytes_per_s"][0] == pytest.approx(rate)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99, "values": {}}', '{"format": 1, "values": {"a": {}}}'])
def test_a_damaged_calibration_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"c\.json is no calibration"):
        calibrate.load(str(file))


# --- the command


def by_numbers(**changes: float) -> list[str]:
    return [part for name, value in (NUMBERS | changes).items() for part in ("--set", f"{name}={value}")]


def test_a_plan_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_plan(capsys, *by_numbers(), "--gpu", "h100", "--nodes", "8", "--price", "2")
    assert found["devices"] == 64
    assert found["samples_per_s"] == pytest.approx(1024 / found["step"]["total"])
    assert found["cost"] == pytest.approx(2 * found["device_hours"])
    assert sum(v for k, v in found["step"].items() if k not in ("total", "all_reduce_gradients_s")) == pytest.approx(
        found["step"]["total"]
    )
    assert found["calibrated"] is None


def test_a_plan_in_words_says_where_its_numbers_are_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    with pytest.raises(SystemExit):
        main(["plan", *by_numbers(), "--gpu", "a100", "--set", "network.share=0.5", "--plot", str(picture)])
    said = capsys.readouterr().out
    for words in ("what breaks first", "NVIDIA A100 data sheet", "[given: --set]", "nothing is calibrated", "Young"):
        assert words in said
    assert max(map(len, said.splitlines())) < 200
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_of_an_experiment_and_a_sweep(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(experiment_on(corpus, batch_size=32)))
    sweep = {"experiment": "base.yaml", "vary": {"optim.lr": [0.1, 0.2, 0.4]}, "seeds": [0, 1],
             "resources": {"workers": 2, "gpus": 1}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    found = run_plan(capsys, "--sweep", str(tmp_path / "sweep.yaml"), "--gpu", "l4", "--set", "epochs=4")
    assert found["work"]["epochs"] == 4
    assert found["sweep"]["trials"] == 6
    assert found["sweep"]["at_once"] == 4, "eight devices, two for each"
    assert found["sweep"]["wall_s"] == pytest.approx(2 * found["sweep"]["run_s"])
    assert "store.put_per_s" in {fact["name"] for fact in found["assumptions"]}


def test_a_larger_corpus_of_the_same_kind_takes_longer(corpus: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(experiment_on(corpus, data={"cache": "auto"})))
    file = [str(tmp_path / "base.yaml"), "--gpu", "t4", "--per-node", "4"]
    small, large = run_plan(capsys, *file), run_plan(capsys, *file, "--set", "shards.train=1e9")
    assert large["run"]["epoch_s"] > 1e5 * small["run"]["epoch_s"]
    assert small["work"]["cached"] and not large["work"]["cached"]
    assert large["work"]["samples"]["train"] == 10**9


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name an experiment file"),
        (["--gpu", "h10", *by_numbers()], 2, "did you mean 'h100'"),
        (by_numbers(), 2, "say what it would run on with --gpu"),
        (["--gpu", "h100", "--set", "network.latncy_s=1", *by_numbers()], 2, "did you mean 'network.latency_s'"),
        (["--gpu", "h100", "--set", "network.latency_s=fast", *by_numbers()], 2, "give a number"),
        (["--gpu", "h100", "--network", "token-ring", *by_numbers()], 2, "--network is 'token-ring'"),
        (["--gpu", "t4", "--precision", "bf16", *by_numbers()], 2, "has no bfloat16"),
        (["--gpu", "h100", "--calibration", "/nonexistent.json", *by_numbers()], 2, "no such file"),
        (["--gpu", "h100", "--nodes", "3", *by_numbers()], 2, "does not divide among 24 workers"),
        (["--gpu", "t4", *by_numbers(**{"model.activation_bytes": 1e9})], 4, "a device has 16 GB"),
        (["--gpu", "h100", "--set", "batch_size=8", *by_numbers()], 2, "changes an experiment; name its file"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_reason(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(3.35e12, "B/s", "3.35 TB/s"), (2e-5, "s", "20 us"), (0.0123, "s", "12.3 ms"), (0, "s", "0 s"), (0.5, "", "0.5"),
     (5500, "1/s", "5,500 1/s"), (50676.6, "h", "50,677 h"), (250, "B", "250 B"), (7.5, "s", "7.5 s")],
)  # fmt: skip
def test_quantities_read_well(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_facts_are_listed_when_they_were_asked_for() -> None:
    facts = facts_for("h100", "ib3200", "s3", 96)
    assert facts.listed() == []
    facts.number("device.share")
    assert [fact.name for fact in facts.listed()] == ["device.share"]
    assert isinstance(facts.changed({}), Facts)
    assert replace(facts["device.share"], value=1.0).value == 1.0
