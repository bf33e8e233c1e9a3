"""`counterpoise verify` must fail whenever it has shown nothing, and say what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterpoise import storage
from counterpoise.contracts import ConfigError
from counterpoise.engine.job import Job
from counterpoise.engine.local import run_local
from counterpoise.engine.run import LOCK
from counterpoise.launch.rehearsal import Blow
from counterpoise.start import Settings
from counterpoise.verify import Case, _job, _judge, render, verify, write_corpus

WORKER = {"name": "last", "kind": "worker", "step": 13, "rank": -1, "spare": ""}
Judge = Callable[..., dict[str, Case]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A run, the same once more, and one of another seed."""
    root = str(tmp_path_factory.mktemp("verify"))
    write_corpus(f"{root}/corpus")
    settings = Settings("local", 1, "cpu", 1)
    jobs = {
        name: _job(Case(name, name, seed=seed), root, settings)
        for name, seed in (("reference", 0), ("again", 0), ("other", 1))
    }
    run_local(list(jobs.values()))
    return jobs


@pytest.fixture
def judge(trained: dict[str, Job]) -> Judge:
    """What is found of a case whose run is `run`, and of a control whose run is `control`."""

    def found(run: str = "again", control: str = "other", blows: Any = (), **more: Any) -> dict[str, Case]:
        plan = [
            Case("reference", "undisturbed"),
            Case("control", "another seed"),
            Case("case", "a case", list(blows), **more),
        ]
        jobs = {"reference": trained["reference"], "control": trained[control], "case": trained[run]}
        _judge(plan, jobs)
        return {case.name: case for case in plan}

    return found


def test_an_equal_run_passes_and_one_of_another_seed_does_not(judge: Judge) -> None:
    found = judge()
    assert all(case.passed for case in found.values())
    assert found["case"].weights == "identical" and found["case"].decisions_equal
    assert found["control"].weights.startswith("differ")
    assert judge(run="other")["case"].problems[-1].startswith("weights differ by")
    assert judge(run="other", exact=False)["case"].problems, "a seed is more than rounding"


def test_a_comparison_that_finds_another_seed_equal_is_worth_nothing(judge: Judge) -> None:
    assert judge(control="again")["control"].problems == [
        "a run of another seed was found equal: the comparison is worth nothing"
    ]


def test_a_failure_that_did_not_land_is_no_pass(judge: Judge, trained: dict[str, Job]) -> None:
    [problem] = judge(blows=[WORKER])["case"].problems
    assert problem == "'last' did not land at step 13, so nothing was shown"

    blow, run = Blow(**WORKER), trained["again"].run
    now = time.time()
    where = {"epoch": 2, "batch": 3, "step": 13, "rank": 1, "host": "here", "node": "10.0.0.1", "time": now}
    storage.write_text(blow.landed(run), json.dumps(where))
    assert judge(blows=[WORKER])["case"].problems == ["nothing was trained after 'last'"]
    storage.write_text(blow.back(run), json.dumps({"step": 10, "workers": 2, "time": now + 7.5}))
    case = judge(blows=[WORKER])["case"]
    assert case.passed and case.landed == [where] and case.recover_s == [pytest.approx(7.5)]


def test_what_is_left_behind_is_named(judge: Judge, trained: dict[str, Job]) -> None:
    place = storage.join(trained["again"].run, LOCK)
    storage.write_text(place, "{}")
    try:
        assert judge()["case"].problems == ["left behind: lock"]
    finally:
        storage.delete(place)


def test_the_table_shows_where_failures_landed_and_what_is_wrong(judge: Judge) -> None:
    cases = judge(blows=[WORKER | {"name": "other"}])
    rows = [{**vars(case), "passed": case.passed} for case in cases.values()]
    text = render({"cases": rows, "passed": False, "workers": 2, "nodes": 1, "seconds": 61.0})
    lines = text.splitlines()
    assert lines[0].split()[:1] == ["failure"] and [line.split()[0] for line in lines[1:4]] == ["ok", "ok", "FAILED"]
    assert "a case: 'other' did not land at step 13, so nothing was shown" in lines
    assert lines[-1] == "2 workers, 1 node: did not pass (61 s)"


def test_killing_nodes_needs_a_cluster_with_others() -> None:
    with pytest.raises(ConfigError, match="--kill-nodes needs --address"):
        verify(address=None, workers=2, runs=None, kill_nodes=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_this_machine_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "counterpoise", "verify", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    cases = {case["name"]: case for case in found["cases"]}
    assert list(cases) == ["reference", "control", "worker", "driver", "sigterm"]
    assert [b["step"] for name in ("worker", "driver", "sigterm") for b in cases[name]["landed"]] == [13, 37, 33, 44]
    assert all(cases[name]["weights"] == "identical" for name in ("worker", "driver", "sigterm"))
    assert not list(tmp_path.iterdir())
