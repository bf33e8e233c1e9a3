from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from counterpoise.config import parse_method
from counterpoise.contracts import ConfigError
from counterpoise.reports.published import Block, chosen_tables, corpus_of, differences, library, printed
from counterpoise.reports.records import RunData, read_run

Make = Callable[..., Path]
SIX = [f"c{i}" for i in range(6)]


def values(corpus: str, label: str, metric: str, column: str, *names: str) -> list[float]:
    return [one.value for one in printed(corpus, label, metric, column, chosen_tables(names or None))]


def test_numbers_of_the_papers_by_hand() -> None:
    assert values("cremad", "aug", "accuracy", "fused") == [0.8441, 0.8515]  # Table 1, and the last version
    assert values("nvgesture", "reconboost", "accuracy", "depth") == [0.7782]
    assert values("kinetics_sounds", "mla", "accuracy", "audio") == [0.5572]
    assert values("vggsound", "mmpareto", "accuracy", "visual") == [0.2485]
    assert values("twitter15", "reconboost", "macro_f1", "fused") == [0.6832]
    assert values("sarcasm", "mslr", "accuracy", "fused") == [0.8439]
    assert values("cremad", "aug", "map", "visual", "aug-v1-table4-map") == [0.7547]
    assert values("cremad", "aug:assign=fixed:classifiers.visual=12", "accuracy", "audio", "aug-v1-table5") == [0.6519]
    assert values("cremad", "aug:weights=fixed:weight=0.75", "accuracy", "visual", "aug-v1-table6") == [0.6882]
    assert values("ucf101", "opm", "macro_f1", "fused", "balance-benchmark") == [0.8379]
    assert values("cremad", "mla", "missing_50", "fused", "aug") == [0.5753]


def test_what_is_not_printed_is_not_there() -> None:
    assert values("nvgesture", "ogm", "accuracy", "fused") == []
    assert values("cremad", "ogm_ge", "accuracy", "fused") == []
    assert values("cremad", "mmpareto", "accuracy", "fused", "pmr") == []


def test_every_row_is_a_label_of_a_method() -> None:
    labels = {label for table in library().tables.values() for block in table.corpora.values() for label in block.rows}
    assert len(labels) > 15
    for label in labels:
        parse_method(label)


def test_a_row_has_a_number_for_every_column() -> None:
    with pytest.raises(ValueError, match="aug: not 2 numbers"):
        Block(columns=("fused", "audio"), rows={"aug": (0.5,)})
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        Block(columns=("fused",), rows={"aug": (84.41,)})


def test_a_corpus_is_known_by_the_end_of_its_place_and_its_classes(tmp_path: Path, make_run: Make) -> None:
    def found(place: str, classes: int) -> str | None:
        start = {"corpus": place, "classes": SIX[:classes]}
        return corpus_of([RunData("r", start=start)])

    assert found("cremad", 6) == found("s3://bucket/cremad", 6) == found("/data/cremad/corpus.yaml", 6) == "cremad"
    assert found("cremad", 4) is None
    assert found("av_digits", 6) is None and found("my_cremad", 6) is None
    assert corpus_of([]) is None and corpus_of([RunData("r")]) is None


def test_differences_to_the_papers_are_said(tmp_path: Path, make_run: Make) -> None:
    run = read_run(str(make_run(tmp_path, "aug", epochs=3)))
    selection, others = differences("cremad", [run], chosen_tables(["aug-v1-table1"]))
    assert "the best epoch on test, which is too high; ours were selected on valid" in selection
    assert others == "Our runs on cremad differ from the published ones: epochs 3 (AUG: 200)."
    assert run.summary is not None
    run.summary["selection"] = "test accuracy (fused)"
    assert not any("selected on" in note for note in differences("cremad", [run], chosen_tables(["aug-v1-table1"])))
    several = differences("cremad", [read_run(run.uri)], chosen_tables(["aug", "balance-benchmark"]))
    assert several[0].startswith("Of the published numbers of cremad, those of Jiang, Huang, Yang, NeurIPS 2025 are")


def test_an_unknown_paper_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown table or paper 'aug-v2', did you mean 'aug-v1'"):
        chosen_tables(["aug-v2"])
    assert chosen_tables([]) == {}
