"""The table of a comparison: recomputed from raw predictions, and under the hypothesis that nothing differs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypotheses
from hypothesis import strategies as st
from scipy.stats import binom
from tests.conftest import Done, settings
from tests.trust.faults import count, keep

from counterpoise.engine.metrics import classification_metrics
from counterpoise.reports import significance
from counterpoise.reports.records import read_run
from counterpoise.reports.significance import against, against_picked, sign_flip_p
from counterpoise.reports.tables import best_label, compared, csv_table, text_table

SIMULATIONS = count(100, 1000)
LEVEL = 0.05


@pytest.fixture(scope="module")
def runs(corpus: str, run_experiment: Callable[..., Done]) -> dict[str, list[Done]]:
    def one(name: str, seed: int) -> Done:
        return run_experiment(settings(corpus, epochs=1, method=name, seed=seed), name=f"stat-{name}-{seed}")

    return {name: [one(name, seed) for seed in range(3)] for name in ("joint", "late")}


def test_every_number_of_a_table_follows_from_the_raw_predictions(runs: dict[str, list[Done]]) -> None:
    table = compared({name: [read_run(d.folder.uri) for d in done] for name, done in runs.items()}, "joint")
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(csv_table(table)))}
    found: dict[str, dict[str, list[float]]] = {}
    for name, done in runs.items():
        found[name] = {column: [] for column in ("fused", "strong", "weak")}
        for one in done:
            columns = one.folder.read_predictions()
            for column, values in found[name].items():
                values.append(float((columns[f"logits_{column}"].argmax(axis=1) == columns["label"]).mean()))
    for name, numbers in found.items():
        for column, values in numbers.items():
            assert float(rows[name][column]) == pytest.approx(statistics.fmean(values), abs=1e-12), (name, column)
            assert float(rows[name][f"{column}_std"]) == pytest.approx(statistics.stdev(values), abs=1e-12)
        gaps = [abs(s - w) for s, w in zip(numbers["strong"], numbers["weak"], strict=True)]
        assert float(rows[name]["gap"]) == pytest.approx(statistics.fmean(gaps), abs=1e-12)
    differences = np.array(found["late"]["fused"]) - np.array(found["joint"]["fused"])
    assert float(rows["late"]["difference"]) == pytest.approx(differences.mean(), abs=1e-12)
    signs = np.array(np.meshgrid(*[(1, -1)] * 3)).reshape(3, -1)
    p = (np.abs(differences @ signs).round(10) >= round(abs(differences.sum()), 10)).mean()
    assert float(rows["late"]["p_reference"]) == pytest.approx(float(p))
    keep("25 statistics", "recomputed", {"numbers": 2 * len(found) * 3}, True)


def test_labels_that_are_shuffled_leave_nothing_but_chance(runs: dict[str, list[Done]]) -> None:
    """No number of a table is right because of anything but the labels."""
    columns = runs["joint"][0].folder.read_predictions()
    rng = np.random.default_rng(0)
    logits, labels = columns["logits_fused"], columns["label"]
    real = classification_metrics(logits, labels)["accuracy"]
    shuffled = [classification_metrics(logits, rng.permutation(labels))["accuracy"] for _ in range(200)]
    assert abs(statistics.fmean(shuffled) - 0.25) < 0.02 < real - 0.25
    assert max(shuffled) < real


def test_a_method_under_two_names_is_never_better_than_itself(runs: dict[str, list[Done]]) -> None:
    own = [read_run(d.folder.uri) for d in runs["joint"]]
    table = compared({"joint": own, "again": own, "and again": own}, "joint")
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(csv_table(table)))}
    assert [rows[name]["p_reference"] for name in ("again", "and again")] == ["1.0", "1.0"]
    assert {row["p_best"] for row in rows.values()} <= {"", "1.0"}
    assert {float(rows[name]["difference"]) for name in ("again", "and again")} == {0.0}


def null(rng: np.random.Generator, methods: int, seeds: int) -> dict[str, dict[int, float]]:
    """Accuracies on 300 samples of methods that do not differ."""
    return {
        f"m{i}": {s: round(float(a), 3) for s, a in enumerate(rng.binomial(300, rng.normal(0.7, 0.02, seeds)) / 300)}
        for i in range(methods)
    }


def falsely(test: Callable[[dict[str, dict[int, float]]], float], methods: int = 5, seeds: int = 9) -> int:
    """In how many simulations a family has a p below the level."""
    rng = np.random.default_rng(25)
    return sum(test(null(rng, methods, seeds)) < LEVEL for _ in range(SIMULATIONS))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact test by one product: scipy takes milliseconds for each. That both agree is tested below."""
    signs = {n: np.array(np.meshgrid(*[(1.0, -1.0)] * n)).reshape(n, -1) for n in (5, 9)}

    def p(differences: list[float]) -> float:
        d = np.asarray(differences)
        return float((np.abs(d @ signs[len(d)]).round(10) >= round(abs(float(d.sum())), 10)).mean())

    rng = np.random.default_rng(1)
    for n in signs:
        d = rng.normal(0.2, 1, n).round(2).tolist()
        assert p(d) == pytest.approx(sign_flip_p(d))
    monkeypatch.setattr(significance, "sign_flip_p", p)


def most() -> int:
    """What chance allows of a rate of 5 %, but for once in a thousand."""
    return int(binom.ppf(0.999, SIMULATIONS, LEVEL))


def test_equal_methods_are_told_apart_in_no_more_than_one_of_twenty_tables(
    quickly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Family-wise: any p of a table counts."""

    def to_reference(scores: dict[str, dict[int, float]]) -> float:
        return min(pair.p_holm or 1.0 for pair in against("m0", scores).values())

    def to_best(scores: dict[str, dict[int, float]]) -> float:
        best = best_label(scores)
        assert best is not None
        return min(pair.p_holm or 1.0 for pair in against_picked(best, scores).values())

    for name, test in (("reference", to_reference), ("best", to_best)):
        found = falsely(test)
        keep("25 statistics", f"p vs {name}", {"simulations": SIMULATIONS, "false": found}, found <= most())
        assert found <= most(), name
    monkeypatch.setattr(significance, "holm", list)
    control = falsely(to_reference)
    keep("25 statistics", "control: no correction", {"false": control}, control <= most(), control=True)
    assert control > most(), "the control: without Holm's correction there are too many"


def test_a_reference_that_was_picked_is_corrected_for_all_pairs() -> None:
    six = range(6)
    up = {s: 0.9 + 0.001 * s for s in six}
    scores = {"a": dict.fromkeys(six, 0.5), "b": dict.fromkeys(six, 0.6), "c": up}
    assert {name: pair.p_holm for name, pair in against("c", scores).items()} == {"a": 0.0625, "b": 0.0625}
    assert {n: p.p_holm for n, p in against_picked("c", scores).items()} == {"a": 0.09375, "b": 0.09375}
    two = {name: scores[name] for name in "ac"}
    assert against_picked("c", two)["a"].p_holm == against("c", two)["a"].p_holm == 0.03125
    assert against_picked("c", {**two, "d": {}})["d"].p is None


@hypotheses(max_examples=count(100, 1000), deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 4)), min_size=5, max_size=5))
def test_five_seeds_are_never_significant(differences: list[float]) -> None:
    assert sign_flip_p(differences) >= 0.0625


def test_the_printed_table_of_five_seeds_says_why_nothing_is_significant(runs: dict[str, list[Done]]) -> None:
    from dataclasses import replace

    base = read_run(runs["joint"][0].folder.uri)
    assert base.summary is not None

    def made(name: str, seed: int, accuracy: float) -> object:
        test = base.summary["test"] | {"accuracy": {"fused": accuracy, "strong": 0.5, "weak": 0.4}}  # type: ignore[index]
        return replace(base, uri=f"{name}-{seed}", summary={**base.summary, "test": test, "seed": seed, "method": name})  # type: ignore[dict-item]

    groups = {name: [made(name, s, a + 0.01 * s) for s in range(5)] for name, a in (("joint", 0.1), ("late", 0.9))}
    table = compared(groups, "joint")  # type: ignore[arg-type]
    (row,) = [r for r in csv.DictReader(io.StringIO(csv_table(table))) if r["method"] == "late"]
    assert float(row["p_reference"]) == 1.0 / 16 > LEVEL
    assert "5 seeds cannot reach p < 0.05" in text_table(table)
