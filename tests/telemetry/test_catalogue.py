"""The table of metrics: names and labels as Prometheus wants them."""

from __future__ import annotations

import re

import pytest

from counterpoise.telemetry.catalogue import BY_NAME, LIMITS, METRICS, PREFIX, RUN, Metric


def test_no_name_is_there_twice() -> None:
    assert len(BY_NAME) == len(METRICS)


def test_every_limit_is_of_a_label_that_exists() -> None:
    assert set(LIMITS) - {"run"} <= {label for metric in METRICS for label in metric.labels}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_says_its_kind_and_unit(metric: Metric) -> None:
    assert re.fullmatch(PREFIX + r"[a-z][a-z_]*[a-z]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_created")), "kept for histograms"
    stem = metric.name.removesuffix("_total")
    assert stem.endswith("_seconds") == (metric.unit in ("s", "dateTimeAsIso"))
    assert stem.endswith("_timestamp_seconds") == (metric.unit == "dateTimeAsIso")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_labels_are_few_and_bounded(metric: Metric) -> None:
    fixed = {"state", "split", "bound"}  # their values are constants of the table
    described_once = set(BY_NAME[PREFIX + "run_info"].labels)  # one series per run, whatever they say
    for label in metric.labels:
        assert label in LIMITS or label in fixed or (metric.kind == "info" and label in described_once) or (
            label == "label"
        ), label  # fmt: skip
    assert not set(metric.labels) & {*RUN, "job", "instance", "le", "quantile"}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_help_is_a_sentence(metric: Metric) -> None:
    assert metric.help[0].isalnum() and metric.help.endswith(".") and "\n" not in metric.help
