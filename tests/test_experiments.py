"""Every sweep that comes with the package: its trials can be made, and its report says what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterpoise.data.recipes import recipes
from counterpoise.engine.comm import SingleComm
from counterpoise.methods import METHODS
from counterpoise.methods.base import Setting
from counterpoise.reports.published import chosen_tables
from counterpoise.reports.spec import SensitivitySpec, parse_spec
from counterpoise.sweepfile import Asked, Trial, ask, plan

EXPERIMENTS = Path(__file__).resolve().parents[1] / "trainables" / "experiments"
SWEEPS = sorted(EXPERIMENTS.glob("*/*.yaml"))
NAMES = [f"table{i}" for i in range(1, 7)] + [f"figure{i}" for i in (1, 3, 4, 5)] + ["missing"]


def trials(path: Path) -> tuple[Asked, list[Trial]]:
    asked = ask(str(path), None, [], None, None)
    return asked, plan(asked.sweep)


def test_every_table_and_figure_of_the_paper_is_there() -> None:
    assert sorted(path.stem for path in SWEEPS if path.parent.name == "paper") == sorted(NAMES)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_can_be_made_on_av_digits(path: Path) -> None:
    asked, found = trials(path)
    digests = set()
    for trial in found:
        experiment, _ = asked.resolved(trial.vary, trial.seed)
        assert experiment.corpus == "av_digits"
        method = METHODS[experiment.method_name]
        setting = Setting(("audio", "visual"), 10, experiment.epochs, experiment.seed)
        method(experiment.method, setting, SingleComm()).head({"audio": 8, "visual": 8})
        digests.add(experiment.digest)
    assert len(digests) == len(found), "two trials are the same run"
    parse_spec(asked.sweep.report, [trial.label for trial in found] if asked.sweep.search.name == "grid" else None)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_published_rows_that_a_sweep_names_are_rows_of_it(path: Path) -> None:
    asked, found = trials(path)
    spec = parse_spec(asked.sweep.report)
    labels = {trial.label for trial in found}
    for name in spec.published or ():
        if name != "aug-main":  # of methods on all corpora, not of one table
            rows = {row for block in chosen_tables([name])[name].corpora.values() for row in block.rows}
            assert rows <= labels, name


@pytest.mark.parametrize("path", [p for p in SWEEPS if p.parent.name == "paper"], ids=lambda path: path.stem)
def test_no_sweep_of_the_paper_is_bound_to_the_names_of_one_corpus(path: Path) -> None:
    for recipe in recipes():
        modalities = tuple(recipe.card.modalities)
        weak = None if recipe.card.weak else modalities[-1]
        asked = ask(str(path), recipe.name, [], None, None, weak)
        assert "{weak}" not in str(asked.to_json())
        for trial in plan(asked.sweep):
            experiment, _ = asked.resolved(trial.vary, trial.seed)
            named = set(getattr(experiment.method, "classifiers", {}))
            assert experiment.corpus == recipe.name and named <= {weak or recipe.card.weak}, trial.label


def test_every_setting_of_the_sensitivity_is_varied_alone() -> None:
    asked, found = trials(EXPERIMENTS / "paper" / "figure3.yaml")
    spec = parse_spec(asked.sweep.report)
    assert isinstance(spec, SensitivitySpec)
    settings = {trial.label: asked.resolved(trial.vary, 0)[0].method.model_dump() for trial in found}
    base = settings[str(spec.baseline)]
    for key in spec.keys:
        field = key.removeprefix("method.")
        alone = {v[field] for v in settings.values() if {**v, field: None} == {**base, field: None}}
        assert len(alone) == 5
    assert all(sum(v[k] != base[k] for k in base) <= 1 for v in settings.values())
