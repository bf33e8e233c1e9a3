"""Two that want the same run, or the same folder of runs: one gets it, and nothing is mixed."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cases import SMALL_AUG
from tests.conftest import new_folder, settings
from tests.trust.faults import chance, count, differences, digests, forked, job_of, keep, train, warm

from counterpoise.config import resolve
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import execute
from counterpoise.engine.run import RunFolder

REFUSED = 6


def writer(uri: str, who: int, gate: Any, pause_s: float) -> Callable[[], Any]:
    """Takes the run, and writes twelve records in it with pauses in which another one could."""

    def call() -> Any:
        folder = RunFolder.open(uri)
        gate.wait()
        time.sleep(pause_s)
        folder.acquire()
        try:
            for number in range(12):
                folder.append({"kind": "progress", "who": who, "number": number})
                time.sleep(0.001)
        finally:
            folder.release()
        return who

    return call


def race(place: Path, pauses: tuple[float, float], locked: bool = True) -> tuple[list[int], bool]:
    """Exit codes of two writers that start together, and whether their records are mixed."""
    experiment, provenance = resolve(settings(str(place.parent / "corpus")))
    uri = new_folder(place, experiment, provenance).uri
    gate = multiprocessing.get_context("fork").Barrier(2)
    calls = [writer(uri, who, gate, pauses[who]) for who in range(2)]
    if not locked:
        calls = [lambda call=call: (unlock(), call())[1] for call in calls]
    ended = forked(calls, place / "said")
    records = (place / uri.rsplit("/", 1)[-1] / "records.jsonl").read_text().splitlines()
    try:
        rows = [json.loads(line) for line in records]
    except ValueError:
        return ended.codes, True
    runs = [row["who"] for i, row in enumerate(rows) if i == 0 or row["who"] != rows[i - 1]["who"]]
    whole = all(sum(row["who"] == who for row in rows) in (0, 12) for who in range(2))
    mixed = len(runs) > len(set(runs)) or not whole or [row["seq"] for row in rows] != list(range(len(rows)))
    return ended.codes, mixed


def unlock() -> None:
    """The product without its lock."""

    def acquire(self: RunFolder) -> None:
        self._token, self._beat = "everybody's", float("inf")

    RunFolder.acquire, RunFolder.release = acquire, lambda self: None  # type: ignore[method-assign]


def test_of_two_that_start_one_run_together_one_is_refused_and_nothing_is_mixed(corpus: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").symlink_to(corpus)
    refused = number = 0
    while number < count(12, 50) or refused < count(4, 17):  # on a busy machine they meet more rarely
        number += 1
        assert number <= 10 * count(12, 50), f"only {refused} of {number - 1} pairs met"
        rng = chance("race", number)
        place = tmp_path / str(number)
        place.mkdir()
        codes, mixed = race(place, (rng.choice([0.0, rng.uniform(0, 0.05)]), rng.uniform(0, 0.05)))
        fine = not mixed and sorted(codes) in ([0, REFUSED], [0, 0])  # 0, 0: one after the other
        refused += REFUSED in codes
        keep("14 two runs", "same run at once", {"codes": codes}, fine)
        assert fine, codes


def test_without_the_lock_records_are_mixed(corpus: str, tmp_path: Path) -> None:
    """The control."""
    (tmp_path / "corpus").symlink_to(corpus)
    (place := tmp_path / "0").mkdir()
    codes, mixed = race(place, (0.0, 0.0), locked=False)
    keep("14 two runs", "control: lock removed", {"codes": codes}, not mixed, control=True)
    assert mixed


def test_two_commands_that_continue_one_run_do_not_share_it(corpus: str, tmp_path: Path) -> None:
    """One trains, the other is refused, whoever comes first; what comes out is the undisturbed run."""
    content = settings(corpus, method=SMALL_AUG)
    experiment, provenance = resolve(content)
    (alone := tmp_path / "alone").mkdir()
    whole = new_folder(alone, experiment, provenance).uri
    assert train(job_of(experiment, whole), alone).codes == [0]
    for number in range(count(2, 10)):
        (place := tmp_path / str(number)).mkdir()
        uri = new_folder(place, experiment, provenance).uri
        job = job_of(experiment, uri, resume=True)
        warm(job)
        gate = multiprocessing.get_context("fork").Barrier(2)

        def call(job: Any = job, gate: Any = gate) -> Any:
            gate.wait()
            return execute(job, SingleComm())

        ended = forked([call, call], place / "said", rest_s=60.0)
        wrong = differences(uri, digests(whole))
        fine = sorted(ended.codes) == [0, REFUSED] and not wrong
        keep("14 two runs", "two commands continue one run", {"codes": ended.codes}, fine)
        assert fine, (ended.codes, ended.said, wrong)
        assert "is being written by process" in "".join(ended.said) or "at the same moment" in "".join(ended.said)
