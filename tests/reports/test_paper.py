from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from counterpoise.reports.paper import (
    csv_form,
    grouped,
    labelled,
    latex_form,
    latex_safe,
    leaderboard,
    markdown_form,
    paper_table,
    text_form,
)
from counterpoise.reports.records import RunData
from counterpoise.reports.spec import parse_spec

CLASSES = {"cremad": 6, "kinetics_sounds": 31, "digits": 10}


def run(
    method: str, seed: int, fused: float, audio: float, visual: float, corpus: str = "cremad", **more: Any
) -> RunData:
    accuracy = {"fused": fused, "audio": audio, "visual": visual}
    test = {"accuracy": accuracy, "macro_f1": {k: v - 0.1 for k, v in accuracy.items()}, "gap": abs(audio - visual)}
    summary = {
        "run": f"{corpus}-{method}-{seed}",
        "method": method,
        "corpus": corpus,
        "seed": seed,
        "test": test | more,
    }
    summary |= {"modalities": ["audio", "visual"], "selected_epoch": 3, "selection": "valid accuracy (fused)"}
    start = {"corpus": corpus, "classes": [f"c{i}" for i in range(CLASSES[corpus])], "samples": {"test": 744}}
    return RunData(f"runs/{summary['run']}", start=start, summary=summary, experiment=f"{{method: {{name: {method}}}}}")


def runs(corpus: str = "cremad", seeds: int = 2) -> dict[str, list[RunData]]:
    rows = {"joint": (0.6, 0.55, 0.3), "mla": (0.65, 0.5, 0.4), "aug": (0.7, 0.55, 0.5)}
    return {m: [run(m, s, f + 0.02 * s * (m == "aug"), a, v, corpus) for s in range(seeds)]
            for m, (f, a, v) in rows.items()}  # fmt: skip


def test_the_table_of_the_paper_with_its_numbers_beside_ours() -> None:
    text = text_form(paper_table({"cremad": runs()}, parse_spec({"rows": {"aug": "AUG"}})))
    assert text.splitlines()[0].split() == ["method", "Multi", "Audio", "Visual", "n", "vs", "joint", "p"]
    lines = text.splitlines()
    assert lines[2].split()[:6] == ["joint", "0.600", "±", "0.000", "[0.6507", "b]"]
    assert lines[4].split()[:8] == ["AUG", "0.710", "±", "0.014", "[0.8441", "a,", "0.8515", "b]"]
    assert "a Jiang, Huang, Yang, first version of February 2025 (arXiv 2502.20120v1), Table 1; b Jiang" in text
    assert "ours were selected on valid" in text


def test_nothing_is_published_on_a_corpus_of_ones_own() -> None:
    paper = paper_table({"digits": runs("digits")}, parse_spec(None))
    assert not paper.printed and "[" not in text_form(paper) and "as printed" not in " ".join(paper.notes)


def test_published_numbers_can_be_left_out() -> None:
    assert not paper_table({"cremad": runs()}, parse_spec({"published": []})).printed


def test_best_and_second_of_each_column() -> None:
    paper = paper_table({"digits": runs("digits")}, parse_spec(None))
    marks = {
        label: ["best" if cell.best else "second" if cell.second else "" for cell in cells]
        for label in paper.labels
        if (cells := [paper.shown(label, column) for column in paper.columns[:3]])
    }
    assert marks == {"joint": ["", "best", ""], "mla": ["second", "second", "second"], "aug": ["best"] * 3}


def test_significance_is_by_seed_and_corrected() -> None:
    own = {"joint": [run("joint", s, 0.6, 0.5, 0.3, "digits") for s in range(6)]}
    own |= {"aug": [run("aug", s, 0.7, 0.5, 0.3, "digits") for s in range(6)]}
    own |= {"mla": [run("mla", 0, 0.9, 0.5, 0.3, "digits")]}
    cells = {row.label: row.cells for row in paper_table({"digits": own}, parse_spec(None)).table.rows}
    assert str(cells["aug"]["p_reference"]) == "0.0312" and str(cells["aug"]["difference"]) == "+0.100"
    assert str(cells["mla"]["p_reference"]) == "-", (
        "one seed in common tests nothing, and is no comparison to correct for"
    )


def test_the_baseline_is_joint_the_first_or_as_asked() -> None:
    def heading(**spec: Any) -> list[str]:
        own = {label: group for label, group in runs("digits").items() if spec or label != "joint"}
        return [c.heading for c in paper_table({"digits": own}, parse_spec(spec)).columns if c.heading.startswith("vs")]

    assert heading(baseline="aug") == ["vs aug"] and heading(rows={"joint": "Naive"}) == ["vs Naive"]
    assert heading() == ["vs mla"]


def test_metrics_are_groups_of_columns() -> None:
    paper = paper_table({"digits": runs("digits")}, parse_spec({"metrics": ["accuracy", "macro_f1"]}))
    assert paper.groups() == [("accuracy", 3), ("macro-F1", 3), ("", 3)]
    assert paper.shown("aug", paper.columns[3]).text == "0.610 ± 0.014"
    alone = paper_table(
        {"digits": runs("digits")}, parse_spec({"metrics": ["accuracy", "macro_f1"], "modalities": False})
    )
    assert [c.heading for c in alone.columns[:2]] == ["accuracy", "macro-F1"] and alone.groups() == []


def test_corpora_stand_beside_one_another() -> None:
    own = {"cremad": runs(), "digits": {"aug": runs("digits")["aug"]}}
    paper = paper_table(own, parse_spec(None))
    assert paper.groups() == [("cremad", 6), ("digits", 4)]
    digits = [column for column in paper.columns if column.corpus == "digits"]
    assert paper.shown("joint", digits[0]).text == "-" and paper.shown("aug", digits[0]).text == "0.710 ± 0.014"
    latex = latex_form(paper)
    assert r"\multicolumn{6}{c}{cremad} & \multicolumn{4}{c}{digits}" in latex and r"\cmidrule(lr){8-11}" in latex


def test_latex_is_well_formed_and_names_the_runs() -> None:
    own = {"a_b & 50 %": runs("digits")["joint"], "aug": runs("digits")["aug"]}
    latex = latex_form(paper_table({"digits": own}, parse_spec({"caption": "100 % {of} $x_1$ ~ \\ ^ #"})))
    body = latex[latex.index(r"\midrule") : latex.index(r"\bottomrule")].splitlines()[1:]
    rows = [re.split(r" \\\\ % ", line) for line in body]
    assert [len(re.split(r"(?<!\\)&", row)) for row, _ in rows] == [7, 7]
    assert rows[0][0].startswith(r"a\_b \& 50 \% & 0.600 $\pm$ 0.000 & \textbf{0.550 $\pm$ 0.000} &")
    assert [names for _, names in rows] == ["digits-joint-0 digits-joint-1", "digits-aug-0 digits-aug-1"]
    assert r"\textbf{0.710 $\pm$ 0.014}" in latex and r"\begin{tabular}{lrrrrrr}" in latex
    bare = re.sub(r"\\[{}\\]", "", latex)
    assert bare.count("{") == bare.count("}") and latex.count(r"\begin") == latex.count(r"\end")
    assert latex_safe("100 % {of} $x_1$ ~ \\ ^ #") == (
        r"100 \% \{of\} \$x\_1\$ \textasciitilde{} \textbackslash{} \textasciicircum{} \#"
    )


def test_markdown_marks_and_names_the_runs() -> None:
    lines = markdown_form(paper_table({"cremad": runs()}, parse_spec(None))).splitlines()
    assert lines[0] == "**Accuracy on cremad**"
    assert lines[2] == "| method | Multi | Audio | Visual | n | vs joint | p | runs |"
    assert "| <u>0.650 ± 0.000</u> [0.7943 <sup>a</sup>] |" in lines[5] and lines[5].endswith(
        "| cremad-mla-0, cremad-mla-1 |"
    )
    assert "| **0.710 ± 0.014** [0.8441 <sup>a</sup>, 0.8515 <sup>b</sup>] |" in lines[6]


def test_csv_is_complete() -> None:
    own = {"cremad": runs(), "digits": {"aug": runs("digits")["aug"]}}
    rows = list(csv.DictReader(io.StringIO(csv_form(paper_table(own, parse_spec(None))))))
    assert [(row["corpus"], row["method"], row["n"]) for row in rows] == [
        ("cremad", "joint", "2"), ("cremad", "mla", "2"), ("cremad", "aug", "2"), ("digits", "aug", "2"),
    ]  # fmt: skip
    aug = rows[2]
    assert float(aug["fused"]) == pytest.approx(0.71) and float(aug["visual"]) == 0.5 and float(aug["gap"]) > 0.04
    assert (aug["published_accuracy_fused"], aug["published_accuracy_fused_2"]) == ("0.8441", "0.8515")
    assert aug["published_accuracy_fused_source"].endswith("Table 1") and aug["runs"] == "cremad-aug-0 cremad-aug-1"
    assert rows[3]["published_accuracy_fused"] == ""


def test_missing_modalities_are_columns() -> None:
    lacking = {
        "missing_rates": {"0.2": {"accuracy": 0.5}, "0.5": {"accuracy": 0.4}},
        "missing": {"audio": {"accuracy": 0.2}},
    }
    own = {"joint": [run("joint", 0, 0.6, 0.5, 0.3, **lacking)], "mla": [run("mla", 0, 0.7, 0.5, 0.3)]}
    spec = parse_spec({"kind": "missing", "published": ["aug-missing-20", "aug-missing-50"]})
    paper = paper_table({"cremad": own}, spec)
    shown = {(c.group, c.heading): paper.shown("joint", c).plain for c in paper.columns}
    assert shown["one missing in", "20%"] == "0.500 [0.5849 a]" and shown["one missing in", "50%"] == "0.400 [0.5242 a]"
    assert shown["without", "Audio"] == "0.200" and shown["without", "Visual"] == "-"


def test_the_leaderboard_is_by_accuracy_and_ends_with_who_has_none() -> None:
    lost = RunData("runs/late-0", manifest={"run": "late-0"}, status={"state": "failed"})
    own = {"late": [lost], **runs("digits")}
    table = leaderboard([paper_table({"digits": own}, parse_spec({"rows": {"aug": "AUG"}}))])
    assert [row.label for row in table.rows] == ["AUG", "mla", "joint", "late"]
    assert list(table.columns)[:4] == ["fused", "accuracy/audio", "accuracy/visual", "gap"]


def test_runs_are_grouped_by_corpus_and_label() -> None:
    loose = [*runs()["aug"], *runs("digits")["aug"], *runs("digits")["joint"]]
    groups = grouped(loose)
    assert {c: {k: len(g) for k, g in own.items()} for c, own in groups.items()} == {
        "cremad": {"aug": 2}, "digits": {"aug": 2, "joint": 2},
    }  # fmt: skip
    assert list(labelled(groups)) == ["cremad aug", "digits aug", "digits joint"]
    assert list(labelled({"cremad": groups["cremad"]})) == ["aug"]
