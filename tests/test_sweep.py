"""Sweep files, the trials they make, and everything around a sweep that needs no Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tests.conftest import Done, Run, new_folder, settings, write_corpus

from counterpoise.cli import main
from counterpoise.config import Experiment, resolve
from counterpoise.contracts import ConfigError, Interrupted, RefusedError, ResourceError
from counterpoise.engine import checkpoint
from counterpoise.engine.exploit import exploit
from counterpoise.engine.run import RunFolder, check_name
from counterpoise.launch import session as session_module
from counterpoise.launch.session import SCHEDULER, Order, Session
from counterpoise.sweep import Ledger, Suggestions, check_extends, fits, pairs, tabulate
from counterpoise.sweepfile import Asked, Domain, Pbt, Resources, Trial, ask, plan, read_sweep
from counterpoise.telemetry.board import Board

LR = {"optim.lr": {"log_uniform": [0.001, 0.1]}}


@pytest.fixture
def place(tmp_path: Path, corpus: str) -> Path:
    (tmp_path / "experiments" / "sweeps").mkdir(parents=True)
    (tmp_path / "experiments" / "base.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=3)))
    return tmp_path


@pytest.fixture
def command(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command({content of the file}, "--dry-run") -> exit code, stdout, stderr."""

    def call(content: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        file = place / "experiments" / "sweeps" / "s.yaml"
        file.write_text(yaml.safe_dump({"experiment": "../base.yaml", **content}))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["sweep", str(file), "--runs", str(place / "runs"), *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return int(ended.value.code or 0), out, err

    return call


# --- the file

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"varry": {}}, "varry: unknown key, did you mean 'vary'?"),
    ({"vary": {"optim.lr": 0.1}}, "optim.lr: give a list of values, e.g. [0.1]"),
    ({"vary": {"optim.lr": [0.1, 0.1]}}, "give every value once"),
    ({"vary": {"optim.lrr": [0.1]}}, "did you mean 'lr'?"),
    ({"vary": {"method": ["joint", "agu"]}}, "unknown method 'agu', did you mean 'aug'?"),
    ({"vary": {"method": ["joint", "aug"], "method.lam": [0.2]}}, "joint, method.lam=0.2"),
    ({"vary": {"method": ["aug:optim.lr=1"], "optim.lr": [0.1]}}, "sets optim.lr, which is varied too"),
    ({"vary": {"method": ["joint", "joint:head=concat"]}}, "are the same experiment"),
    ({"vary": {"seed": [1]}}, "seeds are given under seeds"),
    ({"vary": {"method.name": ["aug"]}}, "vary method instead"),
    ({"seeds": [0, 0]}, "every seed once"),
    ({"seeds": []}, "seeds"),
    ({"search": {"name": "rnadom"}}, "search.name"),
    ({"search": {"name": "random", "trials": 3}}, "needs trials and space"),
    ({"search": {"name": "grid", "trials": 3}}, "a grid has no trials"),
    ({"search": {"name": "random", "trials": 3, "space": {"optim.lr": {"loguniform": [1, 2]}}}}, "'log_uniform'"),
    ({"search": {"name": "random", "trials": 3, "space": {"optim.lr": {"uniform": [2, 1]}}}}, "has to be smaller"),
    ({"search": {"name": "random", "trials": 3, "space": {"optim.lr": {"log_uniform": [0, 1]}}}}, "above 0"),
    ({"search": {"name": "random", "trials": 3, "space": LR}, "vary": {"optim.lr": [1]}}, "either under vary or"),
    ({"scheduler": {"name": "ahsa"}}, "unknown scheduler 'ahsa', did you mean 'asha'?"),
    ({"scheduler": {"name": "asha", "gracee": 2}}, "did you mean 'grace'?"),
    ({"scheduler": {"name": "pbt", "interval": 1, "mutate": {"batch_size": {"choice": [1, 2]}}}}, "cannot change"),
    ({"scheduler": {"name": "pbt", "interval": 1, "mutate": LR}}, "two trials or more"),
    ({"scheduler": {"name": "pbt", "interval": 1, "mutate": LR}, "vary": {"method": ["joint", "aug"]}}, "be alike"),
    ({"resources": {"worker": 2}}, "did you mean 'workers'?"),
    ({"experiment": "../bse.yaml"}, "did you mean"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), MISTAKES, ids=[text for _, text in MISTAKES])
def test_mistakes_are_found_before_anything_starts(
    place: Path, command: Callable[..., tuple[int, str, str]], content: dict[str, Any], text: str
) -> None:
    code, out, err = command(content)
    assert code == 2 and text in err and not out
    assert not (place / "runs").exists()


def test_what_decides_needs_a_valid_split(tmp_path: Path, place: Path, command: Any) -> None:
    bare = write_corpus(tmp_path / "bare", rows={"train": 40, "test": 8})
    (place / "experiments" / "base.yaml").write_text(yaml.safe_dump(settings(bare, select="last")))
    code, _, err = command({"scheduler": "asha", "vary": {"optim.lr": [0.1, 0.2]}})
    assert code == 2 and "scheduler asha decides on the valid split" in err and "has none" in err
    code, _, err = command({"search": {"name": "optuna", "trials": 2, "space": LR}})
    assert code == 2 and "search optuna decides on the valid split" in err


def test_nothing_decides_on_test_under_a_protocol_that_selects_there(command: Any, monkeypatch: Any) -> None:
    from counterpoise import sweep as module

    seen = module.preview
    monkeypatch.setattr(module, "preview", lambda *given: replace(seen(*given), selects_on="test"))
    code, _, err = command({"scheduler": "median", "vary": {"optim.lr": [0.1, 0.2]}})
    assert code == 2 and "scheduler median would decide on test" in err
    assert command({"vary": {"optim.lr": [0.1, 0.2]}}, "--dry-run")[0] == 0, "a grid decides nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_gpu_that_is_not_there_is_missed_before_anything_starts(command: Any) -> None:
    code, _, err = command({"resources": {"gpus": 0.5}})
    assert code == 4 and "resources.gpus is 0.5, and this machine has no CUDA device" in err


def test_a_dry_run_measures_a_step_and_starts_nothing(place: Path, command: Any) -> None:
    content = {"vary": {"method": ["joint", "aug"], "optim.lr": [0.01, 0.05]}, "seeds": [0, 1, 2]}
    code, out, err = command(content, "--dry-run", "--max-concurrent", "3", "--json")
    assert code == 0 and not (place / "runs").exists()
    assert "trials      12, seeds 0, 1, 2; each 1 worker of 1 CPU; 3 at a time" in err
    assert "measured    joint: " in err and "measured    aug: " in err and "estimate    " in err
    found = json.loads(out)
    assert found["total"] == 12 and found["trials"][0] == {
        "name": "joint-lr0.01-seed0", "vary": {"method": "joint", "optim.lr": 0.01}, "seed": 0}  # fmt: skip


def test_a_corpus_on_the_command_line_takes_the_experiment_beside(place: Path, corpus_of_three: str) -> None:
    file = place / "experiments" / "sweeps" / "s.yaml"
    file.write_text(yaml.safe_dump({"experiment": "../base.yaml"}))
    (place / "experiments" / "other.yaml").write_text(yaml.safe_dump(settings(corpus_of_three, epochs=9)))
    assert ask(str(file), "other", [], None, None).experiment["epochs"] == 9
    found = ask(str(file), corpus_of_three, [], 2, range(3))
    assert found.experiment["corpus"] == corpus_of_three and found.experiment["epochs"] == 3
    assert "modalities" not in found.experiment, "those of the other corpus would not fit"
    assert found.sweep.resources.workers == 2 and found.sweep.seeds == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"--set optim.lr=1: the sweep varies optim.lr"):
        file.write_text(yaml.safe_dump({"experiment": "../base.yaml", "vary": {"optim.lr": [1, 2]}}))
        ask(str(file), None, ["optim.lr=1"], None, None)


# --- the weak modality

FIXED = "aug:assign=fixed:classifiers.{weak}=3"
WITH_WEAK = {
    "experiment": "../base.yaml",
    "title": "Classifiers of {weak}",
    "vary": {"method": ["joint", FIXED], "method.classifiers.{weak}x": [1]},
    "report": {"baseline": FIXED, "rows": {FIXED: "{weak}: 3"}},
}


def say_weak(corpus: str, folder: Path, weak: str | None) -> str:
    """The same corpus, by a card that says which modality is weak."""
    folder.mkdir()
    card = yaml.safe_load((Path(corpus) / "corpus.yaml").read_text())
    for split in card["splits"].values():
        split["files"] = str(Path(corpus) / split["files"])
    (folder / "corpus.yaml").write_text(yaml.safe_dump(card | {"weak": weak}))
    return str(folder)


@pytest.fixture
def weak_sweep(place: Path) -> Path:
    file = place / "experiments" / "sweeps" / "w.yaml"
    file.write_text(yaml.safe_dump(WITH_WEAK, sort_keys=False))
    return file


def test_every_text_of_a_sweep_may_name_the_weak_modality(weak_sweep: Path, corpus: str, tmp_path: Path) -> None:
    asked = ask(str(weak_sweep), None, [], None, None, "strong")
    fixed = "aug:assign=fixed:classifiers.strong=3"
    assert asked.sweep.title == "Classifiers of strong"
    assert asked.sweep.vary == {"method": ["joint", fixed], "method.classifiers.strongx": [1]}
    assert asked.sweep.report == {"baseline": fixed, "rows": {fixed: "strong: 3"}}
    said = say_weak(corpus, tmp_path / "said", "weak")
    by_card = ask(str(weak_sweep), said, [], None, None)
    assert by_card.sweep.title == "Classifiers of weak", "as the card says"
    assert ask(str(weak_sweep), None, [f"corpus={said}"], None, None).sweep == by_card.sweep
    assert ask(str(weak_sweep), said, [], None, None, "strong").sweep == asked.sweep, "the option goes before the card"


def test_a_sweep_that_names_the_weak_modality_says_how_to_tell_it(
    weak_sweep: Path, corpus: str, corpus_of_three: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        ask(str(weak_sweep), None, [], None, None)
    text = str(raised.value)
    assert f"{weak_sweep} names the weak modality in 'Classifiers of {{weak}}', '{FIXED}', " in text
    assert "the card of corpus instruments does not say which one is weak" in text
    assert f"--weak NAME, or write weak: NAME into {corpus}/corpus.yaml (one of: strong, weak)" in text
    with pytest.raises(ConfigError, match=r"--weak is 'wek', did you mean 'weak'\?.* are trained: strong, weak$"):
        ask(str(weak_sweep), None, [], None, None, "wek")

    said = say_weak(corpus_of_three, tmp_path / "said", "third")
    two = ["modalities={strong: mlp, weak: mlp}"]
    with pytest.raises(ConfigError, match="says third, which is not trained; give --weak NAME"):
        ask(str(weak_sweep), said, two, None, None)
    with pytest.raises(ConfigError, match=r"--weak is 'third'; .* are trained: strong, weak$"):
        ask(str(weak_sweep), said, two, None, None, "third")


def test_what_names_the_weak_modality_twice_is_refused_and_what_does_not_name_it_asks_for_nothing(
    weak_sweep: Path, corpus: str, corpus_of_three: str, tmp_path: Path
) -> None:
    rows = {"{weak}": "a", "strong": "b"}
    weak_sweep.write_text(yaml.safe_dump({"experiment": "../base.yaml", "report": {"rows": rows}}))
    with pytest.raises(ConfigError, match=r"\{weak\} is strong here, and 'strong' is then given twice"):
        ask(str(weak_sweep), None, [], None, None, "strong")
    places = [say_weak(corpus, tmp_path / "a", "weak"), say_weak(corpus_of_three, tmp_path / "b", "third")]
    content = {"experiment": "../base.yaml", "title": "{weak}", "vary": {"corpus": places}}
    weak_sweep.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"varies corpus, and \{weak\} would be third or weak"):
        ask(str(weak_sweep), corpus, [], None, None)
    assert ask(str(weak_sweep), corpus, [], None, None, "weak").sweep.title == "weak"
    weak_sweep.write_text(yaml.safe_dump({"experiment": "../base.yaml", "vary": {"method": ["joint"]}}))
    assert ask(str(weak_sweep), None, [], None, None, "weak") == ask(str(weak_sweep), None, [], None, None)


def test_a_sweep_keeps_the_name_and_not_the_place_for_it(weak_sweep: Path, command: Any, corpus: str) -> None:
    content = {"vary": {"method": ["joint", FIXED]}, "report": {"rows": {FIXED: "Fixed"}}}
    code, out, _ = command(content, "--weak", "weak", "--dry-run", "--json")
    asked = json.loads(out)["asked"]
    assert code == 0 and "{weak}" not in out and Asked.from_json(asked).to_json() == asked
    other = {**asked, "sweep": {**asked["sweep"], "vary": {"method": ["joint", FIXED.replace("{weak}", "strong")]}}}
    with pytest.raises(RefusedError, match="not the sweep that was started: vary changed"):
        check_extends(Asked.from_json(asked), Asked.from_json(other))
    code, _, err = command(content, "--dry-run")
    assert code == 2 and "does not say which one is weak" in err
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--name", "x", "--resume", "--weak", "weak"])
    assert ended.value.code == 2


# --- trials


def names(content: dict[str, Any]) -> list[str]:
    return [trial.name for trial in plan(read_sweep(content, "s.yaml"))]


def test_a_grid_is_every_combination_seed_by_seed() -> None:
    vary = {"method": ["joint", "aug:lam=0.2"], "optim.lr": [0.01, 1e-5]}
    points = ["joint-lr0.01", "joint-lr1e-05", "aug-lam0.2-lr0.01", "aug-lam0.2-lr1e-05"]
    assert names({"vary": vary, "seeds": [3, 1]}) == [f"{p}-seed{seed}" for seed in (3, 1) for p in points]
    assert names({}) == ["run-seed0"]


def test_names_differ_and_are_safe_whatever_the_values_are() -> None:
    schedules = [{"name": "cosine"}, {"name": "step", "every": 3}, "../../etc", "a b", "ab", "k" * 300]
    found = names({"vary": {"optim.schedule": schedules, "method.schedule": ["é", "è"]}})
    assert len(set(found)) == len(found) == 12
    for name in found:
        check_name(name)


def test_random_points_depend_on_the_seed_and_their_number_alone() -> None:
    space = {
        **LR,
        "method.lam": {"uniform": [0, 1]},
        "batch_size": {"choice": [32, 64]},
        "epochs": {"integers": [2, 4]},
    }
    search = {"name": "random", "trials": 40, "space": space}
    found = plan(read_sweep({"search": search, "vary": {"method": ["aug", "aug:tau=0.02"]}}, "s"))
    assert len(found) == 80 and found[0].name == "aug-p000-seed0"
    first, second = ([{k: v for k, v in t.vary.items() if k != "method"} for t in part] for part in
                     (found[:40], found[40:]))  # fmt: skip
    assert first == second, "the same points for every method"
    assert plan(read_sweep({"search": {**search, "trials": 5}}, "s"))[4].vary == first[4]
    assert plan(read_sweep({"search": {**search, "seed": 1}}, "s"))[0].vary != first[0]
    rates = [point["optim.lr"] for point in first]
    assert all(0.001 <= rate <= 0.1 and rate == float(f"{rate:.4g}") for rate in rates)
    assert 12 < sum(rate < 0.01 for rate in rates) < 28, "half of a logarithmic range lies below its middle"
    assert {point["epochs"] for point in first} == {2, 3, 4} and {point["batch_size"] for point in first} == {32, 64}


def test_how_many_trials_run_at_once() -> None:
    assert fits(Resources(), 8, 0) == 8
    assert fits(Resources(workers=2, cpus=1.5), 8, 0) == 2
    assert fits(Resources(cpus=0.1), 0.3, 0) == 3, "0.3 / 0.1 is less than 3 in floating point"
    assert fits(Resources(gpus=0.5), 8, 1) == 2 and fits(Resources(gpus=1), 8, 0) == 0


def test_only_more_of_a_sweep_may_be_asked_for_later() -> None:
    def asked(**content: Any) -> Asked:
        return Asked(read_sweep(content, "s"), "base.yaml", {"corpus": "x"})

    old = asked(vary={"optim.lr": [0.1]}, seeds=[0, 1])
    check_extends(old, asked(vary={"optim.lr": [0.2, 0.1]}, seeds=[0, 1, 2], resources={"workers": 2}, title="New"))
    for content, what in (
        ({"vary": {"optim.lr": [0.2]}, "seeds": [0, 1]}, "vary"),
        ({"vary": {"optim.lr": [0.1]}, "seeds": [0]}, "seeds"),
        ({"vary": {"optim.lr": [0.1]}, "seeds": [0, 1], "scheduler": "asha"}, "scheduler"),
    ):
        with pytest.raises(RefusedError, match=rf"not the sweep that was started: {what} changed"):
            check_extends(old, asked(**content))
    search = {"name": "random", "trials": 3, "space": LR}
    check_extends(asked(search=search), asked(search={**search, "trials": 4}))
    with pytest.raises(RefusedError, match="search changed"):
        check_extends(asked(search=search), asked(search={**search, "trials": 2}))
    again = Asked.from_json(json.loads(json.dumps(old.to_json())))
    assert again == old


# --- searching


class Study:
    """Asks for lr 0.1, 0.2, ...; remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float | None]] = []

    def ask(self, number: int) -> dict[str, Any]:
        return {"optim.lr": (number + 1) / 10}

    def tell(self, number: int, selected: float | None) -> None:
        self.told.append((number, selected))


def suggestions(known: dict[str, float | None]) -> tuple[Suggestions, Study]:
    search = {"name": "optuna", "trials": 3, "batch": 2, "space": LR}
    sweep, study = read_sweep({"search": search, "seeds": [0, 1]}, "s"), Study()
    order: Any = lambda trial: trial  # noqa: E731
    look = lambda trial: (trial.name in known, known.get(trial.name))  # noqa: E731
    return Suggestions(sweep, lambda: study, look, order, lambda t: f"{t.vary}{t.seed}"), study


def test_a_point_is_told_the_mean_over_its_seeds_when_its_batch_is_whole() -> None:
    source, study = suggestions({})
    first = [source.next() for _ in range(4)]
    assert [trial.name for trial in first if trial] == [f"p00{p}-seed{s}" for p in (0, 1) for s in (0, 1)]
    assert source.next() is None and not source.exhausted()
    source.done("p001-seed1", 0.9)
    source.done("p001-seed0", 0.7)
    source.done("p000-seed1", None)
    assert source.next() is None and not study.told, "the other point of the batch is still missing"
    source.done("p000-seed0", 0.5)
    assert study.told == [(0, None), (1, pytest.approx(0.8))]
    assert [source.next() for _ in range(3)][2] is None
    source.done("p002-seed0", 0.1)
    source.done("p002-seed1", 0.2)
    assert source.exhausted() and study.told[2] == (2, pytest.approx(0.15))


def test_points_that_have_ended_are_told_and_not_run() -> None:
    source, study = suggestions({"p000-seed0": 0.5, "p000-seed1": 0.6, "p001-seed0": 0.4})
    trial: Any = source.next()
    assert trial.name == "p001-seed1" and source.next() is None
    source.done("p001-seed1", 0.2)
    assert study.told == [(0, pytest.approx(0.55)), (1, pytest.approx(0.3))]


# --- populations

PBT = Pbt(interval=2, mutate={"optim.lr": Domain(log_uniform=(0.001, 0.1))}, quantile=0.25)


def test_the_worst_quarter_goes_on_from_the_best_quarter() -> None:
    valid = {f"t{i}": accuracy for i, accuracy in enumerate([0.5, 0.9, 0.1, 0.8, 0.2, 0.6, 0.7, 0.4])}
    found = pairs(PBT, 4, valid)
    assert set(found) == {"t2", "t4"} and set(found.values()) <= {"t1", "t3"}
    assert found == pairs(PBT, 4, valid), "a function of seed, epoch and accuracies"
    assert len({tuple(pairs(PBT, epoch, valid).values()) for epoch in range(30)}) > 1
    assert pairs(PBT, 2, {"a": 0.5, "b": 0.5}) == {}, "equals have nothing to gain"
    assert pairs(PBT, 2, {"a": 0.4, "b": 0.5}) == {"a": "b"}


def test_values_are_explored_within_their_bounds() -> None:
    rng = np.random.default_rng(0)
    rate = Domain(log_uniform=(0.001, 0.1))
    assert {rate.near(0.01, rng, (0.8, 1.2)) for _ in range(20)} == {0.008, 0.012}
    assert rate.near(0.0011, rng, (0.5,)) == 0.001
    assert {Domain(choice=["a", "b", "c"]).near("b", rng, (1,)) for _ in range(20)} == {"a", "c"}
    assert Domain(choice=["a", "b"]).near("z", rng, (1,)) == "a"
    assert Domain(integers=(1, 5)).near(4, rng, (1.2,)) == 5


def test_a_run_that_goes_on_from_another_has_its_weights_classifiers_and_optimizer(
    corpus: str, run_experiment: Run, tmp_path: Path
) -> None:
    """Both at the end of epoch 2; afterwards the loser's third epoch is the one that the winner's weights give."""
    content = settings(corpus, method={"name": "aug", "sigma": 5.0}, epochs=3)
    made: dict[str, RunFolder] = {}
    for name, sets in (("loser", ["optim.lr=0.000001"]), ("winner", [])):
        experiment, provenance = resolve(content, sets)
        made[name] = new_folder(tmp_path, experiment, provenance, name)
        with pytest.raises(Interrupted, match="stopped after epoch 2 of 3, as asked"):
            run_until(made[name], experiment, 2)
    loser, winner = made["loser"], made["winner"]
    experiment, _ = resolve(content, ["optim.lr=0.02"])
    exploit(loser, winner, experiment, {"optim.lr": 0.02})
    theirs, own = (checkpoint.latest(folder.checkpoints) for folder in (winner, loser))
    assert theirs is not None and own is not None
    for part in ("model", "optimizer"):
        assert theirs.tensors[part].keys() == own.tensors[part].keys()
        assert all(torch.equal(theirs.tensors[part][key], own.tensors[part][key]) for key in theirs.tensors[part])
    grown = theirs.state["architecture"]["num_classifiers"]
    assert own.state["architecture"]["num_classifiers"] == grown and sum(grown.values()) == 4
    assert own.state["progress"]["decisions"] == theirs.state["progress"]["decisions"]
    assert own.state["digest"] == experiment.digest
    event = loser.records()[-1]
    assert event["event"] == "exploited" and event["from"] == "winner" and event["classifiers"] == grown
    assert event["valid"] > event["valid_before"]

    count = len(loser.records())
    exploit(loser, winner, experiment, {"optim.lr": 0.02})
    assert len(loser.records()) == count, "done again after a crash it changes nothing"

    went: Done = run_experiment(experiment.to_json(), folder=loser, resume=True)
    control = run_experiment(content, ["optim.lr=0.05"], name="control")
    assert went.records("epoch")[2]["classifiers"] == control.records("epoch")[2]["classifiers"]
    assert [r["epoch"] for r in went.records("epoch")] == [1, 2, 3]
    assert went.records("epoch")[2]["lr"] == pytest.approx(0.02)
    assert not loser.verify()
    with pytest.raises(RefusedError, match="do not stand at the end of the same epoch"):
        exploit(winner, loser, experiment, {})


def run_until(folder: RunFolder, experiment: Experiment, until: int) -> None:
    from counterpoise.engine.comm import SingleComm
    from counterpoise.engine.job import Job, execute

    execute(Job(experiment.to_json(), folder.uri, threads=1, until=until), SingleComm())


# --- one trial


@pytest.fixture
def order(corpus: str, tmp_path: Path) -> Order:
    experiment, provenance = resolve(settings(corpus, method="aug", epochs=3))
    content = {"experiment_text": yaml.safe_dump(experiment.to_json()), "provenance": provenance, "manifest": {}}
    return Order(str(tmp_path / "sweep"), "t", content, backoff_s=0.01, place=os.getcwd())


def told(session: Session) -> list[dict[str, Any]]:
    found = [session.next()]
    while not found[-1].get("done"):
        found.append(session.next())
    return found


def test_a_trial_tells_every_epoch_and_waits_there(order: Order) -> None:
    session = Session(order)
    first = session.next()
    assert (first["state"], first["epoch"], first["tries"]) == ("running", 1, 1)
    folder = RunFolder.open(order.uri)
    assert [r["epoch"] for r in folder.records() if r["kind"] == "epoch"] == [1]
    second, last = told(session)
    assert second["epoch"] == 2 and last["state"] == "finished" and last["epoch"] == 3
    accuracies = [r["valid"]["accuracy"]["fused"] for r in folder.records() if r["kind"] == "epoch"]
    assert [first["valid"], second["valid"]] == accuracies[:2]
    assert second["selected"] == max(accuracies[:2]) and last["selected"] == max(accuracies)
    assert told(Session(order)) == [{**last, "tries": 1}], "what has finished is told, and not run again"


def test_a_trial_that_a_scheduler_ends_is_stopped_and_one_that_is_halted_goes_on(order: Order, run_experiment: Run,
                                                                               corpus: str) -> None:  # fmt: skip
    session = Session(order)
    session.next()
    session.halt()
    folder = RunFolder.open(order.uri)
    assert folder.state() == "interrupted" and not folder.is_locked()
    session = Session(order)
    assert session.next()["epoch"] == 2
    folder.request_stop(f"{SCHEDULER}asha")
    session.halt()
    assert session._out.get()["state"] == "stopped"
    assert folder.state() == "stopped" and not folder.is_locked()
    assert folder.records()[-1] == {**folder.records()[-1], "event": "stopped", "by": "asha", "epoch": 2}
    assert told(Session(order))[-1]["state"] == "finished"
    alone = run_experiment(settings(corpus, method="aug", epochs=3))
    found = checkpoint.latest(folder.checkpoints)
    assert found is not None
    assert all(torch.equal(value, found.tensors["model"][key]) for key, value in alone.weights.items())


def test_a_trial_that_fails_in_passing_is_tried_again_and_a_diverging_one_is_not(
    order: Order, monkeypatch: pytest.MonkeyPatch, corpus: str
) -> None:
    execute, calls = session_module.execute, []

    def flaky(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise ResourceError("the disk is away")
        return execute(*args, **more)

    monkeypatch.setattr(session_module, "execute", flaky)
    found = told(Session(order))
    assert [(r["state"], r["tries"]) for r in found[:2]] == [("retrying", 1), ("retrying", 2)]
    assert found[0]["error"] == "the disk is away" and found[-1]["state"] == "finished" and found[-1]["tries"] == 3

    calls.clear()
    other = Order(**{**vars(order), "name": "u", "retries": 1})
    found = told(Session(other))
    assert found[-1] == {"state": "failed", "error": "the disk is away", "tries": 2, "done": True}
    assert RunFolder.open(other.uri).state() == "failed"

    monkeypatch.setattr(session_module, "execute", execute)
    experiment, _ = resolve(settings(corpus, optim={"lr": 1e30}))
    content = {**order.content, "experiment_text": yaml.safe_dump(experiment.to_json())}
    [*_, last] = told(Session(Order(**{**vars(order), "name": "v", "content": content})))
    assert last["state"] == "failed" and last["tries"] == 1 and "is not finite" in last["error"]


def test_a_trial_does_not_begin_while_the_sweep_is_ending(order: Order) -> None:
    Path(order.root).mkdir()
    (Path(order.root) / "stop").write_text("SIGINT")
    assert told(Session(order)) == [{"state": "waiting", "tries": 0, "done": True}]
    assert not Path(order.uri).exists()


def test_a_trial_of_a_population_ends_at_the_round_and_says_so_again(order: Order) -> None:
    member = Order(**{**vars(order), "interval": 2})
    found = told(Session(member))
    assert [(r["state"], r.get("epoch")) for r in found] == [("running", 1), ("running", 2), ("interrupted", None)]
    again = told(Session(member))
    assert again[0] == found[1] and again[1]["state"] == "interrupted", "it waits for the others, also after a restart"
    assert told(Session(member, released=2))[-1]["state"] == "finished"


# --- what came out


def entry(trial: Trial, state: str, selected: float) -> dict[str, Any]:
    return {**vars(trial), "state": state, "tries": 1, "error": None, "time_s": 1.0, "epoch": 3, "selected": selected}


def test_a_point_of_which_a_seed_was_stopped_is_not_averaged(tmp_path: Path, finished: Callable[[str], Done]) -> None:
    """Its seed that went on did so because it was good."""
    run = finished("aug").folder
    root = Path(run.uri).parent
    asked = read_sweep({"vary": {"optim.lr": [0.1, 0.2]}, "seeds": [0, 1], "scheduler": "asha"}, "s")
    rows = [
        entry(Trial(run.name, {"optim.lr": 0.1}, 0, 0), "finished", 0.8),
        entry(Trial("absent", {"optim.lr": 0.1}, 1, 0), "stopped", 0.3),
        entry(Trial(run.name + "x", {"optim.lr": 0.2}, 0, 1), "failed", 0.0) | {"error": "no room"},
    ]
    ledger = Ledger(str(root), {"name": "s", "trials": rows})
    table = tabulate(ledger, asked)
    assert [row.label for row in table.rows] == ["optim.lr=0.2"] and not table.rows[0].finished
    assert any("1 trial was stopped early by asha" in note for note in table.notes)
    assert any("is failed: no room" in note for note in table.notes)
    shown = tabulate(ledger, asked, with_stopped=True)
    assert [len(row.finished) for row in shown.rows] == [1, 0]


def test_the_board_says_what_runs_and_how_far_it_is(tmp_path: Path, finished: Callable[[str], Done]) -> None:
    import io

    from rich.console import Console

    run = finished("aug").folder
    (tmp_path / run.name).symlink_to(run.uri)
    for interactive in (False, True):
        file = io.StringIO()
        board = Board(str(tmp_path), 4, Console(file=file, width=140, force_terminal=interactive), interactive)
        with board.opened():
            board.begin(run.name, "aug, optim.lr=0.1", 7)
            board.refresh(1, 65.0)
            assert board.share(run.name) == 1.0 and board.share("other") == 0.0
            board.end(run.name, "finished")
        text = file.getvalue()
        assert "finished" in text and "fused" in text
        if interactive:
            assert "aug, optim.lr=0.1" in text and "1 of 4 trials ended, 1 running, about 1m05s left" in text
