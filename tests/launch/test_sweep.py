"""Sweeps on Ray: what comes out of a trial is what comes out without a sweep. One cluster for most of the file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import SECRET, Run, settings
from tests.launch.nodes import wait_for

from counterpoise.cli import main
from counterpoise.engine import checkpoint
from counterpoise.engine.job import Job
from counterpoise.engine.run import RunFolder
from counterpoise.start import Settings
from counterpoise.storage import join, read_bytes
from counterpoise.sweep import run_sweep
from counterpoise.sweepfile import ask

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from counterpoise.launch.cluster import cluster

    with cluster(workers=3, tasks=4):
        yield


@pytest.fixture
def place(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=3)))
    return tmp_path


Sweeping = Callable[..., bool]


@pytest.fixture
def sweep(place: Path, ray_cluster: None) -> Sweeping:
    """sweep(name, {content of the sweep file}, sets=(), ...) -> whether no trial failed."""

    def call(name: str, content: dict[str, Any] | None, sets: tuple[str, ...] = (), **more: Any) -> bool:
        asked = None
        if content is not None:
            (place / f"{name}.yaml").write_text(yaml.safe_dump({"experiment": "base.yaml", **content}))
            asked = ask(str(place / f"{name}.yaml"), None, sets, None, None)
        more.setdefault("max_concurrent", 2)
        return run_sweep(asked=asked, settings=Settings("ray"), runs=str(place / "runs"), name=name, **more)

    return call


def saved(place: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "runs" / name / "sweep.json").read_text())
    return content


def entries(place: Path, name: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in saved(place, name)["trials"]}


def weights(uri: str | Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(RunFolder.open(str(uri)).checkpoints)
    assert found is not None
    return dict(found.tensors["model"])


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_trials_are_ordinary_runs_with_the_bits_of_a_run_alone(
    sweep: Sweeping, place: Path, corpus: str, run_experiment: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "vary": {"method": ["joint", "aug"]},
        "seeds": [0, 1],
        "title": "Two methods",
        "report": {"rows": {"aug": "AUG"}},
    }
    assert sweep("grid", content)
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[2:4]] == [["joint", "2"], ["aug", "2"]]

    found = entries(place, "grid")
    assert list(found) == ["joint-seed0", "aug-seed0", "joint-seed1", "aug-seed1"]
    assert {(e["state"], e["tries"], e["error"]) for e in found.values()} == {("finished", 1, None)}
    assert all(0 < e["time_s"] < 500 and e["epoch"] == 3 for e in found.values())
    assert saved(place, "grid")["report"] == {"rows": {"aug": "AUG"}} and saved(place, "grid")["title"] == "Two methods"
    for name, entry in found.items():
        alone = run_experiment(
            settings(corpus, epochs=3), [f"method.name={name.split('-')[0]}", f"seed={entry['seed']}"]
        )
        folder = RunFolder.open(str(place / "runs" / "grid" / name))
        assert equal(weights(folder.uri), alone.weights), name
        assert folder.manifest["sweep"] == {"name": "grid", "trial": name, "vary": entry["vary"]}
        assert folder.manifest["digest"] == alone.experiment.digest
        assert entry["selected"] == alone.summary["valid"]["accuracy"]["fused"]
        assert not folder.verify()
    assert "Two methods" in (place / "runs" / "grid" / "report.html").read_text()

    before = {name: (place / "runs" / "grid" / name / "records.jsonl").stat().st_mtime_ns for name in found}
    assert sweep("grid", None, resume=True)
    after = {name: (place / "runs" / "grid" / name / "records.jsonl").stat().st_mtime_ns for name in found}
    assert before == after, "what has finished is not run again"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(place / "runs" / "grid"), "-o", str(place / "r.html")])
    assert not ended.value.code


def test_a_trial_that_fails_is_reported_and_one_whose_process_dies_goes_on(
    sweep: Sweeping, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        folder = RunFolder(str(place / "runs" / "bad" / "aug-seed0"))
        end = time.monotonic() + 200
        while time.monotonic() < end and folder.read_status().get("epoch", 0) < 2:
            time.sleep(0.02)
        os.kill(folder.read_status()["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    vary = {"method": ["joint:optim.lr=1e30", "joint", "aug"]}
    assert not sweep("bad", {"vary": vary}, ("epochs=20",), max_concurrent=3)
    killer.join()
    found = entries(place, "bad")
    assert found["joint-seed0"]["state"] == "finished" and found["joint-seed0"]["tries"] == 1
    broken = found["joint-optim.lr1e30-seed0"]
    assert broken["state"] == "failed" and broken["tries"] == 1, "the same seed takes the same steps: tried once"
    assert "is not finite" in broken["error"]
    assert found["aug-seed0"]["state"] == "finished" and found["aug-seed0"]["tries"] == 2
    assert "died" in found["aug-seed0"]["error"]
    assert [
        r["event"] for r in RunFolder.open(str(place / "runs/bad/aug-seed0")).records() if r["kind"] == "event"
    ] == ["resumed"]
    printed = capsys.readouterr()
    assert "failed: joint-optim.lr1e30-seed0 after 1 try: loss" in printed.err
    assert "joint-optim.lr1e30-seed0 is failed" in printed.out


def test_halving_stops_at_equal_epochs_and_leaves_the_stopped_out(
    sweep: Sweeping, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vary = {"optim.lr": [0.05, 0.0001, 0.04, 0.00005]}
    asha = {"name": "asha", "grace": 1, "factor": 2}
    assert sweep("asha", {"vary": vary, "scheduler": asha}, ("epochs=4",), max_concurrent=1)
    found = entries(place, "asha")
    states = {name: entry["state"] for name, entry in found.items()}
    assert states["lr0.05-seed0"] == "finished"
    stopped = {name for name, state in states.items() if state == "stopped"}
    assert {"lr0.0001-seed0", "lr5e-05-seed0"} <= stopped
    for name in stopped:
        folder = RunFolder.open(str(place / "runs" / "asha" / name))
        assert folder.state() == "stopped" and not folder.is_locked()
        epochs = [r["epoch"] for r in folder.records() if r["kind"] == "epoch"]
        assert epochs[-1] in (1, 2) and epochs[-1] == found[name]["epoch"], "at a rung, with its numbers kept"
        assert [r["by"] for r in folder.records() if r.get("event") == "stopped"] == ["asha"]
    table = capsys.readouterr().out
    assert "optim.lr=0.05" in table and "\noptim.lr=0.0001" not in table
    assert f"{len(stopped)} trials were stopped early by asha" in table

    assert sweep("asha", None, resume=True)
    assert {name: entry["state"] for name, entry in entries(place, "asha").items()} == states


def test_the_worse_half_of_a_population_goes_on_from_the_better_with_its_classifiers(
    sweep: Sweeping, place: Path
) -> None:
    pbt = {"name": "pbt", "interval": 2, "quantile": 0.5, "mutate": {"optim.lr": {"log_uniform": [0.001, 0.1]},
           "method.lam": {"uniform": [0.1, 1.0]}}}  # fmt: skip
    content = {"vary": {"optim.lr": [1e-6, 0.05]}, "scheduler": pbt}
    sets = ("method=aug", "epochs=5", "method.sigma=5.0")
    assert sweep("pbt", content, sets)
    rounds = saved(place, "pbt")["rounds"]
    assert [made["epoch"] for made in rounds] == [2, 4] and all(made["done"] for made in rounds)
    [step] = rounds[0]["exploits"]
    assert (step["run"], step["from"]) == ("lr1e-06-seed0", "lr0.05-seed0")
    assert 0.001 <= step["changes"]["optim.lr"] <= 0.1 and 0.1 <= step["changes"]["method.lam"] <= 1.0
    folder = RunFolder.open(str(place / "runs" / "pbt" / step["run"]))
    records = folder.records()
    event = next(r for r in records if r.get("event") == "exploited")
    assert event["from"] == step["from"] and event["epoch"] == 2 and event["changes"] == step["changes"]
    theirs = RunFolder.open(str(place / "runs" / "pbt" / step["from"])).records()
    grown = next(r for r in reversed(theirs) if r["kind"] == "decision" and r["epoch"] <= 2)["classifiers"]
    assert event["classifiers"] == grown and sum(grown.values()) > 2
    third = next(r for r in records if r["kind"] == "epoch" and r["epoch"] == 3)
    assert third["classifiers"] == grown and third["lr"] == pytest.approx(step["changes"]["optim.lr"])
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1, 2, 3, 4, 5]
    assert (
        yaml.safe_load(folder.experiment_text)["method"]["lam"]
        == yaml.safe_load((place / "runs" / "pbt" / step["run"] / "experiment.yaml").read_text())["method"]["lam"]
    )
    assert (place / "runs" / "pbt" / step["run"] / "changes.json").exists()


def test_optuna_asks_for_the_same_points_again_and_for_more(sweep: Sweeping, place: Path) -> None:
    space = {"optim.lr": {"log_uniform": [0.001, 0.1]}, "batch_size": {"choice": [16, 32]}}
    search = {"name": "optuna", "trials": 2, "batch": 2, "space": space}
    content = {"search": search, "seeds": [0, 1]}
    assert sweep("tpe", content, ("epochs=1",), max_concurrent=3)
    first = entries(place, "tpe")
    assert len(first) == 4 and {entry["state"] for entry in first.values()} == {"finished"}
    points = {entry["point"]: entry["vary"] for entry in first.values()}
    assert sorted(points) == [0, 1]
    assert all(0.001 <= vary["optim.lr"] <= 0.1 and vary["batch_size"] in (16, 32) for vary in points.values())

    search["trials"] = 3
    assert sweep("tpe", content, ("epochs=1",), max_concurrent=1, resume=True)
    more = entries(place, "tpe")
    assert {name: more[name]["vary"] for name in first} == {name: e["vary"] for name, e in first.items()}
    assert len(more) == 6 and all(more[name]["time_s"] == first[name]["time_s"] for name in first)


def test_a_trial_of_two_workers_is_a_run_of_ray_train(sweep: Sweeping, place: Path, corpus: str) -> None:
    from counterpoise.config import resolve
    from counterpoise.engine.local import run_local

    content = {"resources": {"workers": 2, "cpus": 0.5}}
    assert sweep("two", content, ("method=aug",), max_concurrent=1)
    experiment, _ = resolve(settings(corpus, epochs=3), ["method=aug"])
    folder = RunFolder.create(str(place), "alone", experiment_text=yaml.safe_dump(experiment.to_json()),
                              provenance={}, manifest={})  # fmt: skip
    run_local([Job(experiment.to_json(), folder.uri, threads=1)], workers=2)
    assert equal(weights(place / "runs" / "two" / "run-seed0"), weights(folder.uri))
    assert RunFolder.open(str(place / "runs" / "two" / "run-seed0")).manifest["workers"] == 2


# --- schedulers


class Member:
    """A trial, as far as a scheduler looks at it."""

    def __init__(self, name: str) -> None:
        self.trial_id, self.config = name, {"order": json.dumps({"name": name})}


def result(epoch: int, valid: float) -> dict[str, Any]:
    return {"state": "running", "epoch": epoch, "valid": valid, "selected": valid, "tries": 1}


@pytest.mark.parametrize(
    ("asked", "past"),
    [
        ({"name": "median", "grace": 2, "least": 3}, [0.6, 0.7, 0.8]),
        ({"name": "asha", "grace": 2, "factor": 2.0}, [0.6, 0.7, 0.8]),
    ],
    ids=["median", "asha"],
)
def test_a_scheduler_knows_what_earlier_processes_saw_and_compares_equal_epochs(
    asked: dict[str, Any], past: list[float]
) -> None:
    from counterpoise.launch.tune import make_scheduler

    before = {f"t{i}": [result(epoch, valid) for epoch in (1, 2, 3)] for i, valid in enumerate(past)}
    scheduler: Any = make_scheduler(asked, 4, {**before, "on": [result(1, 0.75)]}, list(before), None)
    for name, valid, decision in (("good", 0.9, "CONTINUE"), ("bad", 0.1, "STOP"), ("on", 0.75, "CONTINUE")):
        trial = Member(name)
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_add(None, trial)  # as after the death of its process
        assert scheduler.on_trial_result(None, trial, result(1, valid)) == "CONTINUE", "within the grace period"
        assert scheduler.on_trial_result(None, trial, result(2, valid)) == decision
    failed = Member("failed")
    scheduler.on_trial_add(None, failed)
    scheduler.on_trial_complete(None, failed, {"state": "failed", "error": "no room", "tries": 3, "done": True})
    last = Member("last")
    scheduler.on_trial_add(None, last)
    scheduler.on_trial_result(None, last, result(1, 0.5))
    assert scheduler.on_trial_result(None, last, result(2, 0.9)) == "CONTINUE"


# --- commands of their own, with clusters of their own


def command(place: Path, *arguments: str, wait: bool = True) -> Any:
    argv = [sys.executable, "-m", "counterpoise", "sweep", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = subprocess.Popen(
        argv, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=environment,
    )  # fmt: skip
    return (started, started.communicate(timeout=400)[0]) if wait else started


def test_a_sweep_whose_command_is_killed_goes_on_to_the_same_result(
    place: Path, corpus: str, run_experiment: Run
) -> None:
    content = {"experiment": "base.yaml", "vary": {"method": ["joint", "aug"]}, "seeds": [0]}
    (place / "killed.yaml").write_text(yaml.safe_dump(content))
    started = command(
        place, "killed.yaml", "--name", "killed", "--set", "epochs=30", "--max-concurrent", "2", wait=False
    )
    folder = RunFolder(str(place / "runs" / "killed" / "aug-seed0"))
    wait_for(lambda: started.poll() is not None or folder.read_status().get("epoch", 0) > 3)
    assert started.poll() is None, started.communicate()[0]
    os.killpg(started.pid, signal.SIGKILL)
    started.communicate()
    again, output = command(place, "--name", "killed", "--resume")
    assert again.returncode == 0, output
    assert not [line for line in output.splitlines() if "Traceback" in line or "ray." in line or "Warning" in line]
    assert {entry["state"] for entry in entries(place, "killed").values()} == {"finished"}
    for method in ("joint", "aug"):
        alone = run_experiment(settings(corpus, epochs=30), [f"method.name={method}"])
        assert equal(weights(place / "runs" / "killed" / f"{method}-seed0"), alone.weights)


@pytest.mark.s3
def test_runs_of_a_sweep_may_lie_in_object_storage_and_ctrl_c_leaves_checkpoints(place: Path, bucket: str) -> None:
    (place / "s3.yaml").write_text(yaml.safe_dump({"experiment": "base.yaml", "seeds": [0]}))
    runs = f"{bucket}/runs"
    started = command(place, "s3.yaml", "--name", "s3", "--runs", runs, "--set", "epochs=400", wait=False)
    folder = RunFolder(f"{runs}/s3/run-seed0")
    wait_for(lambda: started.poll() is not None or folder.read_status().get("epoch", 0) > 0)
    assert started.poll() is None, started.communicate()[0]
    os.killpg(started.pid, signal.SIGINT)
    output = started.communicate(timeout=120)[0]
    assert started.returncode == 130, output
    assert "go on with --resume --name s3 --runs" in output.splitlines()[-1]
    assert SECRET not in output
    assert folder.state() == "interrupted" and checkpoint.latest(folder.checkpoints) is not None
    found = json.loads(read_bytes(join(runs, "s3", "sweep.json")))
    assert [entry["state"] for entry in found["trials"]] == ["interrupted"]
