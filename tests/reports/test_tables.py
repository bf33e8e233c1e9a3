from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterpoise.reports.records import RunData, read_runs
from counterpoise.reports.tables import Table, compared, comparison, csv_table, group_labels, markdown_table, text_table

Make = Callable[..., Path]


def run(method: str, seed: int, fused: float, audio: float, visual: float, extra: str = "", **more: Any) -> RunData:
    experiment = f"{{corpus: cremad, seed: {seed}, method: {{name: {method}{extra}}}}}"
    test = {"accuracy": {"fused": fused, "audio": audio, "visual": visual}, "gap": abs(audio - visual)}
    summary = {"run": f"{method}-{seed}", "method": method, "corpus": "cremad", "modalities": ["audio", "visual"]}
    summary |= {"seed": seed, "test": test, "selected_epoch": 3, "wall_s": 60.0, "samples_per_s": 100.4, **more}
    return RunData(f"runs/{method}-{seed}", experiment=experiment, summary=summary)


def test_mean_and_sample_deviation_over_seeds() -> None:
    table = comparison([run("aug", 0, 0.6, 0.5, 0.4), run("aug", 1, 0.7, 0.5, 0.4), run("aug", 2, 0.8, 0.5, 0.4)])
    cell = table.rows[0].cells["fused"]
    assert (cell.mean, cell.std) == (pytest.approx(0.7), pytest.approx(0.1))  # sqrt((0.01 + 0 + 0.01) / 2)
    assert str(cell) == "0.700 ± 0.100"
    assert table.rows[0].runs == ["aug-0", "aug-1", "aug-2"]


def test_a_single_run_has_no_deviation() -> None:
    assert str(comparison([run("aug", 0, 0.6, 0.5, 0.4)]).rows[0].cells["fused"]) == "0.600"


def test_the_best_is_the_highest_accuracy_and_the_smallest_gap() -> None:
    table = comparison([run("joint", 0, 0.6, 0.55, 0.3), run("aug", 0, 0.7, 0.55, 0.5)])
    best = [[key for key, cell in row.cells.items() if cell.best] for row in table.rows]
    assert best == [["accuracy/audio"], ["fused", "accuracy/audio", "accuracy/visual", "gap"]]


def test_one_row_alone_is_not_the_best() -> None:
    assert not any(cell.best for cell in comparison([run("aug", 0, 0.6, 0.5, 0.4)]).rows[0].cells.values())


def test_settings_tell_rows_of_one_method_apart() -> None:
    runs = [run("aug", 0, 0.6, 0.5, 0.4, ", lam: 0.5"), run("aug", 1, 0.6, 0.5, 0.4, ", lam: 0.2"),
            run("joint", 0, 0.6, 0.5, 0.4)]  # fmt: skip
    assert group_labels([[r] for r in runs]) == ["aug (lam=0.5)", "aug (lam=0.2)", "joint"]
    assert [len(row.finished) for row in comparison(runs).rows] == [1, 1, 1]


def test_unfinished_runs_are_named_and_not_averaged(tmp_path: Path, make_run: Make) -> None:
    folders = [make_run(tmp_path, "aug", seed=s, epochs=4, upto=u) for s, u in [(0, None), (1, 2)]]
    table = comparison(read_runs(map(str, folders)))
    assert len(table.rows) == 1 and table.rows[0].runs == ["cremad-aug-0"]
    assert "cremad-aug-1 is running, epoch 2 of 4, and not in the numbers." in table.notes


def test_one_modality_has_no_gap(tmp_path: Path, make_run: Make) -> None:
    folders = [make_run(tmp_path, method, epochs=3) for method in ("audio", "joint")]
    rows = comparison(read_runs(map(str, folders))).rows
    assert str(rows[0].cells["gap"]) == str(rows[0].cells["accuracy/visual"]) == "-"
    assert rows[1].cells["gap"].values


def test_a_corpus_without_test_split_shows_valid() -> None:
    one = run("aug", 0, 0, 0, 0, valid={"accuracy": {"fused": 0.5}})
    assert one.summary is not None
    del one.summary["test"]
    table = comparison([one])
    assert str(table.rows[0].cells["fused"]) == "0.500"
    assert "aug (valid)" in text_table([one])


def test_runs_name_their_group() -> None:
    runs = [run("aug", seed, 0.6, 0.5, 0.4, f", lam: 0.{seed}", group="a") for seed in (1, 2)]
    assert [len(row.finished) for row in comparison(runs).rows] == [2]


def test_text_table() -> None:
    runs = [run("joint", 0, 0.6, 0.55, 0.3), run("aug", 0, 0.7, 0.55, 0.5, classifiers={"audio": 1, "visual": 5},
            selection="valid accuracy (fused)")]  # fmt: skip
    assert text_table(runs) == (
        "method  n  fused  audio  visual    gap  classifiers        epoch   time  samples/s\n"
        "------  -  -----  -----  ------  -----  -----------------  -----  -----  ---------\n"
        "joint   1  0.600  0.550   0.300  0.250  -                      3  1m00s        100\n"
        "aug     1  0.700  0.550   0.500  0.050  audio 1, visual 5      3  1m00s        100\n"
        "\n"
        "Epoch selected by best valid accuracy (fused).\n"
        "Runs of joint: joint-0\n"
        "Runs of aug: aug-0"
    )


def test_markdown_table() -> None:
    lines = markdown_table([run("a|b", 0, 0.6, 0.5, 0.3), run("aug", 0, 0.7, 0.5, 0.4)]).splitlines()
    assert lines[0] == "| method | n | fused | audio | visual | gap | epoch | time | samples/s | runs |"
    assert lines[2].startswith("| a\\|b | 1 | 0.600 | **0.500** |") and lines[2].endswith("| a\\|b-0 |")
    assert "| **0.700** |" in lines[3]


def test_csv_table() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table([run("aug", 0, 0.6, 0.5, 0.4), run("aug", 1, 0.7, 0.5, 0.4)]))))
    assert len(rows) == 1
    assert float(rows[0]["fused"]) == pytest.approx(0.65)
    assert float(rows[0]["fused_std"]) == pytest.approx(0.0707107, abs=1e-6)
    assert (rows[0]["n"], rows[0]["runs"]) == ("2", "aug-0 aug-1")


def test_absent_and_odd_numbers_are_dashes() -> None:
    odd = run("aug", 0, 0.6, 0.5, 0.4, wall_s=None, classifiers=None)
    odd.summary = json.loads(json.dumps(odd.summary)) | {"test": {"accuracy": {"fused": None}}}
    assert "aug" in text_table([odd])


# --- methods on equal terms


def equal_terms(seeds: int = 2, **more: Any) -> Table:
    joint = [run("joint", seed, 0.6, 0.55, 0.3) for seed in range(seeds)]
    aug = [run("aug", seed, 0.7 + 0.02 * seed, 0.55, 0.5) for seed in range(seeds)]
    for method, seconds in ((joint, 2.0), (aug, 3.0)):
        for one in method:
            one.epochs = [{"epoch": i, "seconds": s} for i, s in enumerate((seconds, seconds, 90.0), 1)]
    return compared({"joint": joint, "aug:lam=0.2": aug}, "joint", **more)


def test_methods_on_equal_terms() -> None:
    assert text_table(
        equal_terms(tuned="optim.lr", chosen={"joint": "0.01", "aug:lam=0.2": "0.1"}, remarks=["Tuned."])
    ) == (
        "method       n          fused          audio         visual            gap  vs joint  p vs joint  p vs best"
        "  optim.lr  time ratio\n"
        "-----------  -  -------------  -------------  -------------  -------------  --------  ----------  ---------"
        "  --------  ----------\n"
        "joint        2  0.600 ± 0.000  0.550 ± 0.000  0.300 ± 0.000  0.250 ± 0.000         -           -     0.5000"
        "      0.01        1.00\n"
        "aug:lam=0.2  2  0.710 ± 0.014  0.550 ± 0.000  0.500 ± 0.000  0.050 ± 0.000    +0.110      0.5000          -"
        "       0.1        1.50\n"
        "\n"
        "Mean ± sample standard deviation over n seeds.\n"
        "Differences are of fused accuracy, seed by seed. p: exact two-sided sign-flip test on them, with Holm's "
        "correction for the number of comparisons (1 vs joint, 1 vs best).\n"
        "Best is aug:lam=0.2, by mean fused accuracy: picked by these same numbers, so p vs best is corrected for all "
        "pairs of methods.\n"
        "2 seeds cannot reach p < 0.05: the smallest possible p with 1 comparison is 0.5; 6 seeds could.\n"
        "Time ratio: median seconds per epoch, divided by the median of joint; from the epochs' records.\n"
        "Tuned."
    )


def test_methods_on_equal_terms_elsewhere() -> None:
    assert "| **0.710 ± 0.014** |" in markdown_table(equal_terms())
    rows = list(csv.DictReader(io.StringIO(csv_table(equal_terms(6, tuned="optim.lr", chosen={"joint": "1"})))))
    assert float(rows[1]["difference"]) == pytest.approx(0.15) and float(rows[1]["difference_std"]) > 0
    assert float(rows[1]["p_reference"]) == 0.03125 and rows[1]["p_best"] == "" and "p_best_std" not in rows[1]
    assert (rows[0]["chosen"], rows[1]["chosen"], rows[1]["time_ratio"]) == ("1", "", "1.5")


def test_enough_seeds_need_no_excuse_and_very_many_are_drawn() -> None:
    assert not any("cannot reach" in note for note in equal_terms(6).notes)
    assert any("99,999 sign flips" in note for note in equal_terms(17).notes)


def test_a_method_without_a_finished_run_keeps_its_row() -> None:
    lost = RunData("runs/late-seed0", status={"state": "failed", "error": "no\nmore"})
    joint = [run("joint", seed, 0.6, 0.55, 0.3) for seed in (0, 1)]
    table = compared({"joint": joint, "late": [lost], "aug": []}, "joint")
    assert [(row.label, len(row.finished), row.corpus) for row in table.rows] == [
        (label, n, "cremad") for label, n in (("joint", 2), ("late", 0), ("aug", 0))
    ]
    assert "late-seed0 is failed, and not in the numbers: no" in table.notes
    assert "p_reference" not in table.columns and "p vs" not in text_table(table)
    nothing = compared({"late": [lost], "aug": []}, "late")
    assert text_table(nothing).splitlines()[2].split() == ["late", "0"]


def test_epochs_that_a_method_has_beyond_the_others_are_said() -> None:
    one, two = run("joint", 0, 0.6, 0.55, 0.3), run("aug", 0, 0.6, 0.55, 0.3)
    one.epochs, two.epochs = ([{"epoch": i, "seconds": 1.0} for i in range(1, n + 1)] for n in (4, 6))
    notes = compared({"joint": [one], "aug": [two]}, "joint").notes
    assert "Epochs of a run, with those that a method tries out and takes back: aug 6, all others 4." in notes
