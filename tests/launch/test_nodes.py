"""Nodes come and go, and the run goes on to the same result. One cluster, a head and two worker nodes, for the file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import SECRET, new_folder, settings, write_corpus
from tests.launch.nodes import Node, Nodes, as_client, wait_for
from tests.launch.runs import same_bits, weights

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import CounterpoiseError, Moved, NonFiniteLossError
from counterpoise.engine.job import Job
from counterpoise.engine.local import run_local
from counterpoise.engine.run import RunFolder
from counterpoise.launch import submit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

# Eight batches an epoch. It learns calmly, so that rounding stays rounding.
CALM: dict[str, Any] = {"method": {"name": "aug", "hidden": 16, "check_every": 2}, "optim": {"lr": 0.01}, "epochs": 5}
RIGHT_AWAY = {"grow_s": 1.0, "wait_s": 120.0}


def cloud(moto: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="module")
def nodes(moto: str) -> Iterator[Nodes]:
    with Nodes(head=1, workers=(2, 2), environment=cloud(moto)) as nodes, as_client(nodes):
        yield nodes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def content(place: Path) -> dict[str, Any]:
    return settings(write_corpus(place / "corpus"), **CALM)


MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def job(place: Path, content: dict[str, Any]) -> MakeJob:
    def make(name: str, *, runs: str | None = None, resume: bool = False, **changes: Any) -> Job:
        experiment, provenance = resolve({**content, **changes})
        root: Any = runs or str(place / "runs")
        folder = new_folder(root, experiment, provenance, name)
        return Job(experiment.to_json(), folder.uri, resume, 3600.0, threads=1)

    return make


@pytest.fixture(scope="module")
def alone(job: MakeJob) -> Job:
    made = job("alone")
    run_local([made])
    return made


@pytest.fixture(scope="module")
def four(job: MakeJob) -> Job:
    """By four plain processes of torch.distributed on this machine."""
    made = job("four")
    run_local([made], workers=4)
    return made


@pytest.fixture(scope="module")
def two(job: MakeJob) -> Job:
    made = job("two")
    run_local([made], workers=2)
    return made


def train(nodes: Nodes, *jobs: Job, blows: Mapping[str, Any] | None = None, **more: Any) -> list[Any]:
    from counterpoise.launch.train import run_ray

    return run_ray(jobs, address=nodes.address, blows=blows, **{**RIGHT_AWAY, **more})


def blow(kind: str, step: int, rank: int = -1, spare: str = "", name: str = "") -> dict[str, Any]:
    return {"name": name or kind, "kind": kind, "step": step, "rank": rank, "spare": spare}


def landed(job: Job, name: str) -> dict[str, Any]:
    return dict(RunFolder(job.run).read_json(f"logs/blow-{name}.json"))


def close(a: Job, b: Job) -> bool:
    left, right = weights(a), weights(b)
    return all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


def records(job: Job, kind: str) -> list[Any]:
    return [r for r in RunFolder.open(job.run).records() if r["kind"] == kind]


def decided(job: Job) -> list[Any]:
    found = [(d["epoch"], d["action"], d["add"], d["classifiers"]) for d in records(job, "decision")]
    assert found, "AUG decided nothing, so nothing about decisions was tested"
    return found


def sizes(job: Job) -> list[tuple[int | None, int]]:
    """Workers before and after every continuation."""
    return [(e.get("workers_before"), e["workers"]) for e in records(job, "event") if e["event"] == "resumed"]


@pytest.mark.slow
@pytest.mark.s3
def test_workers_on_two_nodes_with_data_and_runs_in_a_bucket_do_what_one_machine_does(
    nodes: Nodes, bucket: str, place: Path, content: dict[str, Any], job: MakeJob, alone: Job, four: Job
) -> None:
    for file in (place / "corpus").iterdir():
        storage.write_bytes(f"{bucket}/corpus/{file.name}", file.read_bytes())
    there = job("there", runs=f"{bucket}/runs", corpus=f"{bucket}/corpus")
    killed = job("killed", runs=f"{bucket}/runs", corpus=f"{bucket}/corpus")
    struck = {killed.run: [blow("worker", 13, 3, name="last"), blow("worker", 22, 0, name="first")]}
    train(nodes, there, killed, workers=4, blows=struck)

    assert same_bits(four, there)
    assert decided(four) == decided(there) == decided(alone)
    assert close(alone, there)

    assert {landed(killed, name)["step"] for name in ("last", "first")} == {13, 22}
    assert sizes(killed) == [(None, 4), (None, 4)]
    assert [e["after"] for e in records(killed, "event") if e["event"] == "resumed"] == [
        f"worker {rank} on {landed(killed, name)['node']} died" for rank, name in ((3, "last"), (0, "first"))
    ]
    assert same_bits(four, killed)
    for name, size in RunFolder(killed.run).files().items():
        assert size > 10**6 or SECRET.encode() not in storage.read_bytes(f"{killed.run}/{name}"), name


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers_when_a_node_dies_and_with_all_when_one_comes(
    nodes: Nodes, job: MakeJob, alone: Job
) -> None:
    elastic = job("elastic")
    struck = [blow("node", 12, spare=nodes.head.node_id), blow("hold", 21, 0)]
    folder = RunFolder(elastic.run)

    def bring_another() -> None:
        wait_for(lambda: storage.exists(folder.at("logs/blow-hold.json")), 300)
        dead = next(node for node in nodes.workers if node.ip == landed(elastic, "node")["node"])
        dead.kill()  # what is left of it
        nodes.workers.remove(dead)
        nodes.add(2)
        time.sleep(4)  # until the run has seen it twice
        storage.write_text(folder.at("logs/blow-hold-go"), "")

    helper = threading.Thread(target=bring_another, daemon=True)
    helper.start()
    train(nodes, elastic, workers=4, min_workers=2, max_failures=1, blows={elastic.run: struck})
    helper.join()

    assert sizes(elastic) == [(4, 2), (2, 4)]
    first, second = (e for e in records(elastic, "event") if e["event"] == "resumed")
    assert first["after"].endswith(f"node {landed(elastic, 'node')['node']} is gone")
    assert second["after"] == "there is room for 4 workers"
    assert second["step"] > 21, "growing must repeat nothing"
    assert decided(elastic) == decided(alone)
    assert close(alone, elastic)
    assert [r["train"]["samples"] for r in records(elastic, "epoch")] == [240] * CALM["epochs"]


@pytest.mark.slow
def test_a_notice_of_preemption_moves_the_run_with_a_checkpoint_and_counts_as_no_failure(
    nodes: Nodes, job: MakeJob, two: Job
) -> None:
    moved = job("moved")
    folder = RunFolder(moved.run)
    left: list[Node] = []

    def take_away() -> None:
        wait_for(lambda: storage.exists(folder.at("logs/blow-hold.json")), 300)
        left.extend(node for node in nodes.workers if node.ip == landed(moved, "hold")["node"])
        left[0].drain(60)
        time.sleep(3)
        storage.write_text(folder.at("logs/blow-hold-go"), "")

    helper = threading.Thread(target=take_away, daemon=True)
    helper.start()
    train(nodes, moved, workers=2, max_failures=0, blows={moved.run: [blow("hold", 13, 0)]})
    helper.join()

    [event] = [e for e in records(moved, "event") if e["event"] == "resumed"]
    assert f"node {left[0].ip}" in event["after"] and "will be taken away" in event["after"]
    assert event["step"] >= 13, "a checkpoint must be written before the node goes"
    assert same_bits(two, moved)
    left[0].kill()
    nodes.workers.remove(left[0])
    nodes.add(2)


@pytest.mark.slow
def test_a_command_whose_driver_was_killed_is_given_again_and_goes_on(
    nodes: Nodes, place: Path, content: dict[str, Any], two: Job
) -> None:
    (place / "again.yaml").write_text(yaml.safe_dump({**content}))
    runs = ["--runs", str(place / "runs"), "--name", "again", "--auto-resume", "--metrics-port", "off"]
    ray = ["--engine", "ray", "--workers", "2", "--threads", "1", "--address", nodes.address]
    argv = [sys.executable, "-m", "counterpoise", "train", str(place / "again.yaml"), *runs, *ray]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            argv, env=nodes.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=place
        )

    folder = RunFolder(str(place / "runs" / "again"))
    driver = start()
    wait_for(lambda: driver.poll() is not None or folder.read_status().get("epoch", 0) > 1, 300)
    assert driver.poll() is None, driver.communicate()[0]
    owner = folder.read_status()["pid"]
    driver.kill()
    driver.communicate()
    again = start()
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert folder.state() == "finished" and not Path("/proc", str(owner)).exists()
    assert sizes(Job({}, folder.uri)) in ([(None, 2)], [])  # none if it was killed before its first checkpoint
    assert same_bits(two, Job({}, folder.uri))

    once_more = start()
    output, _ = once_more.communicate(timeout=100)
    assert once_more.returncode == 0 and "has finished; nothing is left to do" in output


# --- slow: `poe slow`


@pytest.mark.slow
@pytest.mark.s3
def test_hosts_that_share_nothing_but_a_network_and_a_bucket_do_it_too(
    job: MakeJob, place: Path, alone: Job, four: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers on two hosts, in network namespaces and under host names of their own; then one host dies."""
    import fsspec
    from moto.server import ThreadedMotoServer

    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(Nodes(head=0, workers=(), namespaces=True))
        server = ThreadedMotoServer(hosts.head_ip, 0, verbose=False)
        server.start()
        stack.callback(server.stop)
        environment = cloud("http://{}:{}".format(*server.get_host_and_port()))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of this environment's python
        hosts.environment.update({**environment, "PATH": path})
        stack.enter_context(as_client(hosts))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        stack.callback(fsspec.get_filesystem_class("s3").clear_instance_cache)
        storage.filesystem("s3://x")[0].mkdir("hosts")
        for _ in range(2):
            hosts.add(3)
        for file in (place / "corpus").iterdir():
            storage.write_bytes(f"s3://hosts/corpus/{file.name}", file.read_bytes())
        whole, struck = (job(name, runs="s3://hosts/runs", corpus="s3://hosts/corpus") for name in ("whole", "struck"))
        for name in ("first", "last"):
            storage.write_text(RunFolder(whole.run).at(f"logs/blow-{name}-go"), "")  # they only say where they are
        train(
            hosts,
            whole,
            workers=4,
            blows={whole.run: [blow("hold", 3, 0, name="first"), blow("hold", 3, 3, name="last")]},
        )
        assert {landed(whole, name)["host"] for name in ("first", "last")} == {"node-2", "node-3"}, "on both hosts"
        assert same_bits(four, whole) and decided(alone) == decided(whole)

        order = submit.Order(["evaluate", whole.run, "--split", "valid"], "elsewhere", cpus=1)  # the head has none
        client, said = submit.connect(hosts.dashboard), list[str]()
        with submit.packed(order) as (package, _):
            ended = submit.follow(client, submit.send(client, order, package), said.append, said.append)
        assert submit.exit_code(ended) == 0 and ended.driver_node_id != hosts.head.node_id, said
        assert "60 samples" in "".join(said), "the log of a driver on another node is followed too"

        blows = {struck.run: [blow("worker", 11, 0), blow("node", 20, spare=hosts.head.node_id)]}
        train(hosts, struck, workers=4, min_workers=2, blows=blows)
        assert sizes(struck) == [(None, 4), (4, 2)]  # of three CPUs one is for reading
        assert decided(struck) == decided(alone) and close(alone, struck)


@pytest.mark.slow
def test_a_sweep_keeps_what_has_finished_when_a_node_dies_and_does_the_rest_elsewhere(
    nodes: Nodes, place: Path, content: dict[str, Any]
) -> None:
    import json

    (place / "base.yaml").write_text(yaml.safe_dump({**content, "epochs": 40}))
    (place / "six.yaml").write_text(yaml.safe_dump({"experiment": "base.yaml", "seeds": list(range(6))}))
    runs = place / "sweeps"
    flags = ["--runs", str(runs), "--name", "six", "--address", nodes.address, "--metrics-port", "off"]
    argv = [sys.executable, "-m", "counterpoise", "sweep", str(place / "six.yaml"), *flags]
    pipe = subprocess.PIPE
    sweep = subprocess.Popen(argv, env=nodes.environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=place)

    def states() -> dict[str, str]:
        file = runs / "six" / "sweep.json"
        return {e["name"]: e["state"] for e in json.loads(file.read_text())["trials"]} if file.exists() else {}

    wait_for(lambda: sweep.poll() is not None or "finished" in states().values(), 500)
    assert sweep.poll() is None, sweep.communicate()[0]
    done = [RunFolder(str(runs / "six" / name)) for name, state in states().items() if state == "finished"]
    before = {folder.name: folder.digest("summary.json") for folder in done}
    nodes.workers[0].kill()
    nodes.workers.pop(0)
    output, _ = sweep.communicate(timeout=800)
    assert sweep.returncode == 0, output
    assert set(states().values()) == {"finished"} and len(states()) == 6
    assert {name: RunFolder(str(runs / "six" / name)).digest("summary.json") for name in before} == before
    nodes.add(2)


# --- without a cluster


def failed(**failures: Any) -> Any:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("workers failed", {int(rank[1:]): error for rank, error in failures.items()})


def test_only_real_failures_count_and_an_error_of_ours_is_not_tried_again() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import FailureConfig
    from ray.train.v2._internal.execution.failure_handling import FailureDecision

    from counterpoise.launch.trainer import Policy
    from counterpoise.launch.worker import WorkerLost

    config: Any = FailureConfig(max_failures=1)
    policy = Policy(config)
    policy.workers = {0: "10.0.0.1", 1: "10.0.0.2"}
    lost = WorkerLost("rank 0 lost the connection")
    for _ in range(3):
        moved = Moved("going on elsewhere", "node 10.0.0.2 will be taken away")
        assert policy.make_decision(failed(r0=moved)) == FailureDecision.RETRY
    assert policy.after == "node 10.0.0.2 will be taken away" and policy.lost == []
    assert policy.make_decision(failed(r0=lost, r1=ActorDiedError())) == FailureDecision.RETRY
    assert policy.after == "worker 1 on 10.0.0.2 died"
    assert policy.make_decision(failed(r0=lost, r1=NonFiniteLossError("nan"))) == FailureDecision.RAISE
    assert policy.make_decision(failed(r0=lost)) == FailureDecision.RAISE
    assert policy.lost == ["worker 1 on 10.0.0.2 died", "the connection between workers broke"]

    unlimited: Any = FailureConfig(max_failures=-1)
    patient = Policy(unlimited)
    assert all(patient.make_decision(failed(r1=ActorDiedError())) == FailureDecision.RETRY for _ in range(9))


def test_workers_that_ran_out_of_memory_twice_are_not_started_a_third_time() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train import FailureConfig
    from ray.train.v2._internal.execution.failure_handling import FailureDecision

    from counterpoise.launch.trainer import Policy

    unlimited: Any = FailureConfig(max_failures=-1)
    policy = Policy(unlimited)
    assert policy.make_decision(failed(r1=OutOfMemoryError("low on memory"))) == FailureDecision.RETRY
    assert policy.make_decision(failed(r1=OutOfMemoryError("low on memory"))) == FailureDecision.RAISE


def test_the_end_of_the_budget_says_what_died_how_often_and_how_to_go_on() -> None:
    from counterpoise.launch.train import _ours

    died = "worker 1 on 10.0.0.2 died"
    error = _ours(failed(r1=RuntimeError("gone")), [], [died, died, "the connection between workers broke"])
    assert isinstance(error, CounterpoiseError) and error.exit_code == 1
    assert str(error).startswith(
        "workers died (killed, or out of memory), and they were replaced 2 times, as --max-failures has it: "
        f"2 times: {died}; the connection between workers broke. The last checkpoint is kept: continue with --resume"
    )


@pytest.mark.parametrize(
    ("free", "most", "there", "expected"),
    [
        ({"a": {"CPU": 2}, "b": {"CPU": 2}, "head": {"CPU": 1}}, 4, 0, 4),
        ({"a": {"CPU": 2}, "b": {"CPU": 2}}, 4, 0, 3),  # reading needs a CPU too
        ({"a": {"CPU": 1.5}, "b": {"CPU": 0.5}}, 4, 0, 1),  # a worker is on one node
        ({"a": {"CPU": 4}}, 2, 0, 2),
        ({}, 4, 0, 0),
        ({"a": {"CPU": 2}}, 2, 2, 1),  # two stand on the rest of it
    ],
)
def test_room_is_counted_node_by_node(free: Any, most: int, there: int, expected: int) -> None:
    from counterpoise.launch.room import fitting

    totals = {node: {"CPU": have["CPU"] + (2 if there else 0)} for node, have in free.items()}
    assert fitting(free, {"CPU": 1}, most, totals, there) == expected


def test_workers_with_gpus_need_both() -> None:
    from counterpoise.launch.room import fitting

    free = {"a": {"CPU": 32, "GPU": 4}, "b": {"CPU": 2, "GPU": 4}, "head": {"CPU": 8}}
    assert fitting(free, {"CPU": 1, "GPU": 1}, 16, free) == 6
