"""A run that goes on elsewhere: it leaves a checkpoint, says why, and takes over what a dead process has left."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Run, new_folder, settings

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import Moved, RefusedError
from counterpoise.data import plan
from counterpoise.engine import checkpoint, loop
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import LOCK, RunFolder

MakeFolder = Callable[[str], tuple[RunFolder, Job]]


@pytest.fixture
def made(corpus: str, tmp_path: Path) -> MakeFolder:
    def make(name: str) -> tuple[RunFolder, Job]:
        experiment, provenance = resolve(settings(corpus))
        folder = new_folder(tmp_path, experiment, provenance, name)
        return folder, Job(experiment.to_json(), folder.uri)

    return make


def test_a_run_that_moves_repeats_nothing_and_says_why_it_moved(
    made: MakeFolder, corpus: str, run_experiment: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment(settings(corpus))
    monkeypatch.setattr(loop, "CONTROL_INTERVAL_S", 0.0)
    folder, job = made("moving")
    asked = iter([None] * 11 + ["a node will be taken away"])
    with pytest.raises(Moved, match="after step 12: a node will be taken away") as caught:
        execute(job, SingleComm(), move=lambda: next(asked))
    assert caught.value.why == "a node will be taken away"
    assert folder.read_status()["state"] == "running", "who follows the run must not take it for ended"
    assert not folder.is_locked()
    found = checkpoint.latest(folder.checkpoints)
    assert found is not None and found.state["progress"]["step"] == 12

    execute(Job(job.experiment, job.run, resume=True), SingleComm(), after=caught.value.why)
    [event] = [r for r in folder.records() if r["kind"] == "event"]
    wanted = {"event": "resumed", "step": 12, "workers": 1, "after": "a node will be taken away"}
    assert wanted.items() <= event.items() and "workers_before" not in event
    last = checkpoint.latest(folder.checkpoints)
    assert last is not None
    assert all(torch.equal(last.tensors["model"][name], weight) for name, weight in whole.weights.items())


def left_behind(folder: RunFolder, **more: Any) -> dict[str, Any]:
    """The lock of a process on another machine."""
    owner = {"token": "t", "pid": 1, "host": "elsewhere", "started": None, "time": time.time(), **more}
    storage.write_text(folder.at(LOCK), json.dumps(owner))
    return owner


def test_the_lock_of_an_owner_known_to_be_dead_goes_at_once(made: MakeFolder) -> None:
    folder, _ = made("dead")
    owner = left_behind(folder)
    asked: list[Any] = []
    folder.await_lock(lambda who: bool(asked.append(who)) or True)
    assert asked == [owner] and not storage.exists(folder.at(LOCK))


def test_an_owner_known_to_live_is_left_alone(made: MakeFolder) -> None:
    folder, _ = made("alive")
    left_behind(folder)
    with pytest.raises(RefusedError, match=r"being written by process 1 on elsewhere"):
        folder.await_lock(lambda who: False)
    assert storage.exists(folder.at(LOCK))


def test_one_that_cannot_be_asked_is_waited_for_until_it_has_been_silent_long_enough(
    made: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "stale_s", 1.5)
    folder, _ = made("silent")
    left_behind(folder)
    said: list[str] = []
    began = time.monotonic()
    folder.await_lock(tell=said.append)
    assert time.monotonic() - began > 1
    assert len(said) == 1 and "waiting for process 1 on elsewhere, which has the lock of run 'silent'" in said[0]
    folder.acquire()
    folder.release()


def test_one_that_stirs_meanwhile_lives(made: MakeFolder) -> None:
    folder, _ = made("stirring")
    left_behind(folder)
    threading.Timer(0.3, lambda: left_behind(folder, time=time.time() + 1)).start()
    with pytest.raises(RefusedError, match="being written"):
        folder.await_lock()


def test_a_process_of_this_machine_gets_a_moment_to_end(made: MakeFolder) -> None:
    folder, _ = made("here")
    with RunFolder(folder.uri), pytest.raises(RefusedError, match="being written"):
        folder.await_lock(dying_s=0.3)
    writer = RunFolder(folder.uri)
    writer.acquire()
    threading.Timer(0.3, writer.release).start()
    folder.await_lock(dying_s=60)


def test_fewer_workers_than_asked_for_may_have_uneven_shares() -> None:
    plan.check_batches(1000, 64, 3, even=False)
