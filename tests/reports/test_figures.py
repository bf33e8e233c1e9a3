from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from counterpoise.reports.curves import Picture, png, svg
from counterpoise.reports.figures import Plane, classifiers, lines_of, mean_and_std, missing, planes, sensitivity
from counterpoise.reports.records import RunData
from counterpoise.reports.spec import ClassifiersSpec, MissingSpec, SensitivitySpec

KEYS = ("method.sigma", "method.tau")


def run(fused: float, method: str = "{name: aug}", seed: int = 0, **result: Any) -> RunData:
    accuracy = {"fused": fused, "audio": 0.5, "visual": 0.4}
    summary = {
        "method": "aug",
        "modalities": ["audio", "visual"],
        "seed": seed,
        "test": {"accuracy": accuracy, **result},
    }
    return RunData("r", summary=summary, experiment=f"{{method: {method}, epochs: 5}}")


def aug(fused: float, sigma: float | str, tau: float | str, seed: int = 0) -> RunData:
    return run(fused, f"{{name: aug, sigma: {sigma}, tau: {tau}}}", seed)


def drawn(picture: Picture | None) -> str:
    assert picture is not None and png(picture).startswith(b"\x89PNG")
    text = svg(picture.panels, "x", picture.across)
    ET.fromstring(text)
    return text


def test_mean_and_deviation() -> None:
    assert mean_and_std([0.5, 0.7]) == (pytest.approx(0.6), pytest.approx(0.141421, abs=1e-6))
    assert mean_and_std([0.5]) == (0.5, 0.0)


def test_one_setting_at_a_time_is_a_line_per_setting() -> None:
    runs = [aug(0.6, 1.0, 0.01), aug(0.5, 0.8, 0.01), aug(0.7, 1.0, 0.1), aug(0.8, 0.8, 0.01, seed=1)]
    sigma, tau = (lines_of(runs, key, KEYS) for key in KEYS)
    assert {k: {x: len(r) for x, r in line.items()} for k, line in sigma.items()} == {"aug, tau 0.01": {0.8: 2, 1.0: 1}}
    assert {k: list(line) for k, line in tau.items()} == {"aug, sigma 1.0": [0.01, 0.1]}


def test_a_grid_has_a_line_for_every_other_value() -> None:
    runs = [aug(0.6, sigma, tau) for sigma in (0.8, 1.0) for tau in (0.0, 0.1)]
    assert list(lines_of(runs, "method.sigma", KEYS)) == ["aug, tau 0.0", "aug, tau 0.1"]


def test_values_that_are_no_numbers_make_no_line() -> None:
    assert lines_of([aug(0.6, "null", 0.1), aug(0.6, "true", 0.1), aug(0.6, 1.0, 0.1)], "method.sigma", KEYS) == {}


def test_the_picture_of_sensitivity_has_a_panel_per_setting() -> None:
    groups = {str(i): [r] for i, r in enumerate([aug(0.6, 1.0, 0.01), aug(0.5, 0.8, 0.01), aug(0.7, 1.0, 0.4)])}
    picture = sensitivity(groups, SensitivitySpec(kind="sensitivity", keys=KEYS))
    assert picture and [panel.title for panel in picture.panels] == ["sigma", "tau"]
    text = drawn(picture)
    assert all(f">{word}</text>" in text for word in ("Multi", "Audio", "Visual", "0.8", "0.4"))
    assert sensitivity({"a": [aug(0.6, 1.0, 0.01)]}, SensitivitySpec(kind="sensitivity", keys=KEYS)) is None


def test_classifiers_are_bars_with_their_number() -> None:
    parts = {"audio/first": 0.5, "visual/first": 0.2, "visual/previous": 0.35}
    group = [run(0.7, accuracy_of_part=parts) for _ in range(2)]
    for i, one in enumerate(group):
        assert one.summary is not None
        one.summary["classifiers"] = {"audio": 1, "visual": 4 + i}
    text = drawn(
        classifiers({"aug": group, "joint": [run(0.5)]}, ClassifiersSpec(kind="classifiers", rows={"aug": "AUG"}))
    )
    assert all(
        f">{word}</text>" in text for word in ("Audio (1 classifier)", "Visual (4-5 classifiers)", "AUG", "0.350")
    )
    assert text.count(">first</text>") == 2 and text.count(">all</text>") == 1, "one classifier is the first and all"
    assert classifiers({"joint": [run(0.5)]}, ClassifiersSpec(kind="classifiers")) is None


def test_features_on_the_plane_are_a_panel_per_label_and_modality() -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    found = [Plane(label, name, points, np.arange(30) % 3) for label in ("joint", "aug") for name in ("audio", "rgb")]
    picture = planes(found, ["x", "y", "$z"])
    assert picture and picture.across == 2 and "30 samples" in picture.caption
    assert [panel.title for panel in picture.panels] == ["joint: Audio", "joint: RGB", "aug: Audio", "aug: RGB"]
    assert ">$z</text>" in drawn(picture)
    assert planes([], []) is None


def test_missing_modalities_are_bars_of_what_was_evaluated() -> None:
    lacking = {"missing_rates": {"0.2": {"accuracy": 0.5}}, "missing": {"audio": {"accuracy": 0.2}}}
    text = drawn(missing({"aug": [run(0.7, **lacking)], "mla": [run(0.6)]}, MissingSpec(kind="missing", rates=(0.2,))))
    assert all(f">{word}</text>" in text for word in ("complete", "20% lack one", "no Audio", "aug", "mla"))
    assert ">no Visual</text>" not in text
    assert missing({"aug": [run(0.7)]}, MissingSpec(kind="missing")) is None
