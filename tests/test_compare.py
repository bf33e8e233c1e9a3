"""Comparisons: what is planned, how values are chosen, what survives interruptions, failures and extensions.

Where only the bookkeeping matters, `pretend` stands for training: it writes the folders that training would leave.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import settings, write_corpus

from counterpoise import compare
from counterpoise.cli import main
from counterpoise.compare import Asked, Tune, parse_method, parse_tune, pick, tuning_note
from counterpoise.engine.job import Job
from counterpoise.engine.run import RunFolder, check_name
from counterpoise.methods import METHODS


class Ended:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def trials(self) -> list[str]:
        """Methods and seeds of the trials that were started."""
        return [
            line.split(": ", 1)[1].split(", about")[0] for line in self.err.splitlines() if line.startswith("trial ")
        ]


Command = Callable[..., Ended]


@pytest.fixture
def place(tmp_path: Path, corpus: str) -> Path:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=2)))
    return tmp_path


@pytest.fixture
def command(place: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """command("--methods", "joint,late") -> how `compare small.yaml` ended; "--resume" leaves the file out."""

    def call(*arguments: object) -> Ended:
        capfd.readouterr()
        file = [] if "--resume" in arguments else [place / "small.yaml"]
        fixed = ["--runs", place / "runs", "--device", "cpu", "--threads", 1]
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in ("compare", *file, *fixed, *arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return Ended(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """pretend(valid, test): runs end at once, with these fused accuracies: functions of (method, lr, seed)."""

    def use(
        valid: Callable[[str, float, int], float],
        test: Callable[[str, float, int], float | None],
        before: Callable[[str, Any], None] = lambda name, stop: None,
    ) -> None:
        def run_jobs(jobs: Sequence[Job], settings: Any, *, stop: Any) -> None:
            folder = RunFolder.open(jobs[0].run)
            before(folder.name, stop)
            experiment = jobs[0].experiment
            what = experiment["method"]["name"], experiment["optim"]["lr"], experiment["seed"]
            summary = {"run": folder.name, "method": what[0], "corpus": "pair", "modalities": ["strong", "weak"]}
            summary |= {"seed": what[2], "wall_s": 1.0, "valid": {"accuracy": {"fused": valid(*what)}}}
            if (accuracy := test(*what)) is not None:
                summary["test"] = {"accuracy": {"fused": accuracy, "strong": 0.5, "weak": 0.4}, "gap": 0.1}
            folder.write_json("summary.json", summary)
            folder.write_status({"state": "finished"}, force=True)

        monkeypatch.setattr(compare, "run_jobs", run_jobs)

    return use


def saved(place: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / "runs" / name / "comparison.json").read_text())
    return content


# --- what is asked


def test_a_method_may_carry_settings() -> None:
    assert parse_method("joint") == ("joint", [])
    assert parse_method("aug:lam=0.2:optim.lr=0.02:classifiers.weak=3") == (
        "aug",
        ["method.lam=0.2", "optim.lr=0.02", "method.classifiers.weak=3"],
    )
    assert parse_tune("optim.lr=0.01, 0.1") == ("optim.lr", ("0.01", "0.1"))


def test_folders_have_safe_names_that_say_what_is_in_them() -> None:
    asked = Asked({}, "x", (), ("aug",), (0, 1), Tune("optim.lr", ("0.03", "1e-1"), (0,)))
    assert asked.trial("aug", 0, "0.03").name == "aug-lr0.03-seed0"
    assert (
        Asked({}, "x", (), ("aug",), (0,)).trial("aug:lam=0.2:check_every=2", 7).name == "aug-lam0.2-check_every2-seed7"
    )
    for label in ("aug:a=../..", "aug:a='x y'", "aug:" + "k" * 300 + "=1", "aug:a=é"):
        check_name(asked.trial(label, 12345, "1e-1").name)


MISTAKES = [
    (["-m", "joint,agu"], "unknown method 'agu', did you mean 'aug'?"),
    (["-m", "joint,aug:lan=1"], "did you mean 'lam'?"),
    (["-m", "joint,aug:lam"], "name:key=value"),
    (["-m", "joint,unimodal"], "method.modality: is missing"),
    (["-m", "joint,unimodal:modality=wek"], "did you mean 'weak'?"),
    (["-m", "joint:data.cache=off,late"], "change it with --set data.cache=off"),
    (["-m", "joint,joint:head=concat"], "are the same experiment"),
    (["-m", ","], "name methods"),
    ([], "name what to compare"),
    (["-m", "joint", "--set", "method.head=sum"], "given in --methods"),
    (["-m", "joint", "--set", "seed=3"], "given with --seeds"),
    (["-m", "joint", "--set", "epochs=0"], "epochs"),
    (["-m", "joint", "--tune", "optim.lr=0.1"], "two values or more"),
    (["-m", "joint", "--tune", "optim.lr=0.1,1e-1"], "each once"),
    (["-m", "joint", "--tune", "epochs=1,2"], "a setting of the optimizer"),
    (["-m", "joint", "--tune", "optim.lrr=1,2"], "did you mean 'lr'?"),
    (["-m", "joint", "--tune", "optim.lr=0.1,-1"], "optim.lr"),
    (["-m", "joint:optim.lr=1,late", "--tune", "optim.lr=0.1,0.2"], "which --tune varies"),
    (["-m", "joint", "--tune-seeds", "1"], "--tune-seeds needs --tune"),
    (["-m", "joint", "--seeds", "2", "--tune", "optim.lr=1,2", "--tune-seeds", "3"], "only 2 seeds"),
    (["-m", "joint", "--name", "../up"], "run name '../up'"),
    (["-m", "joint", "--engine", "lokal"], "did you mean 'local'?"),
]


@pytest.mark.parametrize(("more", "text"), MISTAKES, ids=[" ".join(m[0]) or "nothing" for m in MISTAKES])
def test_mistakes_are_found_before_anything_starts(place: Path, command: Command, more: list[str], text: str) -> None:
    ended = command(*more)
    assert ended.code == 2 and text in ended.err and not ended.out
    assert not (place / "runs").exists()


def test_a_dry_run_prints_the_plan_and_starts_nothing(place: Path, command: Command) -> None:
    methods = "joint,aug:lam=0.2:optim.momentum=0.5"
    ended = command("-m", methods, "--seeds", 2, "--tune", "optim.lr=0.01,0.1", "--dry-run", "--json")
    assert ended.code == 0 and not (place / "runs").exists()
    assert "trials      6: 2 methods, seeds 0-1, optim.lr=0.01,0.1 on seed 0" in ended.err
    assert "2 epochs of 8 batches of up to 32, the same for every method" in ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("method      aug")]
    assert "lam=0.2, optim.momentum=0.5;" in line
    names = json.loads(ended.out)["trials"]
    assert names[:2] == ["joint-lr0.01-seed0", "joint-lr0.1-seed0"] and len(names) == 6


def test_all_is_every_method_that_can_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "METHODS", {name: METHODS[name] for name in ("aug", "joint", "late", "unimodal")})
    ended = command("-m", "all", "--dry-run", "--json", "--seeds", 1)
    assert json.loads(ended.out)["asked"]["methods"] == [
        "aug", "joint", "late", "unimodal:modality=strong", "unimodal:modality=weak"]  # fmt: skip
    monkeypatch.setattr(METHODS["aug"], "min_modalities", 3)
    ended = command("-m", "all", "--dry-run", "--json", "--seeds", 1)
    assert json.loads(ended.out)["asked"]["methods"][:2] == ["joint", "late"]
    assert "left out    aug: " in ended.err and "needs at least" in ended.err


# --- tuning


def test_the_best_on_valid_is_picked() -> None:
    assert pick({"0.1": [0.5, 0.7], "0.2": [0.9, 0.2]}) == "0.1"
    assert pick({"0.2": [0.6], "0.1": [0.6]}) == "0.2", "the first of equals"
    assert pick({"0.1": [0.1, 0.1], "0.2": [0.9, None]}) == "0.1", "a failed trial loses"
    assert pick({"0.1": [None], "0.2": [None]}) is None
    assert tuning_note("optim.lr", "aug", "0.1", {"0.1": [0.5, 0.7], "0.2": [0.9, None]}) == (
        "aug: optim.lr 0.1 chosen; mean fused accuracy on valid: 0.1 0.600, 0.2 failed."
    )


def test_tuning_sees_valid_and_never_test(place: Path, command: Command, pretend: Callable[..., None]) -> None:
    """Valid and test disagree, and runs that are only for tuning have no test numbers that could be read."""

    def valid(method: str, lr: float, seed: int) -> float:
        return {"joint": {0.01: 0.5, 0.1: 0.6}, "late": {0.01: 0.6, 0.1: 0.5}}[method][lr]

    def test(method: str, lr: float, seed: int) -> float | None:
        return 0.3 if valid(method, lr, seed) == 0.6 else None if seed in (0, 1) else 0.9

    pretend(valid, test)
    ended = command("-m", "joint,late", "--seeds", 3, "--tune", "optim.lr=0.01,0.1", "--tune-seeds", 2, "--name", "t")
    assert ended.code == 0, ended.err
    assert len(ended.trials) == 10 and ended.trials[-2:] == ["joint seed 2, optim.lr 0.1", "late seed 2, optim.lr 0.01"]
    result = saved(place, "t")["result"]
    assert [(row["chosen"], row["n"], row["fused"]["mean"]) for row in result["methods"]] == [
        ("0.1", 3, pytest.approx(0.3)),
        ("0.01", 3, pytest.approx(0.3)),
    ]
    assert result["methods"][0]["tuning"] == {"0.01": [0.5, 0.5], "0.1": [0.6, 0.6]}
    assert "joint: optim.lr 0.1 chosen; mean fused accuracy on valid: 0.01 0.500, 0.1 0.600." in ended.out
    assert "Chosen on valid alone, with seeds 0-1." in ended.out
    assert result["methods"][1]["runs"] == [f"late-lr0.01-seed{seed}" for seed in range(3)]


def test_tuning_needs_a_valid_split(tmp_path: Path, place: Path, command: Command) -> None:
    bare = write_corpus(tmp_path / "bare", rows={"train": 40, "test": 8})
    (place / "small.yaml").write_text(yaml.safe_dump(settings(bare, select="last")))
    ended = command("-m", "joint", "--tune", "optim.lr=0.1,0.2")
    assert ended.code == 2 and "--tune chooses on the valid split" in ended.err


def test_tuning_on_the_split_that_is_shown_is_said(tmp_path: Path, place: Path, command: Command) -> None:
    bare = write_corpus(tmp_path / "bare", rows={"train": 40, "valid": 20})
    (place / "small.yaml").write_text(yaml.safe_dump(settings(bare, epochs=1)))
    ended = command("-m", "joint", "--seeds", 1, "--tune", "optim.lr=0.1,0.2")
    assert ended.code == 0 and "joint (valid)" in ended.out
    assert "The corpus has no test split: values were chosen by the numbers that are shown." in ended.out


def test_a_value_that_fails_loses_and_a_method_that_loses_all_is_left_out(place: Path, command: Command) -> None:
    ended = command("-m", "joint", "--seeds", 2, "--tune", "optim.lr=1e9,0.05", "--name", "t")
    assert ended.code == 0 and "1e9 failed" in ended.out and len(ended.trials) == 3
    ended = command("-m", "late", "--seeds", 2, "--tune", "optim.lr=1e9,2e9", "--name", "u")
    assert ended.code == 1 and "no optim.lr could be trained, left out" in ended.out and len(ended.trials) == 2
    assert "late-lr1e9-seed0 is failed" in ended.out
    assert saved(place, "u")["result"]["methods"][0]["n"] == 0


# --- from start to end


def test_a_comparison_and_its_extension(place: Path, command: Command) -> None:
    ended = command("-m", "joint,late", "--seeds", 2, "--name", "c", "--set", "optim.lr=0.06")
    assert ended.code == 0, ended.err
    assert ended.trials == ["joint seed 0", "late seed 0", "joint seed 1", "late seed 1"]
    assert ", about " in ended.err and "trial 2 of 4" in ended.err
    lines = ended.out.splitlines()
    assert lines[0].split()[:3] == ["method", "n", "fused"] and "p vs joint" in lines[0] and "time ratio" in lines[0]
    assert "2 seeds cannot reach p < 0.05" in ended.out
    page = (place / "runs" / "c" / "report.html").read_text()
    assert "<h2>Methods on equal terms</h2>" in page and "late-seed1" in page and "joint and late on " in page
    manifest = RunFolder.open(str(place / "runs" / "c" / "late-seed1")).manifest
    assert manifest["seed"] == 1 and manifest["argv"] == sys.argv[1:]

    before = {p: p.stat().st_mtime_ns for p in (place / "runs" / "c").glob("*/records.jsonl")}
    ended = command("--resume", "--name", "c", "--seeds", 3, "-m", "joint,unimodal:modality=weak,late", "--json")
    assert ended.code == 0, ended.err
    assert ended.trials == ["unimodal:modality=weak seed 0", "unimodal:modality=weak seed 1", "joint seed 2",
                            "unimodal:modality=weak seed 2", "late seed 2"]  # fmt: skip
    assert all(p.stat().st_mtime_ns == at for p, at in before.items()), "what was finished is kept"
    content = json.loads(ended.out)
    assert content == saved(place, "c") and content["asked"]["sets"] == ["optim.lr=0.06"]
    rows = {row["label"]: row for row in content["result"]["methods"]}
    assert [row["n"] for row in rows.values()] == [3, 3, 3] and content["result"]["reference"] == "joint"
    assert set(rows["late"]["fused_by_seed"]) == {"0", "1", "2"} and rows["joint"]["p_reference"] is None
    assert 0 <= rows["late"]["p_reference"] <= 1 and rows["late"]["time_ratio"] > 0

    with pytest.raises(SystemExit) as done:
        main(["report", str(place / "runs" / "c"), "--out", str(place / "all.html")])
    assert not done.value.code and "late-seed2" in (place / "all.html").read_text()

    refused = command(
        "--resume", "--name", "c", "-m", "late", "--seeds", 1, "--set", "epochs=9", "--tune", "optim.lr=1,2"
    )
    assert refused.code == 6
    for text in ("without joint, unimodal:modality=weak", "seeds 0-2 -> seed 0", "epochs: 2 -> 9", "tune: nothing -> "):
        assert text in refused.err
    taken = command("-m", "joint", "--name", "c")
    assert taken.code == 6 and "continue it with --resume" in taken.err
    assert saved(place, "c") == content


@pytest.mark.parametrize(("reason", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_an_interrupted_comparison_goes_on_where_it_was(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, reason: str, code: int
) -> None:
    train = compare.run_jobs

    def interrupted(jobs: Sequence[Job], *arguments: Any, stop: Any) -> Any:
        stop.reason = reason if "late-seed0" in jobs[0].run else None
        return train(jobs, *arguments, stop=stop)

    monkeypatch.setattr(compare, "run_jobs", interrupted)
    ended = command("-m", "joint,late", "--seeds", 2, "--name", "i")
    assert ended.code == code and not ended.out
    assert "trial 2 of 4, late-seed0: stopped" in ended.err and "continue with --resume --name i" in ended.err
    states = {name: RunFolder(str(place / "runs" / "i" / name)).state() for name in ("joint-seed0", "late-seed0")}
    assert states == {"joint-seed0": "finished", "late-seed0": "interrupted"}
    assert saved(place, "i")["result"] is None
    monkeypatch.setattr(compare, "run_jobs", train)
    ended = command("--resume", "--name", "i")
    assert ended.code == 0 and ended.trials == ["late seed 0", "joint seed 1", "late seed 1"]
    kinds = [record.get("event") for record in RunFolder.open(str(place / "runs" / "i" / "late-seed0")).records()]
    assert "resumed" in kinds


def test_a_wish_to_stop_between_trials_is_heard(place: Path, command: Command, pretend: Callable[..., None]) -> None:
    def before(name: str, stop: Any) -> None:
        stop.reason = "SIGINT" if name == "late-seed0" else None

    pretend(lambda *_: 0.5, lambda *_: 0.5, before)
    ended = command("-m", "joint,late", "--seeds", 2, "--name", "w")
    assert ended.code == 130 and "trial 3 of 4, joint-seed1: stopped (SIGINT) before it began" in ended.err
    assert not (place / "runs" / "w" / "joint-seed1").exists()


def test_a_failed_trial_does_not_stop_the_others(place: Path, command: Command) -> None:
    ended = command("-m", "joint,aug:hidden=16:optim.lr=1e9,late", "--seeds", 2, "--name", "f")
    assert ended.code == 1 and len(ended.trials) == 6
    assert "not finite" in ended.err and "some trials failed" in ended.err
    assert "aug-hidden16-optim.lr1e9-seed1 is failed" in ended.out
    rows = saved(place, "f")["result"]["methods"]
    assert [row["n"] for row in rows] == [2, 0, 2]
    assert all("not finite" in text for text in rows[1]["failed"].values()) and len(rows[1]["failed"]) == 2
    again = command("--resume", "--name", "f")
    assert again.code == 1 and [t.split(":")[0] for t in again.trials] == ["aug", "aug"], (
        "a failed trial is tried again"
    )


def test_an_unexpected_error_is_a_failed_trial_with_a_reason(
    place: Path, command: Command, pretend: Callable[..., None]
) -> None:
    def before(name: str, stop: Any) -> None:
        if name == "late-seed1":
            raise ZeroDivisionError("oh")

    pretend(lambda *_: 0.5, lambda method, lr, seed: 0.5 + 0.1 * (method == "late"), before)
    ended = command("-m", "joint,late", "--seeds", 3, "--name", "e")
    assert ended.code == 1 and len(ended.trials) == 6
    assert "late-seed1 is failed, and not in the numbers: ZeroDivisionError: oh" in ended.out
    rows = saved(place, "e")["result"]["methods"]
    assert [row["n"] for row in rows] == [3, 2] and rows[1]["difference"]["mean"] == pytest.approx(0.1)
    assert rows[1]["p_reference"] == 0.5, "two seeds are in common"


def test_what_is_no_comparison_is_not_resumed(place: Path, command: Command, pretend: Callable[..., None]) -> None:
    ended = command("--resume", "--name", "nobody")
    assert ended.code == 3 and "is not a comparison" in ended.err
    ended = command("--resume")
    assert ended.code == 2 and "--resume needs the --name" in ended.err
    pretend(lambda *_: 0.5, lambda *_: 0.5)
    assert command("-m", "joint,late", "--seeds", 1, "--name", "d").code == 0
    (place / "runs" / "d" / "comparison.json").write_text("{")
    ended = command("--resume", "--name", "d")
    assert ended.code == 6 and "is damaged" in ended.err


def test_a_trial_of_other_data_is_refused(place: Path, command: Command, pretend: Callable[..., None]) -> None:
    pretend(lambda *_: 0.5, lambda *_: 0.5)
    assert command("-m", "joint,late", "--seeds", 1, "--name", "d").code == 0
    folder = RunFolder.open(str(place / "runs" / "d" / "late-seed0"))
    folder.write_json("run.json", folder.manifest | {"data_fingerprint": "another"})
    ended = command("--resume", "--name", "d", "--seeds", 2)
    assert ended.code == 6 and "is not the one this run was started with" in ended.err


def test_one_ray_cluster_serves_all_trials(
    command: Command, pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def cluster(workers: int, tasks: int, **options: Any) -> Iterator[None]:
        seen.append(f"up for {workers}")
        yield
        seen.append("down")

    pytest.importorskip("ray")
    monkeypatch.setattr("counterpoise.launch.cluster.cluster", cluster)
    pretend(lambda *_: 0.5, lambda *_: 0.5, lambda name, stop: seen.append(name))
    more = ("--engine", "ray", "--workers", 2, "--name", "r")
    assert command("-m", "joint,late", "--seeds", 1, "--tune", "optim.lr=1,2", *more).code == 0
    assert seen[0] == "up for 2" and seen[-1] == "down" and len(seen) == 6
    assert command("--resume", *more).code == 0 and len(seen) == 6, "nothing to do needs no cluster"


@pytest.mark.s3
def test_a_comparison_may_lie_in_object_storage(bucket: str, command: Command, pretend: Callable[..., None]) -> None:
    pretend(lambda *_: 0.5, lambda *_: 0.5)
    runs = f"{bucket}/runs"
    ended = command("-m", "joint,late", "--seeds", 1, "--runs", runs, "--name", "c")
    assert ended.code == 0 and "report" not in ended.err, "a report is for a place where it can be opened"
    taken = command("-m", "joint,late", "--runs", runs, "--name", "c")
    assert taken.code == 6
    out = f"{bucket}/report.html"
    ended = command("--resume", "--runs", runs, "--name", "c", "--seeds", 2, "--out", out)
    assert ended.code == 0 and ended.trials == ["joint seed 1", "late seed 1"] and f"report in {out}" in ended.err
