"""A command that a scheduler may give any number of times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tests.cases import SMALL_AUG
from tests.conftest import Run, settings

from counterpoise.cli import main
from counterpoise.engine import checkpoint, job, loop
from counterpoise.engine.run import RunFolder

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(tmp_path: Path, corpus: str, capfd: pytest.CaptureFixture[str]) -> Train:
    """train(*flags) -> exit code and what was said; runs are in `runs`."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings(corpus, method=SMALL_AUG)))

    def call(*more: str) -> tuple[int, str]:
        capfd.readouterr()
        where = [str(tmp_path / "small.yaml"), "--runs", str(tmp_path / "runs"), "--device", "cpu", "--threads", "1"]
        with pytest.raises(SystemExit) as ended:
            main(["train", *where, "--metrics-port", "off", *more])
        return int(ended.value.code or 0), capfd.readouterr().err

    return call


AGAIN = ("--name", "a", "--auto-resume")


def test_it_starts_goes_on_and_is_content_with_what_has_finished(
    train: Train, tmp_path: Path, corpus: str, run_experiment: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_experiment(settings(corpus, method=SMALL_AUG))
    asked = iter([None] * 9)
    with monkeypatch.context() as patch:  # the scheduler takes the machine away after ten steps
        patch.setattr(loop, "CONTROL_INTERVAL_S", 0.0)
        patch.setattr(RunFolder, "stop_requested", lambda self: next(asked, "SIGTERM"))
        code, said = train(*AGAIN)
    assert code in (75, 130) and "a checkpoint is written" in said
    folder = RunFolder.open(str(tmp_path / "runs" / "a"))
    assert folder.state() == "interrupted"

    code, _ = train(*AGAIN)
    assert code == 0 and folder.state() == "finished"
    assert [r["event"] for r in folder.records() if r["kind"] == "event"] == ["resumed"]
    found = checkpoint.latest(folder.checkpoints)
    assert found is not None
    assert all(torch.equal(found.tensors["model"][name], weight) for name, weight in whole.weights.items())

    monkeypatch.setattr(job, "execute", lambda *_: pytest.fail("what has finished is not trained again"))
    code, said = train(*AGAIN)
    assert code == 0 and "has finished; nothing is left to do" in said


def test_another_experiment_under_the_same_name_is_refused(train: Train) -> None:
    assert train(*AGAIN)[0] == 0
    code, said = train(*AGAIN, "--set", "optim.lr=0.7")
    assert code == 6 and "optim.lr: 0.05 -> 0.7" in said
    code, said = train(*AGAIN, "--set", "epochs=9", "--allow-change", "epochs")
    assert code == 6 and "run 'a' is finished, so epochs: 3 -> 9 comes too late; start a new run" in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--auto-resume",), "--auto-resume needs a --name"),
        (("--name", "../a", "--auto-resume"), "run name '../a'"),
        (("--min-workers", "1"), "--min-workers needs --engine ray"),
        (("--engine", "ray", "--workers", "2", "--min-workers", "3"), "--min-workers is 3; choose 1 to 2"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_starts(train: Train, flags: tuple[str, ...], told: str) -> None:
    code, said = train(*flags)
    assert code == 2 and told in said


def test_workers_that_come_and_go_are_shown(train: Train) -> None:
    code, said = train("--engine", "ray", "--workers", "4", "--min-workers", "2", "--dry-run")
    assert code == 0 and "engine      ray, 2 to 4 workers on cpu" in said
