"""The generated files, and what their check finds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from counterpoise.cli import app
from counterpoise.dashboards import boards, checks, files, promql

DASHBOARDS = files.dashboards()


@pytest.fixture
def board() -> dict[str, Any]:
    return copy.deepcopy(DASHBOARDS["imbalance"])


def test_the_committed_files_are_what_the_generator_writes() -> None:
    for name, text in files.generated().items():
        assert (files.root() / name).read_text(encoding="utf-8") == text, f"{name}: counterpoise dashboards build"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_nothing_is_wrong_with_a_dashboard(name: str) -> None:
    assert checks.dashboard_faults(DASHBOARDS[name]) == []


def test_metrics_of_the_rules_exist() -> None:
    rules = yaml.safe_load((files.root() / files.RULES).read_text())["groups"]
    for rule in [rule for group in rules for rule in group["rules"]]:
        assert promql.faults(rule["expr"]) == [], rule
    assert {r["record"] for g in rules for r in g["rules"] if "record" in r} == set(promql.RECORDED)


def test_colours_change_where_alerts_fire() -> None:
    rules = yaml.safe_load((files.root() / files.RULES).read_text())["groups"]
    thresholds = {r["alert"]: r["expr"] for g in rules for r in g["rules"] if "alert" in r}
    for alert, value in (
        ("CounterpoiseGapWide", boards.GAP_WIDE),
        ("CounterpoiseRunStalled", boards.STALLED_S),
        ("CounterpoiseCheckpointOld", boards.CHECKPOINT_OLD_S),
        ("CounterpoiseDataStarved", boards.DATA_WAIT_HIGH),
    ):
        assert f"> {value:g}" in thresholds[alert].replace("0.20", "0.2"), alert


def _first(board: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(panel for panel in promql.panels_of(board) if panel["type"] == kind)


def _rename_metric(board: dict[str, Any]) -> None:
    target = _first(board, "timeseries")["targets"][0]
    target["expr"] = target["expr"].replace("counterpoise_modality_accuracy", "counterpoise_modality_acuracy")


def _unknown_label(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["targets"][0]["expr"] = 'counterpoise_loss{run=~"$run",dataset="x"}'


def _unknown_group(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["targets"][0]["expr"] = "max by (worker) (counterpoise_loss)"


def _torn(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["targets"][0]["expr"] += ")"


def _unknown_variable(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["targets"][0]["expr"] = "rate(counterpoise_steps_total[$window])"


def _overlap(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["gridPos"]["x"] += 1


def _too_wide(board: dict[str, Any]) -> None:
    board["panels"][1]["gridPos"]["w"] = 25


def _unit(board: dict[str, Any]) -> None:
    _first(board, "stat")["fieldConfig"]["defaults"]["unit"] = "percents"


def _silent(board: dict[str, Any]) -> None:
    _first(board, "stat")["description"] = "A number."


def _twice(board: dict[str, Any]) -> None:
    board["panels"][2]["id"] = board["panels"][1]["id"]


def _unknown_key(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["tresholds"] = {}


def _wrong_enum(board: dict[str, Any]) -> None:
    _first(board, "timeseries")["options"]["legend"]["displayMode"] = "tabular"


def _wrong_type(board: dict[str, Any]) -> None:
    board["schemaVersion"] = "42"


def _unknown_panel(board: dict[str, Any]) -> None:
    _first(board, "stat")["type"] = "graph"


def _repeat(board: dict[str, Any]) -> None:
    _first(board, "stat")["repeat"] = "worker"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_rename_metric, "no metric is called counterpoise_modality_acuracy"),
        (_unknown_label, "counterpoise_loss has no label dataset"),
        (_unknown_group, "no series of it has the label worker"),
        (_torn, "query A: "),
        (_unknown_variable, "query A: "),
        (_overlap, "overlaps"),
        (_too_wide, "beyond the 24 columns"),
        (_unit, "Grafana has no unit 'percents'"),
        (_silent, "does not say what bad looks like"),
        (_twice, "the same id"),
        (_unknown_key, "not in Grafana's schema"),
        (_wrong_enum, "tabular"),
        (_wrong_type, "is '42', which its type does not allow"),
        (_unknown_panel, "type 'graph'"),
        (_repeat, "which is no variable"),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_a_fault_is_found(board: dict[str, Any], damage: Callable[[dict[str, Any]], None], says: str) -> None:
    damage(board)
    assert [fault for fault in checks.dashboard_faults(board) if says in fault]


def test_a_run_s_panels_survive_names_that_mean_something_to_regular_expressions() -> None:
    """Grafana escapes them only in selectors with =~, so that a variable of many values must never stand after =."""
    multi = ("corpus", "method", "modality", "sweep")
    for dashboard in DASHBOARDS.values():
        for use in promql.uses(dashboard):
            assert not any(f'="${name}"' in use.expr for name in multi), use.where
        for panel in promql.panels_of(dashboard):
            for target in panel.get("targets", []):
                assert ('run="$run"' in target["expr"]) <= (panel.get("repeat") == "run"), panel["title"]


def test_decisions_are_marked_at_their_own_time() -> None:
    for name in ("imbalance", "training"):
        (found,) = [a for a in DASHBOARDS[name]["annotations"]["list"] if "expr" in a]
        assert found["useValueForTime"] and "classifier_added_timestamp_seconds" in found["expr"]
        assert found["expr"].endswith("* 1000")  # Grafana takes the value as milliseconds


def test_a_sweep_leads_to_its_runs() -> None:
    tables = [panel for panel in promql.panels_of(DASHBOARDS["sweep"]) if panel["type"] == "table"]
    (links,) = [
        p["value"] for o in tables[0]["fieldConfig"]["overrides"] for p in o["properties"] if p["id"] == "links"
    ]
    assert links[0]["url"].startswith(f"/d/{DASHBOARDS['imbalance']['uid']}?var-run=${{__value.raw:percentencode}}")


def test_building_writes_what_differs_and_checking_finds_it(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "dashboards"
    assert runner.invoke(app, ["dashboards", "build", "-o", str(out)]).exit_code == 0
    (out / files.RULES).write_text((files.root() / files.RULES).read_text())
    (out / "prometheus" / "rules_test.yml").write_text((files.root() / "prometheus" / "rules_test.yml").read_text())
    done = runner.invoke(app, ["dashboards", "check", str(out)])
    assert done.exit_code == 0, done.output
    place = out / files.BOARDS / "sweep.json"
    content = json.loads(place.read_text())
    content["title"] = "mine"
    place.write_text(json.dumps(content))
    done = runner.invoke(app, ["dashboards", "check", str(out)])
    assert done.exit_code == 1 and "sweep.json is not what the generator writes" in done.output
    done = runner.invoke(app, ["dashboards", "build", "-o", str(out)])
    assert "sweep.json" in done.output and "imbalance.json" not in done.output
    place.unlink()
    assert "sweep.json is missing" in runner.invoke(app, ["dashboards", "check", str(out)]).output


def test_the_configuration_names_no_place_of_this_machine() -> None:
    text = files.config_text()
    assert "/root" not in text and str(Path.home()) not in text
    jobs = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    assert set(jobs) == {"counterpoise", "ray", "node", "gpu"}
    for job in jobs.values():
        for static in job.get("static_configs", []):
            assert all(target.startswith("127.0.0.1:") for target in static["targets"])
