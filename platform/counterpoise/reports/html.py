"""A report as one HTML file: no script, nothing fetched, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import importlib.resources
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from counterpoise import storage
from counterpoise.contracts import DataError, Record
from counterpoise.reports import curves
from counterpoise.reports.records import RunData, read_runs, reason
from counterpoise.reports.tables import DASH, Table, comparison, row_label
from counterpoise.wording import duration

TEMPLATE = "template.html.j2"
MOST_PANELS = 12  # runs of a comparison that are all drawn; of more, the first of each method


def write_report(run_uris: Sequence[str], out_path: str, title: str | None = None, table: Table | None = None) -> str:
    """Write the report of these runs to `out_path` (local or object storage); the path again."""
    if not run_uris:
        raise DataError("no runs to report on; give one or more run folders")
    runs = read_runs(run_uris) if table is None else [r for row in table.rows for r in (*row.finished, *row.others)]
    storage.write_bytes(out_path, render(runs, out_path, title, table).encode())
    return out_path


def render(
    runs: Sequence[RunData], out_path: str = "report.html", title: str | None = None, table: Table | None = None
) -> str:
    """The page. out_path: where it will lie, for links from there to the run folders. table: in place of the usual."""
    import jinja2

    if table is None:
        tables = {"Comparison": comparison(runs)}
        pictured = runs
    else:
        tables = {"Methods on equal terms": table}
        if table.further:
            tables["Further results"] = replace(table, columns=table.further)
        pictured = runs if len(runs) <= MOST_PANELS else [row.finished[0] for row in table.rows if row.finished]
    source = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"duration": duration, "value": _value, "number": _number}
    return environment.from_string(source).render(
        title=title or _title(runs, table),
        tables=tables,
        row_label=row_label,
        after=("epoch", "wall_s", "rate"),
        pictures=[_inline(picture) for picture in curves.pictures(pictured)],
        runs=[_section(i, run, out_path) for i, run in enumerate(runs)],
        anchor=lambda run: f"run-{next(i for i, other in enumerate(runs) if other is run)}",
        latest=max((str(run.manifest.get("created", ""))[:10] for run in runs), default=""),
    )


def _title(runs: Sequence[RunData], table: Table | None) -> str:
    methods = list(dict.fromkeys(run.method for run in runs)) if table is None else [row.label for row in table.rows]
    corpora = list(dict.fromkeys(run.corpus for run in runs))
    shown = methods[0] if len(methods) == 1 else f"{', '.join(methods[:-1])} and {methods[-1]}"
    if len(methods) > 5:
        shown = f"{len(methods)} methods"
    return f"{shown} on {', '.join(corpora)}"


def _inline(picture: curves.Picture) -> dict[str, Any]:
    import markupsafe

    # matplotlib escapes every text it writes, so the SVG is markup by now.
    panels = [markupsafe.Markup(curves.svg([panel], f"{picture.name}-{i}")) for i, panel in enumerate(picture.panels)]
    return {"title": picture.title, "caption": picture.caption, "panels": panels}


def _section(index: int, run: RunData, out_path: str) -> dict[str, Any]:
    """What the page says about one run."""
    manifest, summary = run.manifest, run.summary or {}
    changed = [
        (key, entry.get("value"), entry.get("origin", "?"))
        for key, entry in sorted(run.provenance.items())
        if isinstance(entry, dict) and entry.get("origin") != "default" and entry.get("value") is not None
    ]
    hardware = manifest.get("hardware")
    environment = {
        "command": _command(manifest.get("argv")),
        "commit": manifest.get("commit"),
        "versions": manifest.get("versions"),
        "hardware": hardware,
        "device": run._first("device"),
        "workers": run._first("workers"),
        "engine": manifest.get("engine"),
        "threads": manifest.get("threads"),
        "seed": run.seed,
        "parameters": f"{n:,}" if isinstance(n := run._first("parameters"), int) else None,
        "data fingerprint": run._first("data_fingerprint"),
        "settings digest": run._first("digest"),
        "started": manifest.get("created"),
        "wall time": duration(summary["wall_s"]) if summary.get("wall_s") is not None else None,
        "waiting for data": None if (share := summary.get("data_wait_share")) is None else f"{share:.1%} of the time",
    }
    return {
        "anchor": f"run-{index}",
        "run": run,
        "link": _link(run.uri, out_path),
        "place": storage.show(run.uri),
        "decisions": [_decision(decision) for decision in run.decisions],
        "changed": changed,
        "environment": {key: value for key, value in environment.items() if value not in (None, "", {}, [])},
        "skipped": len(run.skipped),
        "reasons": Counter(str(row.get("reason", "unknown")) for row in run.skipped).most_common(5),
        "events": [event for event in run.events if event.get("event") != "skipped_rows"],
    }


def _command(argv: Any) -> str | None:
    """The command line that started the run; saved with or without the program's name."""
    if not isinstance(argv, list) or not argv:
        return None
    words = [str(word) for word in argv]
    return shlex.join(words if "counterpoise" in words[0] else ["counterpoise", *words])


def _decision(decision: Record) -> dict[str, Any]:
    why = reason(decision)
    added = list(decision.get("add") or ())
    used = {"sigma", "tau", "threshold_low"}
    return {
        "epoch": decision["epoch"],
        "action": str(decision.get("action", "")).replace("_", " "),
        "add": added,
        "scores": why.scores,
        "ratios": {name: r for name, r in why.ratios.items() if name in added} or why.ratios,
        "low": why.low,
        "rest": {key: value for key, value in why.rest.items() if key not in used or why.low is None},
        "classifiers": decision.get("classifiers") or {},
    }


def _link(uri: str, out_path: str) -> str | None:
    """Where the run folder lies as seen from the report; None if a browser cannot go there."""
    if not (storage.is_local(uri) and storage.is_local(out_path)):
        return None
    folder = os.path.dirname(os.path.abspath(out_path.removeprefix("file://")))
    return "./" + quote(os.path.relpath(uri.removeprefix("file://"), folder)) + "/"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _value(value: Any) -> str:
    """A setting or input as a short text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value)
