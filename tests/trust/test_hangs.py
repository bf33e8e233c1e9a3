"""Workers that hang are ended and go on; workers that lag are named and left alone."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from tests.cases import SMALL_AUG
from tests.conftest import new_folder, settings
from tests.trust.faults import Aim, differences, digests, forked, full, hang, job_of, keep, recovered_s, train

from counterpoise.config import resolve
from counterpoise.data.loader import LocalData
from counterpoise.engine import loop, watchdog
from counterpoise.engine.comm import TorchComm
from counterpoise.engine.local import run_local
from counterpoise.engine.run import RunFolder
from counterpoise.engine.watchdog import HUNG, Deadlines, Pace, Watch, Watchdog
from counterpoise.watch import Watched, picture

STEP_S, REST_S = 2.0, 5.0  # deadlines here; twice them is what finding may take
DEADLINES = Deadlines(STEP_S, REST_S, STEP_S, REST_S)
MACHINE_S = 8.0  # for a busy machine to dump and end


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("whole")
    uri, experiment = start(corpus, place)
    assert train(job_of(experiment, uri), place, 2).codes == [0, 0]
    return digests(uri)


def start(corpus: str, place: Path, **changes: Any) -> tuple[str, Any]:
    experiment, provenance = resolve(settings(corpus, **{"method": SMALL_AUG, **changes}))
    return new_folder(place, experiment, provenance).uri, experiment


def in_loader(aim: Aim, place: Path) -> Callable[[int], None]:
    """The loader of a rank hangs before it hands over its tenth batch."""
    return _after(LocalData, "train_batches", aim, place, 10)


def in_collective(aim: Aim, place: Path) -> Callable[[int], None]:
    """A rank never comes to a collective which the others wait in, as if its network were gone."""
    return _after(TorchComm, "sum_gradients", aim, place, 25)


def _after(owner: Any, name: str, aim: Aim, place: Path, calls: int) -> Callable[[int], None]:
    def also(rank: int) -> None:
        whole, left = getattr(owner, name), iter(range(calls))

        def reach() -> None:
            if next(left, None) is None and rank == aim.rank and not aim.place(place).exists():
                aim.place(place).write_text(f'{{"point": "{name}", "rank": {rank}, "clock": {time.monotonic()}}}')
                hang()

        def call(self: Any, *arguments: Any) -> Any:
            if name != "train_batches":
                reach()
                return whole(self, *arguments)
            return batches(self, *arguments)

        def batches(self: Any, *arguments: Any) -> Any:
            for batch in whole(self, *arguments):
                reach()
                yield batch

        setattr(owner, name, call)

    return also


@pytest.mark.parametrize("where", ["forward", "evaluation", "loader", "collective"])
def test_a_rank_that_hangs_is_ended_with_its_stacks_and_the_run_goes_on(
    where: str, corpus: str, whole: dict[str, str], tmp_path: Path
) -> None:
    point, at = {"forward": ("step", 12), "evaluation": ("evaluate", 2)}.get(where, ("nowhere", 0))
    aim = Aim(where, point, at, 1, hang)
    trap = {"loader": in_loader, "collective": in_collective}.get(where, lambda *_: lambda rank: None)(aim, tmp_path)

    def also(rank: int) -> None:
        Deadlines.of = classmethod(lambda kind, step_s: DEADLINES)  # type: ignore[assignment, method-assign]
        trap(rank)

    uri, experiment = start(corpus, tmp_path)
    ended = train(job_of(experiment, uri, hang_s=STEP_S), tmp_path, 2, [aim], also=also)
    over, allowed = time.monotonic(), REST_S if where in ("collective", "evaluation") else STEP_S
    landed = aim.landed(tmp_path)
    took = over - landed["clock"] if landed else 0.0
    assert ended.codes[1] == HUNG and ended.codes[0] in (3, HUNG), ended.said
    stacks = (Path(uri) / "logs" / "hang-rank-1.log").read_text()
    words = r"rank 1 on \S+, process \d+: nothing has moved for \d+ s \(epoch 2, batch \d, .*allowed: (\d+) s\)"
    found = re.search(words, stacks)  # of a step: 20 times the median, if that is more on a busy machine
    assert found and int(found[1]) >= allowed and (where == "forward" or int(found[1]) == allowed), stacks
    allowed = int(found[1])
    assert "in hang" in stacks and "Thread 0x" in stacks, stacks
    assert "nothing has moved" in ended.said[1]
    again = train(job_of(experiment, uri, True), tmp_path, 2, [aim], also=also)
    wrong = differences(uri, whole) if again.codes == [0, 0] else again.said
    in_time = took < 2 * allowed + MACHINE_S
    keep(
        "11 hang", where, landed, not wrong and in_time, recover_s=recovered_s(tmp_path, landed, over) if landed else 0
    )
    assert not wrong and in_time


def test_without_a_watchdog_nobody_ends_it(corpus: str, tmp_path: Path) -> None:
    """The control."""
    uri, experiment = start(corpus, tmp_path)
    aim = Aim("forward", "step", 12, 0, hang)
    ended = train(job_of(experiment, uri), tmp_path, 1, [aim], limit_s=3 * STEP_S)
    keep("11 hang", "control: no watchdog", aim.landed(tmp_path), ended.codes == [0], control=True)
    assert ended.codes == [-9], "it was still there when the test ended it"


class Barks(list[int]):
    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self and time.monotonic() < end:
            time.sleep(0.01)
        return bool(self)


def test_a_watchdog_knows_slow_steps_and_lets_a_debugger_be(tmp_path: Path, capfd: Any) -> None:
    watch, barks = Watch(), Barks()
    dog = Watchdog(watch, Deadlines(0.2, 0.4, 5.0, 5.0), str(tmp_path), barks.append)
    for batch in range(8):  # steps of 0.1 s: 20 times their median is allowed then, not 0.2 s
        watch.begin_reading()
        watch.begin_step(1, batch)
        time.sleep(0.1)
        watch.end_step()
    watch.begin_step(1, 9)
    assert not barks.wait(0.8), "that is 8 times the usual"
    assert barks.wait(4.0) and barks == [HUNG]
    dog.end()
    assert "epoch 1, batch 9, training" in (tmp_path / "logs" / "hang-rank-0.log").read_text()
    assert "nothing has moved" in capfd.readouterr().err

    frame_of_pdb = {"__name__": "pdb", "time": time}
    stop = threading.Event()
    exec("def halt(stop):\n    stop.wait()\n", frame_of_pdb)
    threading.Thread(target=frame_of_pdb["halt"], args=(stop,), daemon=True).start()  # type: ignore[arg-type]
    watch.enter("step", "training")
    dog = Watchdog(watch, Deadlines(0.1, 0.1, 0.1, 0.1), str(tmp_path), (barks := Barks()).append)
    assert not barks.wait(0.6)
    stop.set()
    assert barks.wait(3.0)
    dog.end()


def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs(tmp_path: Path) -> None:
    def stopped() -> str:
        watch = Watch()
        watch.enter("step", "training")
        barks = Barks()
        dog = Watchdog(watch, Deadlines(1.0, 2.5, 2.5, 2.5), str(tmp_path), barks.append)
        child = os.getpid()
        if os.fork() == 0:  # Ctrl-Z, and fg after four seconds
            os.kill(child, 19)
            time.sleep(4.0)
            os.kill(child, 18)
            os._exit(0)
        time.sleep(0.5)
        os.wait()
        early = barks.wait(0.5)
        late = barks.wait(5.0)
        dog.end()
        return f"{early} {late}"

    ended = forked([stopped], tmp_path)
    assert ended.values == ["False True"], ended.said


# --- stragglers


def slowed(times: dict[int, float]) -> Callable[[int], None]:
    def also(rank: int) -> None:
        train_batch = loop.Trainer.train_batch

        def slow(self: loop.Trainer, batch: Any) -> None:
            time.sleep(times[rank])
            train_batch(self, batch)

        loop.Trainer.train_batch = slow  # type: ignore[method-assign]

    return also


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_rank_is_named_within_fifty_steps_and_left_alone(slow: bool, corpus: str, tmp_path: Path) -> None:
    uri, experiment = start(corpus, tmp_path, method="joint", epochs=8)
    times = {0: 0.04, 1: 0.06 if slow else 0.04}
    ended = train(job_of(experiment, uri), tmp_path, 2, also=slowed(times), every=1000)
    assert ended.codes == [0, 0], ended.said
    folder = RunFolder.open(uri)
    found = [r for r in folder.records() if r.get("event") == "straggler"]
    if not slow:
        keep("12 slow rank", "control: none is slow", {"rank": None}, bool(found), control=True)
        assert found == []
        return
    fine = len(found) == 1 and found[0]["rank"] == 1 and found[0]["step"] <= 50
    keep("12 slow rank", "+50 % per step", {"rank": 1, "step": found[0]["step"] if found else None}, fine)
    assert fine, found
    assert found[0]["step_ms"] > found[0]["others_ms"] + 10
    own = folder.read_status()["rank_step_s"]
    assert own[1] > own[0] and len(own) == 2
    assert all(len(r["rank_step_s"]) == 2 for r in folder.records() if r["kind"] == "epoch" and r["epoch"] > 3)
    watched = Watched.of(uri)
    watched.look()
    shown = list(watched.state.samples())
    assert ("rank_step_seconds", ("1",), own[1]) in shown and ("events_total", ("straggler",), 1.0) in shown
    with io.StringIO() as text:
        Console(file=text, width=160).print(picture(watched, Console()))
        seen = text.getvalue()
    assert re.search(
        r"straggler: rank 1 takes [\d.]+ ms for a step of its own, the others [\d.]+ ms \(step 40\)", seen
    ), seen
    assert re.search(r"workers +rank 1 takes \d+\.\d ms for a step of its own, rank 0 \d+\.\d ms", seen), seen


def test_only_who_stays_slow_is_named_and_only_once() -> None:
    pace = Pace()
    assert pace.compare([0.10, 0.10, 0.16]) == []
    assert pace.compare([0.10, 0.16, 0.10]) == [], "another one: a passing hiccup"
    assert pace.compare([0.10, 0.16, 0.11]) == [{"event": "straggler", "rank": 1, "step_ms": 160.0, "others_ms": 105.0}]
    assert pace.compare([0.10, 0.16, 0.10]) == []
    assert pace.compare([0.10, 0.10, 0.10]) == []
    assert pace.compare([0.10, 0.16, 0.10]) == []
    assert len(pace.compare([0.10, 0.16, 0.10])) == 1
    assert Pace().compare([0.001, 0.009]) == Pace().compare([0.001, 0.009]) == [], "below what can be told from noise"
    assert watchdog.WINDOW * 2 <= 50


# --- as the command does it


@pytest.mark.skipif(not full(), reason="starts processes that import torch: the long set")
def test_local_workers_are_started_again_when_one_is_killed(corpus: str, whole: dict[str, str], tmp_path: Path) -> None:
    uri, experiment = start(corpus, tmp_path, epochs=40)
    told: list[str] = []
    hit: dict[str, Any] = {}

    def strike() -> None:
        while RunFolder.open(uri).read_status().get("step", 0) < 20:
            time.sleep(0.01)
        victims = [c for c in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
        hit.update(pid=victims[-1].pid, step=RunFolder.open(uri).read_status()["step"])
        victims[-1].kill()

    thread = threading.Thread(target=strike)
    thread.start()
    [summary] = run_local([job_of(experiment, uri)], 2, tell=told.append)
    thread.join()
    place = tmp_path / "undisturbed"
    place.mkdir()
    other, _ = start(corpus, place, epochs=40)
    assert train(job_of(experiment, other), place, 2, every=10_000).codes == [0, 0]
    records = RunFolder.open(uri).records()
    [resumed] = [r for r in records if r.get("event") == "resumed"]
    wrong = differences(uri, digests(other))
    keep("1 kill a rank", "SIGKILL, local workers started again", hit or None, not wrong)
    assert not wrong and summary["workers"] == 2
    assert "was killed (SIGKILL" in resumed["after"] and len(told) == 1 and "from the last checkpoint" in told[0]
