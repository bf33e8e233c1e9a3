"""A comparison whose command is killed, whose cells fail or are removed: the same command makes what is missing.

Training is pretended: what counts is which cells are begun. `tests/launch/test_sweep.py` kills real sweeps on Ray.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import settings
from tests.trust.faults import chance, count, forked, keep

from counterpoise import compare
from counterpoise.cli import main
from counterpoise.contracts import NonFiniteLossError
from counterpoise.engine.job import Job
from counterpoise.engine.run import RunFolder

KILLS = count(3, 20)
METHODS, SEEDS = ("joint", "late"), count(5, 10)
CELLS = len(METHODS) * SEEDS


class Grid:
    """A comparison of pretended cells, each command in a process of its own."""

    def __init__(self, folder: Path, corpus: str) -> None:
        self.folder = folder
        (folder / "e.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=1)))
        self.launches = 0

    def command(self, kill_at: int = 0, fails: Sequence[str] = (), ending: bool = False) -> Any:
        """The command; its process is killed at the `kill_at`-th cell that it begins, before or `ending` it."""
        again = (self.folder / "runs" / "c" / "comparison.json").exists()
        words = ["--resume"] if again else [str(self.folder / "e.yaml"), "-m", ",".join(METHODS), "--seeds", str(SEEDS)]
        words = ["compare", *words, "--runs", str(self.folder / "runs"), "--name", "c", "--metrics-port", "off"]
        words += ["--out", str(self.folder / "report.html")]

        def call() -> int:
            os.fsync = lambda _: None  # type: ignore[assignment]
            compare.run_jobs = self._pretend(kill_at, fails, ending)  # type: ignore[assignment]
            try:
                main(words)
            except SystemExit as ended:
                return int(ended.code or 0)
            return 0

        self.launches += 1
        ended = forked([call], self.folder / f"launch-{self.launches}")
        if kill_at:
            assert ended.codes == [-signal.SIGKILL], ended.said
            return None
        assert ended.codes == [0], ended.said
        return ended.values[0]

    def _pretend(self, kill_at: int, fails: Sequence[str], ending: bool) -> Callable[..., None]:
        begun = 0

        def run_jobs(jobs: Sequence[Job], *_: Any, **__: Any) -> None:
            nonlocal begun
            begun += 1
            folder = RunFolder.open(jobs[0].run)
            self.note("begun", folder.name)
            if begun == kill_at and not ending:
                self.landed(folder.name)
            with folder:
                if folder.name in fails:
                    raise NonFiniteLossError("the loss is not finite")
                experiment = jobs[0].experiment
                summary = {"run": folder.name, "method": experiment["method"]["name"], "corpus": "pair"}
                summary |= {"modalities": ["strong", "weak"], "seed": experiment["seed"], "wall_s": 1.0}
                test = {"accuracy": {"fused": 0.5, "strong": 0.5, "weak": 0.4}, "gap": 0.1}
                folder.write_json("summary.json", summary | {"test": test, "valid": test})
                folder.write_status({"state": "finished"}, force=True)
            self.note("done", folder.name)
            if begun == kill_at:
                self.landed(folder.name)

        return run_jobs

    def note(self, what: str, name: str) -> None:
        with open(self.folder / f"{what}.txt", "a") as file:
            file.write(f"{name}\n")

    def landed(self, name: str) -> None:
        self.note("killed", name)
        os.kill(os.getpid(), signal.SIGKILL)

    def names(self, what: str) -> list[str]:
        file = self.folder / f"{what}.txt"
        return file.read_text().split() if file.exists() else []

    def rows(self) -> dict[str, int]:
        content = json.loads((self.folder / "runs" / "c" / "comparison.json").read_text())
        return {row["label"]: row["n"] for row in content["result"]["methods"]}


@pytest.fixture
def grid(tmp_path: Path, corpus: str) -> Grid:
    return Grid(tmp_path, corpus)


def test_after_any_kills_exactly_the_missing_cells_are_made(grid: Grid) -> None:
    draw = chance("16")
    for number in range(KILLS):
        left = CELLS - len(set(grid.names("done")))
        if left == 0:
            break
        ending = draw.random() < 0.5
        grid.command(kill_at=draw.randint(1, max(1, min(left, 2 * CELLS // KILLS))), ending=ending)
        where = {"cell": grid.names("killed")[number], "ending": ending}
        keep("16 cells", "kill", where, True)
    assert len(grid.names("killed")) == grid.launches, "every kill has landed"
    finished = set(grid.names("done"))
    before = len(grid.names("begun"))
    assert grid.command() == 0
    begun = grid.names("begun")
    assert set(begun[before:]).isdisjoint(finished), "nothing that had finished"
    assert max(Counter(grid.names("done")).values()) == 1 and len(grid.names("done")) == CELLS, "all of them, once"
    assert grid.rows() == dict.fromkeys(METHODS, SEEDS)
    assert grid.command() == 0 and len(grid.names("begun")) == len(begun), "and once more makes nothing"


def test_cells_that_fail_or_are_removed_are_made_again_and_no_others(grid: Grid) -> None:
    fails = ["late-seed1"]  # a tenth
    assert grid.command(fails=fails) == 1
    assert grid.rows() == {"joint": SEEDS, "late": SEEDS - 1}, "the table says how many there are"
    keep("16 cells", "failure", {"cells": fails}, True)
    shutil.rmtree(grid.folder / "runs" / "c" / "joint-seed2")
    before = len(grid.names("begun"))
    assert grid.command() == 0
    assert sorted(grid.names("begun")[before:]) == ["joint-seed2", "late-seed1"]
    assert grid.rows() == dict.fromkeys(METHODS, SEEDS)
    keep("16 cells", "removed cell", {"cells": ["joint-seed2"]}, True)


def test_forgetting_what_has_finished_is_noticed(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a comparison that trusts no finished cell begins them all again."""
    assert grid.command() == 0
    monkeypatch.setattr(compare.Runner, "_finished", lambda *_: False)
    grid.command()
    repeated = len(grid.names("begun")) - CELLS
    keep("16 cells", "control: none has finished", {"repeated": repeated}, repeated == 0, control=True)
    assert repeated == CELLS
