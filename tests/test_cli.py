"""`counterpoise` as a person meets it: what it prints, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cases import SMALL_AUG
from tests.conftest import Done, new_folder, settings, write_corpus

from counterpoise import __version__
from counterpoise.cli import main
from counterpoise.config import resolve
from counterpoise.contracts import Interrupted
from counterpoise.engine import checkpoint
from counterpoise.engine.run import RunFolder
from counterpoise.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Ended:
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """command("train", ...) -> how it ended."""

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A folder with an experiment file and a folder of runs."""
    folder = tmp_path_factory.mktemp("cli")
    content = settings(corpus, method=SMALL_AUG)
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder


def train(place: Path, *more: object) -> list[object]:
    return ["train", place / "small.yaml", "--runs", place / "runs", "--device", "cpu", "--threads", 1, *more]


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """A run of the command line, from start to end."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in train(place, "--name", "whole", "--set", "seed=2")])
    assert not ended.value.code
    return place / "runs" / "whole"


def message(ended: Ended) -> str:
    """The one line of a refusal."""
    assert "Traceback" not in ended.err, ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("counterpoise: ")]
    assert len(lines) == 1, ended.err
    return ended.err[ended.err.index("counterpoise: ") :]


# --- train


def test_training_leaves_a_finished_run(trained: Path) -> None:
    folder = RunFolder.open(str(trained))
    assert folder.state() == "finished" and folder.verify() == []
    assert folder.provenance["seed"] == {"value": 2, "origin": "command line"}
    assert folder.provenance["method.hidden"]["origin"] == "file small.yaml"
    assert folder.read_json("summary.json")["run"] == "whole"


def test_results_go_to_standard_output_and_talk_to_standard_error(place: Path, command: Command) -> None:
    ended = command(*train(place, "--name", "quick", "--set", "epochs=1"))
    assert ended.code == 0 and "Traceback" not in ended.err
    assert "aug" in ended.out and "corpus" in ended.err and str(place / "runs" / "quick") in ended.err


def test_a_dry_run_starts_nothing(place: Path, command: Command) -> None:
    ended = command(*train(place, "--name", "never", "--dry-run"))
    assert ended.code == 0 and "dry run" in ended.err and "240" in ended.err
    assert not (place / "runs" / "never").exists()


def test_a_name_is_used_once(place: Path, trained: Path, command: Command) -> None:
    ended = command(*train(place, "--name", "whole"))
    assert ended.code == 6
    assert "run 'whole' exists" in message(ended) and "--resume" in message(ended)


def test_a_finished_run_is_not_resumed(place: Path, trained: Path, command: Command) -> None:
    ended = command("train", "--resume", "--name", "whole", "--runs", place / "runs", "--device", "cpu")
    assert ended.code == 6 and "is finished" in message(ended)


def test_a_change_on_resume_is_refused_then_allowed(
    place: Path, trained: Path, command: Command, run_experiment: Callable[..., Done]
) -> None:
    content = yaml.safe_load((place / "small.yaml").read_text())
    experiment, provenance = resolve(content)
    new_folder(place / "runs", experiment, provenance, "changed")
    with pytest.raises(Interrupted):
        run_experiment(content, folder=RunFolder.open(str(place / "runs" / "changed")), stop=lambda: "test")
    # started without the command, the manifest lacks what the command compares
    folder = RunFolder.open(str(place / "runs" / "changed"))
    fingerprint = RunFolder.open(str(trained)).manifest["data_fingerprint"]
    folder.write_json("run.json", folder.manifest | {"data_fingerprint": fingerprint})
    resume = ["train", "--resume", "--name", "changed", "--runs", place / "runs", "--device", "cpu", "--threads", 1]
    ended = command(*resume, "--set", "optim.lr=0.01")
    assert ended.code == 6 and "optim.lr: 0.05 -> 0.01  (say --allow-change optim.lr if you mean it)" in message(ended)
    ended = command(*resume, "--set", "seed=9", "--allow-change", "seed")
    assert ended.code == 6 and "makes it another run" in message(ended)
    ended = command(*resume, "--set", "optim.lr=0.01", "--allow-change", "optim.lr")
    assert ended.code == 0 and "changed  optim.lr: 0.05 -> 0.01" in ended.err
    assert folder.state() == "finished" and yaml.safe_load(folder.experiment_text)["optim"]["lr"] == 0.01
    assert folder.records()[-2]["lr"] == 0.01


MISTAKES = [
    (["--set", "method.name=agu"], 2, "did you mean 'aug'?"),
    (["--set", "optim.lrr=1"], 2, "optim.lrr: unknown key, did you mean 'lr'?"),
    (["--set", "optim.lr"], 2, "write it as key=value"),
    (["--set", "modalities.strong.name=mpl"], 2, "did you mean 'mlp'?"),
    (["--set", "corpus=/nowhere/at/all"], (2, 3), "/nowhere/at/all"),
    (["--set", "batch_size=33", "--workers", "2"], 2, "does not divide among 2 workers"),
    (["--engine", "lokal"], 2, "did you mean 'local'?"),
    (["--device", "gpu"], 2, "choose auto, cpu or cuda"),
    (["--name", "../up"], 2, "run name '../up'"),
    (["--resume"], 2, "--resume needs the --name"),
    (["--resume", "--name", "nobody"], 3, "is not a run folder"),
]


@pytest.mark.parametrize(("more", "code", "text"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_end_with_one_clear_message(
    place: Path, command: Command, more: list[str], code: int | tuple[int, ...], text: str
) -> None:
    ended = command(*train(place, *more))
    assert ended.code in (code if isinstance(code, tuple) else (code,))
    assert text in message(ended) and not ended.out


def test_no_experiment_and_a_missing_one(place: Path, command: Command) -> None:
    assert command("train").code == 2
    ended = command("train", place / "smal.yaml")
    assert ended.code == 2 and "did you mean" in message(ended) and "small.yaml" in message(ended)


def test_unknown_words_of_the_command_line(command: Command) -> None:
    assert command("trian").code == 2
    assert command("train", "--bogus").code == 2
    assert command("--version").out.strip() == __version__


# --- looking at runs


def test_evaluate_gives_the_numbers_of_the_run(trained: Path, command: Command) -> None:
    summary = RunFolder.open(str(trained)).read_json("summary.json")
    ended = command("evaluate", trained, "--device", "cpu", "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and found["accuracy"] == summary["test"]["accuracy"]
    ended = command("evaluate", trained, "--split", "valid", "--device", "cpu")
    assert ended.code == 0 and "strong" in ended.out and "gap between modalities" in ended.out
    assert command("evaluate", trained, "--split", "tset").code == 2
    assert command("evaluate", trained.parent / "nobody").code == 3


def test_report_compares_runs_in_one_page(place: Path, trained: Path, command: Command) -> None:
    page = place / "report.html"
    ended = command("report", trained, "--out", page)
    assert ended.code == 0 and "aug" in ended.out
    assert page.read_text().lstrip().lower().startswith("<!doctype html")


def test_methods_are_listed_and_shown(command: Command) -> None:
    ended = command("methods", "list")
    assert [line.split()[0] for line in ended.out.splitlines()] == list(METHODS)
    ended = command("methods", "show", "aug")
    assert "sustained boosting" in ended.out and "lam = 0.5" in ended.out and "check_every" in ended.out
    ended = command("methods", "show", "agu")
    assert ended.code == 2 and "did you mean 'aug'?" in message(ended)


def test_a_corpus_is_checked(corpus: str, tmp_path: Path, command: Command) -> None:
    ended = command("corpora", "check", corpus, "--json")
    assert ended.code == 0 and json.loads(ended.out)["errors"] == []

    def change(split: str, rows: list[dict[str, Any]]) -> None:
        if split == "train":
            rows[3]["image"] = b"no picture"

    rows = {"train": 16, "valid": 8, "test": 8}
    broken = write_corpus(tmp_path / "broken", modalities=("strong",), media=True, rows=rows, change=change)
    ended = command("corpora", "check", broken)
    assert ended.code == 3 and "train-0003" in ended.out


# --- signals


def wait_for_epochs(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        file = folder / "records.jsonl"
        if file.exists() and file.read_text().count('"kind": "epoch"') >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("no epoch after a minute")


def test_a_run_survives_ctrl_c_and_the_notice_of_a_scheduler(
    place: Path, corpus: str, run_experiment: Callable[..., Done]
) -> None:
    """SIGINT ends with 130, SIGTERM with 75 (try again), and the run ends with the weights of an undisturbed one."""
    content = settings(corpus, method={**SMALL_AUG, "check_every": 10}, epochs=40)
    (place / "long.yaml").write_text(yaml.safe_dump(content))
    common = ["--runs", str(place / "runs"), "--name", "long", "--device", "cpu", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    folder = place / "runs" / "long"
    epochs = 2
    for first, number, code in (([str(place / "long.yaml")], signal.SIGINT, 130), (["--resume"], signal.SIGTERM, 75)):
        process = subprocess.Popen(
            [sys.executable, "-m", "counterpoise", "train", *first, *common],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_epochs(folder, epochs, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err and f"stopped ({number.name})" in err and "--resume" in err and not out
        assert RunFolder.open(str(folder)).state() == "interrupted"
        epochs = (folder / "records.jsonl").read_text().count('"kind": "epoch"') + 2
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", *common])
    assert not ended.value.code
    whole = run_experiment(content)
    last = checkpoint.latest(RunFolder.open(str(folder)).checkpoints)
    assert last is not None and last.state["progress"]["epoch"] == 41
    assert all(last.tensors["model"][name].equal(value) for name, value in whole.weights.items())
