"""What can be known about dashboards and rules without Grafana: schema, layout, expressions, and promtool's verdict."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from counterpoise import storage
from counterpoise.contracts import ResourceError
from counterpoise.dashboards import files
from counterpoise.dashboards.promql import RECORDED, faults, fill, panels_of, uses, usual_values

PANELS = {"row", "timeseries", "stat", "bargauge", "table"}
OWN = {"datasource", "corpus", "method", "run", "modality", "sweep", "split"}
PROMTOOL_S = 120


def check(folder: str | None = None) -> list[str]:
    """Everything that is wrong with the files of `dashboards/` (or of another folder), in words; [] if nothing is."""
    place = folder or str(files.root())
    found = []
    for name, text in files.generated().items():
        path = storage.join(place, name)
        if not storage.exists(path):
            found.append(f"{name} is missing; run `counterpoise dashboards build`")
        elif storage.read_text(path) != text:
            found.append(f"{name} is not what the generator writes; run `counterpoise dashboards build`")
        elif name.endswith(".json"):
            found += dashboard_faults(json.loads(text))
    return found + rule_faults(place)


def dashboard_faults(dashboard: Mapping[str, Any]) -> list[str]:
    title = dashboard.get("title", "?")
    found = [f"{title}: {fault}" for fault in (*_schema(dashboard), *_layout(dashboard), *_words(dashboard))]
    values = {variable["name"]: "x" for variable in dashboard["templating"]["list"]} | usual_values()
    for use in uses(dashboard):
        found += [f"{use.where}: {fault}" for fault in faults(fill(use.expr, values))]
    return found


# --- schema: what the SDK's models would not give back is not in Grafana's schema


def _schema(dashboard: Mapping[str, Any]) -> Iterator[str]:
    try:
        from counterpoise.dashboards.sdk import JSONEncoder, models, register_default_plugins
    except ImportError:
        raise ResourceError("checking dashboards needs the extra `monitor`; uv sync --extra monitor") from None
    register_default_plugins()
    given = copy.deepcopy(dict(dashboard))
    try:
        read = models.Dashboard.from_json(copy.deepcopy(given))
        back = json.loads(JSONEncoder().encode(read))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"not a dashboard: {type(error).__name__}: {error}"
        return
    for shown in (*back.get("links", []), *back.get("annotations", {}).get("list", [])):
        shown.pop("placement", None)  # as in panels.to_json
    yield from _differences(given, back, "")
    yield from _wrong_types(read, "")


def _differences(given: Any, back: Any, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(back, dict):
        for key in sorted(given.keys() | back.keys()):
            if key not in back:
                yield f"{path}/{key} is not in Grafana's schema"
            elif key not in given:
                yield f"{path}/{key} is missing"
            else:
                yield from _differences(given[key], back[key], f"{path}/{key}")
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for i, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from _differences(one, other, f"{path}/{i}")
    elif given != back:
        yield f"{path} is {given!r}, read back as {back!r}"


def _wrong_types(value: Any, path: str) -> Iterator[str]:
    """Values that the models' annotations forbid; the models themselves take anything."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _wrong_types(item, f"{path}/{i}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _wrong_types(item, f"{path}/{key}")
    elif type(value).__module__.startswith("grafana_foundation_sdk") and not isinstance(value, Enum):
        hints = typing.get_type_hints(type(value))
        for key, item in vars(value).items():
            if key in hints and not _fits(item, hints[key]):
                yield f"{path}/{key} is {item!r}, which its type does not allow"
            yield from _wrong_types(item, f"{path}/{key}")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        allowed = (int, float) if hint is float else int
        return isinstance(value, allowed) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return value in list(hint) or value in [one.value for one in hint]
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


# --- layout and words


def _layout(dashboard: Mapping[str, Any]) -> Iterator[str]:
    panels = list(panels_of(dashboard))
    numbers = [panel["id"] for panel in panels]
    if len(set(numbers)) != len(numbers):
        yield "two panels have the same id"
    for together in (dashboard["panels"], *(panel["panels"] for panel in panels if panel.get("panels"))):
        yield from _places(together)


def _places(panels: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Of panels that are seen together; those of a closed row are seen without what is below it."""
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        if x < 0 or w < 1 or x + w > 24:
            yield f"panel {panel['title']!r} reaches beyond the 24 columns"
        for cell in ((i, j) for i in range(x, x + w) for j in range(y, y + h)):
            if cell in taken:
                yield f"panel {panel['title']!r} overlaps {taken[cell]!r}"
                break
            taken[cell] = panel["title"]


def _words(dashboard: Mapping[str, Any]) -> Iterator[str]:
    from counterpoise.dashboards.sdk import units

    known = {value for key, value in vars(units).items() if key[0].isupper() and isinstance(value, str)}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    if wrong := variables - OWN:
        yield f"unknown variables {sorted(wrong)}"
    for panel in panels_of(dashboard):
        name = f"panel {panel['title']!r}"
        if panel["type"] not in PANELS:
            yield f"{name}: type {panel['type']!r}; the preview draws {', '.join(sorted(PANELS))}"
        if panel["type"] == "row":
            continue
        if not re.search(r"\b(Bad|Good|Red|red|fault)\b", panel.get("description", "")):
            yield f"{name}: the description does not say what bad looks like"
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if unit is None and panel["type"] != "table":
            yield f"{name}: no unit"
        elif unit is not None and unit not in known:
            yield f"{name}: Grafana has no unit {unit!r}"
        repeated = panel.get("repeat")
        if repeated is not None and repeated not in variables:
            yield f"{name}: repeated by {repeated!r}, which is no variable"


# --- Prometheus' side


def rule_faults(place: str) -> list[str]:
    """Of rules.yml: unknown metrics, and what promtool says of rules, their tests and the configuration, if it is
    installed."""
    text = storage.read_text(storage.join(place, files.RULES))
    found = []
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    for rule in rules:
        name = rule.get("alert") or rule["record"]
        found += [f"{files.RULES}: {name}: {fault}" for fault in faults(rule["expr"])]
        if "record" in rule and rule["record"] not in RECORDED:
            found.append(f"{files.RULES}: {name} is not listed in counterpoise/dashboards/promql.py")
    if not storage.is_local(place):
        return found
    folder = Path(storage.local_path(place)) / "prometheus"
    return found + [
        line
        for words in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"])
        for line in promtool(words, folder)
    ]


def promtool(words: list[str], folder: Path) -> list[str]:
    """What promtool complains about, one text per command; [] if it is content or not installed."""
    if (command := shutil.which("promtool")) is None:
        return []
    done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True, timeout=PROMTOOL_S)
    if done.returncode == 0:
        return []
    return [f"promtool {' '.join(words)}: {(done.stdout + done.stderr).strip()}"]
