from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from counterpoise.contracts import DataError
from counterpoise.reports.records import RunData, classifier_steps, read_run, reason, series

Make = Callable[..., Path]


def test_a_finished_run_is_read(tmp_path: Path, make_run: Make) -> None:
    run = read_run(str(make_run(tmp_path, "aug", epochs=8)))
    assert (run.name, run.method, run.corpus, run.seed, run.state) == ("cremad-aug-0", "aug", "cremad", 0, "finished")
    assert run.modalities == ("audio", "visual")
    assert [r["epoch"] for r in run.epochs] == list(range(1, 9))
    assert [d["epoch"] for d in run.decisions] == [1, 3, 6]
    assert len(run.skipped) == 2


def test_an_unfinished_run_is_read(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "aug", epochs=8, upto=3)
    for name in ("status.json", "provenance.json", "experiment.yaml", "ledger.jsonl"):
        (folder / name).unlink()
    run = read_run(str(folder))
    assert (run.state, run.finished, len(run.epochs), run.num_epochs) == ("unfinished", False, 3, 8)


def test_a_run_that_has_not_begun_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text('{"run": "where it was before"}')
    run = read_run(str(tmp_path / "a"))
    assert (run.name, run.epochs, run.modalities) == ("a", [], ())


def test_a_torn_last_line_is_left_out(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "joint", seed=1, epochs=4, upto=3)
    records = folder / "records.jsonl"
    records.write_bytes(records.read_bytes()[:-40])
    run = read_run(str(folder))
    assert (len(run.epochs), run.damaged_lines) == (2, 1)


def test_what_a_resumed_run_repeats_replaces_what_it_repeats(tmp_path: Path) -> None:
    def epoch(n: int, gap: float) -> dict[str, object]:
        return {"kind": "epoch", "epoch": n, "gap": gap}

    lines = [epoch(1, 0.1), epoch(2, 0.2), {"kind": "decision", "epoch": 2}, epoch(3, 0.3), epoch(2, 0.5)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_run(str(tmp_path))
    assert series(run, "gap") == ([1, 2], [0.1, 0.5])
    assert run.decisions == []


def test_the_end_record_stands_in_for_a_missing_summary(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "joint", epochs=2)
    (folder / "summary.json").unlink()
    assert read_run(str(folder)).finished


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match=r"is not a run: it has neither run\.json nor records\.jsonl"):
        read_run(str(tmp_path / folder))


def test_a_damaged_file_is_named(tmp_path: Path, make_run: Make) -> None:
    folder = make_run(tmp_path, "joint", epochs=2)
    (folder / "summary.json").write_text('{"run": ')
    with pytest.raises(DataError, match=r"summary\.json is damaged"):
        read_run(str(folder))


def test_the_settings_digest_ignores_seed_and_name() -> None:
    def digest(text: str) -> str:
        return RunData("a", experiment=text).settings_digest

    assert digest("{seed: 1, name: a, lr: 0.1}") == digest("{seed: 2, lr: 0.1}")
    assert digest("{seed: 1, lr: 0.1}") != digest("{seed: 1, lr: 0.2}")


def test_classifier_steps_begin_before_the_first_decision() -> None:
    run = RunData("a")
    run.epochs = [{"epoch": e, "classifiers": {"audio": n}} for e, n in [(1, 1), (2, 2), (3, 2)]]
    run.decisions = [{"epoch": 1, "classifiers": {"audio": 2}}]
    assert classifier_steps(run, "audio") == ([1, 1, 2, 3], [1, 2, 2, 2])
    assert classifier_steps(run, "visual") == ([], [])


def test_the_threshold_of_a_decision() -> None:
    assert reason({"inputs": {"sigma": 1.0, "tau": 0.01}}).low == pytest.approx(0.99)
    assert reason({"inputs": {"threshold_low": 0.8, "sigma": 1.0}}).low == 0.8
    assert reason({"inputs": {"ratios": {"a": 1}, "why": "x"}}).rest == {"why": "x"}
    assert reason({}).low is None
