"""Comparison of runs: one row per (corpus, method, settings), mean and sample deviation over seeds.

`comparison` finds the rows itself; `compared` is given them, and adds what a comparison of methods can say beyond
means: differences by seed, their significance, and the price in time.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from counterpoise.reports.records import FUSED, RunData, all_modalities, series
from counterpoise.reports.significance import (
    EXACT_UP_TO,
    RESAMPLES,
    Paired,
    against,
    against_picked,
    comparisons,
    power_note,
)
from counterpoise.wording import duration

DASH = "-"
DIFFERENCE, P_REFERENCE, P_BEST, CHOSEN, TIME_RATIO = "difference", "p_reference", "p_best", "chosen", "time_ratio"
WORDS = ("corpus", "method", "classifiers")  # headings of columns that hold words
ONE_NUMBER = (P_REFERENCE, P_BEST, CHOSEN, TIME_RATIO)  # of a row, not of each of its runs


@dataclass(frozen=True)
class Cell:
    """One number of one row: the values of its runs. best: no other row of the corpus is better, second: only the best
    are. spread: show it. text: stands in place of the number.
    """

    values: tuple[float, ...]
    digits: int = 3
    best: bool = False
    second: bool = False
    seconds: bool = False
    spread: bool = True
    text: str = ""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for fewer than two runs."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.text or self.mean is None:
            return self.text or DASH
        if self.seconds:
            return duration(self.mean)
        text = f"{self.mean:.{self.digits}f}"
        return text if self.std is None or not self.spread else f"{text} ± {self.std:.{self.digits}f}"


@dataclass
class Row:
    corpus: str
    method: str
    label: str  # the method, and the settings in which it differs from other rows of the same method
    digest: str
    finished: list[RunData]
    others: list[RunData]  # not finished: named, but not averaged
    cells: dict[str, Cell] = field(default_factory=dict)
    classifiers: str = DASH
    split: str = "test"

    @property
    def runs(self) -> list[str]:
        return [run.name for run in self.finished]


@dataclass
class Table:
    """Rows in the order in which the runs were given. columns: {key: (heading, bigger is better, or None)}."""

    rows: list[Row]
    columns: dict[str, tuple[str, bool | None]]
    further: dict[str, tuple[str, bool | None]] = field(default_factory=dict)  # columns that have a table of their own
    remarks: list[str] = field(default_factory=list)  # more notes

    @property
    def grown(self) -> bool:
        """Whether there is a column of classifiers."""
        return "epoch" in self.columns and any(row.classifiers != DASH for row in self.rows)

    @property
    def corpora(self) -> list[str]:
        return list(dict.fromkeys(row.corpus for row in self.rows))

    @property
    def notes(self) -> list[str]:
        """What a reader must know to read the numbers, one sentence each."""
        notes = []
        if any(len(row.finished) > 1 for row in self.rows):
            notes.append("Mean ± sample standard deviation over n seeds.")
        selections = {str(run.summary["selection"]) for row in self.rows for run in row.finished
                      if run.summary and run.summary.get("selection")}  # fmt: skip
        if selections:
            notes.append(f"Epoch selected by best {', '.join(sorted(selections))}.")
        if any(selection.startswith("test") for selection in selections):
            notes.append("An accuracy whose epoch was selected on test is the best of all epochs, and too high.")
        if any(row.split != "test" for row in self.rows if row.finished):
            notes.append("Rows marked (valid) or (train) are of a corpus without test split.")
        for row in self.rows:
            for run in row.others:
                at = f", epoch {len(run.epochs)} of {run.num_epochs}" if run.num_epochs else ""
                why = next(iter(str(run.status.get("error") or "").splitlines()), "")
                notes.append(f"{run.name} is {run.state}{at}, and not in the numbers{': ' + why if why else '.'}")
        return [*notes, *self.remarks]


def group_runs(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Runs that differ only in seed and name, together; groups and runs keep their order."""
    groups: dict[tuple[str, str, str], list[RunData]] = {}
    for run in runs:
        groups.setdefault((run.corpus, run.method, run.settings_digest), []).append(run)
    return list(groups.values())


def group_labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """The method of each group; where groups share it, also the settings that tell them apart."""
    labels = []
    for group in groups:
        first = group[0]
        rivals = [g[0] for g in groups if g[0].method == first.method and g[0].corpus == first.corpus]
        if len(rivals) == 1:
            labels.append(first.method)
            continue
        keys = sorted({key for rival in rivals for key in rival.settings})
        differing = [k for k in keys if len({repr(rival.settings.get(k)) for rival in rivals}) > 1]
        shown = [f"{k.removeprefix('method.')}={first.settings[k]}" for k in differing if k in first.settings]
        detail = ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
        labels.append(f"{first.method} ({detail or first.settings_digest[:6]})")
    return labels


def _result(run: RunData) -> tuple[str, dict[str, Any]]:
    """The split whose numbers the table shows, and the numbers."""
    assert run.summary is not None
    for split in ("test", "valid", "train"):
        if run.summary.get(split):
            return split, run.summary[split]
    return "test", {}


def values_of(runs: Sequence[RunData], *path: str) -> tuple[float, ...]:
    """The number at `path` of the summaries that have it; paths under "result" are of the shown split."""
    found = []
    for run in runs:
        value: Any = {**(run.summary or {}), "result": _result(run)[1]}
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found.append(float(value))
    return tuple(found)


def comparison(runs: Sequence[RunData], groups: Mapping[str, Sequence[RunData]] | None = None) -> Table:
    """The table of all runs. Unfinished runs are named in the notes and not averaged.

    groups: {label: its runs}, where the rows are known; by default runs are grouped by their settings.
    """
    if groups is None:
        found = group_runs(runs)
        labelled = list(zip(group_labels(found), found, strict=True))
    else:
        labelled = [(label, list(group)) for label, group in groups.items()]
    modalities = all_modalities(runs)
    columns: dict[str, tuple[str, bool | None]] = {FUSED: (FUSED, True)}
    columns |= {f"accuracy/{name}": (name, True) for name in modalities}
    columns |= {"gap": ("gap", False), "map": ("mAP", True), "macro_f1": ("macro-F1", True)}
    columns |= {"epoch": ("epoch", None), "wall_s": ("time", None), "rate": ("samples/s", None)}
    rows = []
    for label, group in labelled:
        done = [run for run in group if run.finished]
        first = (done or group or [RunData("")])[0]
        row = Row(first.corpus, first.method, label, first.settings_digest, done,
                  [run for run in group if not run.finished])  # fmt: skip
        splits = {_result(run)[0] for run in done}
        row.split = splits.pop() if len(splits) == 1 else "test"
        single = len(first.modalities) < 2
        row.cells = {
            FUSED: Cell(values_of(done, "result", "accuracy", FUSED)),
            **{f"accuracy/{m}": Cell(values_of(done, "result", "accuracy", m)) for m in modalities},
            "gap": Cell(() if single else values_of(done, "result", "gap")),
            "map": Cell(values_of(done, "result", "map", FUSED)),
            "macro_f1": Cell(values_of(done, "result", "macro_f1", FUSED)),
            "epoch": Cell(values_of(done, "selected_epoch"), digits=0 if len(done) < 2 else 1),
            "wall_s": Cell(values_of(done, "wall_s"), seconds=True),
            "rate": Cell(values_of(done, "samples_per_s"), digits=0, spread=False),
        }
        row.classifiers = _classifiers(done)
        rows.append(row)
    columns = {key: column for key, column in columns.items() if any(row.cells[key].values for row in rows)}
    mark_best(rows, columns)
    return Table(rows, columns)


def fused_by_seed(runs: Sequence[RunData]) -> dict[int, float]:
    """{seed: fused accuracy} of the finished runs, on the split whose numbers the table shows."""
    return {run.seed: values[0] for run in runs if run.finished and run.seed is not None
            and (values := values_of([run], "result", "accuracy", FUSED))}  # fmt: skip


VS_BEST = "vs best"  # the family of comparisons with the method that the numbers themselves picked


def best_label(scores: Mapping[str, Mapping[int, float]]) -> str | None:
    """The method with the highest mean accuracy over its seeds, the first of equals; None if no run has finished."""
    means = {label: statistics.fmean(own.values()) for label, own in scores.items() if own}
    return max(means, key=lambda label: means[label]) if means else None


def compared(
    groups: Mapping[str, Sequence[RunData]],
    reference: str,
    *,
    tuned: str = "",
    chosen: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
) -> Table:
    """Methods on equal terms: accuracies, differences to `reference` by seed, and how significant they are.

    groups: {method: its runs, one per seed}. tuned: the key of the setting that was tuned, chosen: {method: value}.
    """
    table = comparison([run for group in groups.values() for run in group], groups)
    corpus = next((row.corpus for row in table.rows if row.finished), "?")
    scores = {label: fused_by_seed(runs) for label, runs in groups.items()}
    best = best_label(scores)
    to_reference = against(reference, scores)
    to_best = against_picked(best, scores) if best is not None else {}
    seconds = {label: _seconds_per_epoch(runs) for label, runs in groups.items()}
    base = seconds[reference]
    for row in table.rows:
        row.corpus = corpus  # also of rows without a finished run
        pair, own = to_reference.get(row.label), seconds[row.label]
        row.cells[DIFFERENCE] = difference_cell(pair)
        row.cells[P_REFERENCE], row.cells[P_BEST] = p_cell(pair), p_cell(to_best.get(row.label))
        row.cells[CHOSEN] = Cell((), text=(chosen or {}).get(row.label, ""))
        row.cells[TIME_RATIO] = Cell((own / base,) if own and base else (), digits=2)
    columns: dict[str, tuple[str, bool | None]] = {
        key: column for key, column in table.columns.items() if key in (FUSED, "gap") or key.startswith("accuracy/")
    }
    columns |= {
        DIFFERENCE: (f"vs {reference}", None),
        P_REFERENCE: (f"p vs {reference}", None),
        P_BEST: ("p vs best", None),
        CHOSEN: (tuned, None),
        TIME_RATIO: ("time ratio", None),
    }
    table.further = {key: column for key, column in table.columns.items() if key not in columns}
    table.columns = {
        k: c for k, c in columns.items() if any(row.cells[k].values or row.cells[k].text for row in table.rows)
    }
    mark_best(table.rows, table.columns)
    families = [(f"vs {reference}", list(to_reference.values())), (VS_BEST, list(to_best.values()))]
    table.remarks = [*significance_notes(families, best), *_time_notes(table, reference), *remarks]
    return table


def difference_cell(pair: Paired | None) -> Cell:
    if pair is None or pair.mean is None:
        return Cell(())
    return Cell(pair.differences, text=f"{round(pair.mean, 3) + 0.0:+.3f}")


def p_cell(pair: Paired | None) -> Cell:
    if pair is None or pair.p_holm is None:
        return Cell(())
    return Cell((pair.p_holm,), text="<0.0001" if pair.p_holm < 0.0001 else f"{pair.p_holm:.4f}")


def _seconds_per_epoch(runs: Sequence[RunData]) -> float | None:
    values = [value for run in runs if run.finished for value in series(run, "seconds")[1]]
    return statistics.median(values) if values else None


def significance_notes(families: Sequence[tuple[str, Sequence[Paired]]], best: str | None) -> list[str]:
    """How p came about, for families of comparisons by name. best: whom one of the families compares to, if any."""
    tested = {name: [pair for pair in pairs if pair.p is not None] for name, pairs in families}
    if not any(tested.values()):
        return []
    counts = ", ".join(f"{comparisons(len(pairs), name == VS_BEST)} {name}" for name, pairs in tested.items())
    notes = [
        "Differences are of fused accuracy, seed by seed. p: exact two-sided sign-flip test on them, with Holm's "
        f"correction for the number of comparisons ({counts}).",
    ]
    if best is not None:
        notes.append(
            f"Best is {best}, by mean fused accuracy: picked by these same numbers, so p vs best is corrected for all "
            "pairs of methods."
        )
    if any(pair.n > EXACT_UP_TO for pairs in tested.values() for pair in pairs):
        notes.append(f"With more than {EXACT_UP_TO} seeds p is from {RESAMPLES:,} sign flips drawn with a fixed seed.")
    short = [note for name, pairs in tested.items() if (note := power_note(pairs, name == VS_BEST))]
    return [*notes, *dict.fromkeys(short)]


def _time_notes(table: Table, reference: str) -> list[str]:
    notes = []
    if TIME_RATIO in table.columns:
        notes.append(
            f"Time ratio: median seconds per epoch, divided by the median of {reference}; from the epochs' records."
        )
    epochs = {row.label: max(len(run.epochs) for run in row.finished) for row in table.rows if row.finished}
    if len(set(epochs.values())) > 1:
        least = min(epochs.values())
        more = ", ".join(f"{label} {count}" for label, count in epochs.items() if count > least)
        notes.append(f"Epochs of a run, with those that a method tries out and takes back: {more}, all others {least}.")
    return notes


def _classifiers(runs: Sequence[RunData]) -> str:
    """Classifiers per modality, e.g. "audio 1, visual 5"; a range where seeds differ."""
    counts: dict[str, list[int]] = {}
    for run in runs:
        for name, n in ((run.summary or {}).get("classifiers") or {}).items():
            counts.setdefault(name, []).append(int(n))
    if not counts:
        return DASH
    spans = {name: (min(ns), max(ns)) for name, ns in counts.items()}
    return ", ".join(f"{name} {low}" + (f"-{high}" if high > low else "") for name, (low, high) in spans.items())


def mark_best(rows: Sequence[Row], columns: Mapping[str, tuple[str, bool | None]], second: bool = False) -> None:
    """Mark the best number of each corpus and column; of equal ones all. second: also the next best."""
    for corpus in {row.corpus for row in rows}:
        for key, (_, bigger) in columns.items():
            shown = {id(row): round(mean, row.cells[key].digits) for row in rows
                     if row.corpus == corpus and (mean := row.cells[key].mean) is not None}  # fmt: skip
            if bigger is None or len(shown) < 2:
                continue
            first, *others = sorted(set(shown.values()), reverse=bigger)
            for row in rows:
                if shown.get(id(row)) == first:
                    row.cells[key] = replace(row.cells[key], best=True)
                elif second and others and len(shown) > 2 and shown.get(id(row)) == others[0]:
                    row.cells[key] = replace(row.cells[key], second=True)


def row_label(row: Row) -> str:
    return row.label + (f" ({row.split})" if row.split != "test" and row.finished else "")


def _cells(table: Table, row: Row, mark: str = "") -> list[str]:
    texts = []
    for key in table.columns:
        cell = row.cells[key]
        texts.append(f"{mark}{cell}{mark}" if cell.best else str(cell))
    return texts


def _grid(table: Table, mark: str = "") -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text; the corpus only where there are several, classifiers only where there are any."""
    many = len(table.corpora) > 1
    grown = table.grown
    at = list(table.columns).index("epoch") if "epoch" in table.columns else len(table.columns)
    headings = [heading for heading, _ in table.columns.values()]
    headings = [*["corpus"] * many, "method", "n", *headings[:at], *["classifiers"] * grown, *headings[at:]]
    rows = []
    for row in table.rows:
        cells = _cells(table, row, mark)
        head = [*[row.corpus] * many, row_label(row), str(len(row.finished))]
        rows.append([*head, *cells[:at], *[row.classifiers] * grown, *cells[at:]])
    return headings, rows


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table as plain text: words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]
    left = {i for i, heading in enumerate(headings) if heading in WORDS}

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return [line(headings), line(["-" * w for w in widths]), *(line(row) for row in rows)]


def text_table(runs: Sequence[RunData] | Table) -> str:
    """The comparison as aligned plain text, with the notes below it; no newline at the end."""
    table = runs if isinstance(runs, Table) else comparison(runs)
    lines = aligned(*_grid(table))
    named = [] if table.further else table.rows  # runs of a comparison are many, and named after method and seed
    sources = [f"{row_label(row)}: {', '.join(row.runs)}" for row in named if row.runs not in ([], [row.label])]
    notes = [*table.notes, *(f"Runs of {source}" for source in sources)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def markdown_safe(text: str) -> str:
    for character in ("\\", "|", "<", "*", "_", "`", "["):
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")


def markdown_table(runs: Sequence[RunData] | Table) -> str:
    """The comparison as a Markdown table; the best of each column is bold, the last column names the runs."""
    table = runs if isinstance(runs, Table) else comparison(runs)
    headings, rows = _grid(table, mark="**")
    lines = markdown_lines(headings, rows, [row.runs for row in table.rows])
    return "\n\n".join(["\n".join(lines), *map(markdown_safe, table.notes)]) + "\n"


def markdown_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], sources: Sequence[Sequence[str]]
) -> list[str]:
    """Lines of a Markdown table. sources: names of the runs of every row, for the last column."""
    words = {i for i, heading in enumerate(headings) if heading in WORDS}
    lines = [[*map(markdown_safe, headings), "runs"]]
    lines.append([":---" if i in words else "---:" for i in range(len(headings))] + [":---"])
    for cells, names in zip(rows, sources, strict=True):
        safe = [markdown_safe(c) if i in words else c for i, c in enumerate(cells)]
        lines.append([*safe, ", ".join(map(markdown_safe, names)) or DASH])
    return ["| " + " | ".join(line) + " |" for line in lines]


def csv_safe(text: object) -> object:
    """A text that spreadsheets would take for a formula, such as =cmd(), with the apostrophe that makes it text."""
    formula = isinstance(text, str) and text != DASH and text.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{text}" if formula else text


def csv_table(
    runs: Sequence[RunData] | Table, further: Mapping[tuple[str, str], Mapping[str, object]] | None = None
) -> str:
    """The comparison as CSV in full precision: mean and std of every column apart, then the runs.

    further: more columns, {(corpus, label of the row): {heading: value}}.
    """
    table = runs if isinstance(runs, Table) else comparison(runs)
    more = further or {}
    named = list(dict.fromkeys(heading for own in more.values() for heading in own))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = {key: key.removeprefix("accuracy/") for key in table.columns}
    numbers |= {"rate": "samples_per_s", "epoch": "selected_epoch"} if "rate" in numbers else {}
    pairs = [c for key, name in numbers.items() for c in ((name,) if key in ONE_NUMBER else (name, f"{name}_std"))]
    headings = ["corpus", "method", "split", "n", *pairs, "classifiers", *named, "settings", "runs"]
    writer.writerow(map(csv_safe, headings))
    for row in table.rows:
        cells: list[object] = []
        for key in numbers:
            cell = row.cells[key]
            values = (cell.mean,) if key in ONE_NUMBER else (cell.mean, cell.std)
            cells += [csv_safe(cell.text)] if key == CHOSEN else ["" if v is None else repr(v) for v in values]
        classifiers = "" if row.classifiers == DASH else row.classifiers
        own = more.get((row.corpus, row.label), {})
        first = [csv_safe(text) for text in (row.corpus, row.label, row.split)]
        last = [classifiers, *(own.get(heading, "") for heading in named), row.digest, " ".join(row.runs)]
        writer.writerow([*first, len(row.finished), *cells, *map(csv_safe, last)])
    return out.getvalue()
