"""A report as one HTML file: no script, nothing fetched, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import base64
import importlib.resources
import os
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from counterpoise import storage
from counterpoise.contracts import DataError, Record
from counterpoise.reports import curves
from counterpoise.reports.paper import PaperTable, grouped, labelled, leaderboard, paper_table
from counterpoise.reports.records import RunData, read_runs, reason
from counterpoise.reports.spec import parse_spec
from counterpoise.reports.tables import DASH, Table, fused_by_seed, row_label
from counterpoise.wording import duration

TEMPLATE = "template.html.j2"
PAGE_DPI = 110  # of pictures that can be saved from the page
MOST_PANELS = 12  # runs of a comparison that are all drawn; of more, the first of each method


@dataclass(frozen=True)
class Extra:
    """What the report of a sweep has beyond that of runs.

    papers: its tables. groups: {label: runs} whose curves are averaged. pictures: come first. remarks: what could not
    be done. before: names of usual pictures that come right after `pictures`.
    """

    papers: Sequence[PaperTable]
    groups: Mapping[str, Sequence[RunData]]
    pictures: Sequence[curves.Picture] = ()
    remarks: Sequence[str] = ()
    before: Sequence[str] = ()

    def all_pictures(self) -> list[curves.Picture]:
        """Everything that is drawn, in the order of the page. Of very many rows, the best."""
        shown = dict(self.groups)
        if len(shown) > MOST_PANELS:
            best = sorted(shown, key=lambda label: -(statistics.fmean(fused_by_seed(shown[label]).values() or [-1.0])))
            shown = {label: group for label, group in shown.items() if label in best[:MOST_PANELS]}
        runs = [run for group in shown.values() for run in group]
        if len(runs) > MOST_PANELS:
            runs = [next((run for run in group if run.finished), group[0]) for group in shown.values() if group]
        usual = curves.pictures(runs, shown)
        if len(shown) < len(self.groups):
            note = f" Of {len(self.groups)} rows the {len(shown)} with the highest fused accuracy."
            usual = [replace(picture, caption=picture.caption + note) for picture in usual]
        return [*self.pictures, *sorted(usual, key=lambda picture: picture.name not in self.before)]


def write_report(run_uris: Sequence[str], out_path: str, title: str | None = None, table: Table | None = None) -> str:
    """Write the report of these runs to `out_path` (local or object storage); the path again."""
    if not run_uris:
        raise DataError("no runs to report on; give one or more run folders")
    runs = read_runs(run_uris) if table is None else [r for row in table.rows for r in (*row.finished, *row.others)]
    storage.write_bytes(out_path, render(runs, out_path, title, table).encode())
    return out_path


def plain(runs: Sequence[RunData], published: Sequence[str] | None = None) -> Extra:
    """What a report says of runs that nobody has grouped."""
    groups = grouped(runs)
    papers = [paper_table(groups, parse_spec({"published": published}))]
    return Extra(papers, labelled(groups))


def render(
    runs: Sequence[RunData],
    out_path: str = "report.html",
    title: str | None = None,
    table: Table | None = None,
    extra: Extra | None = None,
) -> str:
    """The page. out_path: where it will lie, for links from there to the run folders.

    table: of a comparison of methods, in place of the leaderboard. extra: what there is beyond single runs.
    """
    import jinja2

    if extra is None and table is None:
        extra = plain(runs)
    elif extra is None and table is not None:
        groups = {row.label: [*row.finished, *row.others] for row in table.rows}
        paper = paper_table({table.rows[0].corpus: groups}, parse_spec(None))
        extra = Extra([paper] if paper.printed else [], groups)
    assert extra is not None
    if table is None:
        tables = {"Leaderboard": leaderboard(extra.papers)}
    else:
        tables = {"Methods on equal terms": table}
        if table.further:
            tables["Further results"] = replace(table, columns=table.further)
    source = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"duration": duration, "value": _value, "number": _number}
    drawn = extra.all_pictures()
    return environment.from_string(source).render(
        title=title or _title(runs, table),
        papers=extra.papers,
        remarks=extra.remarks,
        tables=tables,
        row_label=row_label,
        row_anchor=_row_anchor(tables),
        starts=lambda paper, i: i > 0 and paper.columns[i].group != paper.columns[i - 1].group,
        after=("epoch", "wall_s", "rate"),
        pictures=[_inline(picture) for picture in drawn],
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

    texts = [curves.svg([panel], f"{picture.name}-{i}") for i, panel in enumerate(picture.panels)]
    whole = curves.as_file(texts[0]) if len(texts) == 1 else curves.standalone_svg(picture)
    panels = list(map(markupsafe.Markup, texts))  # matplotlib escapes every text it writes, so SVG is markup by now
    files = {"PNG": ("image/png", curves.png(picture, PAGE_DPI)),
             "SVG": ("image/svg+xml", whole.encode())}  # fmt: skip
    links = [
        {"kind": kind, "name": f"{picture.name}.{kind.lower()}", "data": f"data:{mime};base64,{_base64(data)}"}
        for kind, (mime, data) in files.items()
    ]
    return {"title": picture.title, "caption": picture.caption, "panels": panels, "links": links}


def _row_anchor(tables: Mapping[str, Table]) -> Callable[..., str]:
    """(heading of a row, its corpus or none for the first that has it) -> id on the page."""
    rows = list(tables.values())[-1].rows
    places = {(row.label, row.corpus): f"row-{i}" for i, row in enumerate(rows)}

    def anchor(heading: str, corpus: str | None = None) -> str:
        found = [place for (label, where), place in places.items() if label == heading and corpus in (None, where)]
        return found[0] if found else "runs"

    return anchor


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


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
        "sweep": (run.manifest.get("sweep") or {}).get("vary"),
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
