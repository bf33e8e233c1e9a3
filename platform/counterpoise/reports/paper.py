"""Results in the papers' form: methods as rows; per corpus all modalities together ("Multi") and each alone as columns.

Beside our numbers stand those that papers print, where the corpus is theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterpoise.reports.published import Printed, chosen_tables, corpus_of, differences, printed, source_of
from counterpoise.reports.records import FUSED, RunData, all_modalities
from counterpoise.reports.significance import against
from counterpoise.reports.spec import AnySpec, MissingSpec
from counterpoise.reports.tables import (
    DASH,
    DIFFERENCE,
    P_REFERENCE,
    Cell,
    Row,
    Table,
    aligned,
    comparison,
    csv_table,
    difference_cell,
    fused_by_seed,
    group_labels,
    group_runs,
    mark_best,
    markdown_lines,
    markdown_safe,
    p_cell,
    row_label,
    significance_notes,
    values_of,
)

METRICS = {"accuracy": "accuracy", "map": "mAP", "macro_f1": "macro-F1"}
NUM = "n"
ORDER = (FUSED, "accuracy", "gap", "map", "macro_f1", "epoch", "wall_s", "rate")  # of columns of the leaderboard
FURTHER = ("gap", "epoch", "wall_s", "rate")  # only in CSV, where there is room
Groups = Mapping[str, Mapping[str, Sequence[RunData]]]  # {corpus: {label: its runs}}


@dataclass(frozen=True)
class Column:
    """One column of one corpus. key: of the row's cells, or "n". group: heading above several columns."""

    corpus: str
    key: str
    heading: str
    group: str


@dataclass(frozen=True)
class Shown:
    """One cell as it is read. printed: (number, mark of its source) as papers have it."""

    text: str
    best: bool = False
    second: bool = False
    printed: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> str:
        aside = ", ".join(f"{number} {mark}" for number, mark in self.printed)
        return f"{self.text} [{aside}]" if aside else self.text


@dataclass
class PaperTable:
    """The table, and everything it takes to show it anywhere.

    table: a row per corpus and label. labels: in the order of rows. printed: {(corpus, label, key of the cell): ...}.
    sources: {paper and table: the letter that marks it}.
    """

    table: Table
    spec: AnySpec
    labels: list[str]
    columns: list[Column]
    printed: dict[tuple[str, str, str], list[Printed]]
    sources: dict[str, str]
    notes: list[str]

    @property
    def caption(self) -> str:
        if self.spec.caption:
            return self.spec.caption
        metrics = " and ".join(METRICS[metric] for metric in self.spec.metrics)
        return f"{metrics[0].upper()}{metrics[1:]} on {', '.join(self.table.corpora)}"

    def heading(self, label: str) -> str:
        """Of a row; marked where it is not of test."""
        splits = [row_label(row)[len(row.label) :] for row in self.rows(label)]
        return self.spec.rows.get(label, label) + next((split for split in splits if split), "")

    def rows(self, label: str) -> list[Row]:
        return [row for row in self.table.rows if row.label == label]

    def shown(self, label: str, column: Column) -> Shown:
        row = next((row for row in self.rows(label) if row.corpus == column.corpus), None)
        if row is None:
            return Shown(DASH)
        if column.key == NUM:
            return Shown(str(len(row.finished)))
        cell = row.cells[column.key]
        aside = self.printed.get((column.corpus, label, column.key), [])
        marks = tuple((f"{one.value:.4f}", self.sources[one.source]) for one in aside)
        return Shown(str(cell), cell.best, cell.second, marks)

    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns, and how many columns each spans; empty if one would say it all."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if len(spans) > 1 else []


def paper_table(groups: Groups, spec: AnySpec) -> PaperTable:
    """The table of runs that are grouped by corpus and label."""
    tables = chosen_tables(spec.published)
    rows: list[Row] = []
    columns: list[Column] = []
    found: dict[tuple[str, str, str], list[Printed]] = {}
    families, remarks = [], []
    wanted: dict[str, tuple[str, bool | None]] = {}
    further: dict[str, tuple[str, bool | None]] = {}
    several = len(groups) > 1
    for corpus, own in groups.items():
        runs = [run for group in own.values() for run in group]
        part = comparison(runs, own)
        numbers = _numbers(spec, all_modalities(runs))
        known = corpus_of(runs)
        for row in part.rows:
            row.corpus = corpus  # also of rows without a finished run
            for key, number in numbers.items():
                row.cells[key] = Cell(values_of(row.finished, "result", *number.path))
                if known and (values := printed(known, row.label, number.metric, number.name, tables)):
                    found[corpus, row.label, key] = values
        mine: dict[str, tuple[str, bool | None]] = {key: (number.heading, True) for key, number in numbers.items()}
        baseline = baseline_of(list(own), spec)
        scores = {label: fused_by_seed(group) for label, group in own.items()}
        enough = {label: k for label, k in scores.items() if label == baseline or len(k.keys() & scores[baseline]) > 1}
        pairs = against(baseline, enough)
        for row in part.rows:
            row.cells[DIFFERENCE] = difference_cell(pairs.get(row.label))
            row.cells[P_REFERENCE] = p_cell(pairs.get(row.label))
        versus = f"vs {spec.rows.get(baseline, baseline)}"
        extra: dict[str, tuple[str, bool | None]] = {}
        if pairs:
            families.append((f"{versus} on {corpus}" if several else versus, list(pairs.values())))
            extra = {DIFFERENCE: (versus, None), P_REFERENCE: ("p", None)}
        mark_best(part.rows, mine, second=True)
        wanted |= mine | extra
        further |= {key: column for key, column in part.columns.items() if key in FURTHER}
        grouped = len({number.group for number in numbers.values()}) > 1
        for key, number in numbers.items():
            group = f"{corpus}, {number.group}" if several and grouped else number.group if grouped else corpus
            columns.append(Column(corpus, key, number.heading, group))
        last = corpus if several or not grouped else ""
        columns += [Column(corpus, NUM, NUM, last)]
        columns += [Column(corpus, key, heading, last) for key, (heading, _) in extra.items()]
        rows += part.rows
        beside = any(place == corpus for place, *_ in found)
        remarks += differences(known, runs, tables) if known and beside else []
    labels = list(dict.fromkeys(label for own in groups.values() for label in own))
    shown = {one.source for values in found.values() for one in values}
    ordered = [s for s in dict.fromkeys(map(source_of, tables.values())) if s in shown]
    marks = {source: _letter(i) for i, source in enumerate(ordered)}
    for row in rows:
        row.cells = {key: Cell(()) for key in (*wanted, *further)} | row.cells
    table = Table(rows, wanted, further)
    notes = [
        f"{_what(rows)}: Multi is all modalities together, a name one of them alone as the method predicts from it."
        if spec.modalities
        else f"{_what(rows)} of all modalities together.",
        *(
            ["Best of each column in bold" + (", the second underlined." if len(labels) > 2 else ".")]
            * (len(labels) > 1)
        ),
        *table.notes,
        *significance_notes(families, None),
        *([f"In brackets as printed: {'; '.join(f'{m} {s}' for s, m in marks.items())}."] if marks else []),
        *remarks,
    ]
    return PaperTable(table, spec, labels, columns, found, marks, list(dict.fromkeys(notes)))


def grouped(runs: Sequence[RunData]) -> dict[str, dict[str, list[RunData]]]:
    """Runs by corpus and by label: those that differ only in seed and name share one."""
    found: dict[str, dict[str, list[RunData]]] = {}
    groups = group_runs(runs)
    for label, group in zip(group_labels(groups), groups, strict=True):
        found.setdefault(group[0].corpus, {}).setdefault(label, []).extend(group)
    return found


def labelled(groups: Groups) -> dict[str, Sequence[RunData]]:
    """Runs by label alone; of several corpora, the label names its corpus too."""
    if len(groups) == 1:
        return dict(next(iter(groups.values())))
    return {f"{corpus} {label}": runs for corpus, own in groups.items() for label, runs in own.items()}


def leaderboard(papers: Sequence[PaperTable]) -> Table:
    """All rows of some tables with everything there is to say of a row, the highest fused accuracy first."""
    groups: dict[str, dict[str, list[RunData]]] = {}
    for paper in papers:
        for row in paper.table.rows:
            own = groups.setdefault(row.corpus, {}).setdefault(paper.heading(row.label), [])
            own += [run for run in (*row.finished, *row.others) if run not in own]
    parts = [comparison([run for group in own.values() for run in group], own) for own in groups.values()]
    for corpus, part in zip(groups, parts, strict=True):
        for row in part.rows:
            row.corpus = corpus
    columns = {key: column for part in parts for key, column in part.columns.items()}
    rows = [row for part in parts for row in sorted(part.rows, key=lambda row: -(row.cells[FUSED].mean or -1.0))]
    for row in rows:
        row.cells = {key: Cell(()) for key in columns} | row.cells
    return Table(rows, dict(sorted(columns.items(), key=lambda item: ORDER.index(item[0].split("/")[0]))))


def baseline_of(labels: Sequence[str], spec: AnySpec) -> str:
    """The label that the others are compared to."""
    if spec.baseline in labels:
        return str(spec.baseline)
    return next((label for label in labels if re.split("[: ]", label)[0] == "joint"), labels[0])


@dataclass(frozen=True)
class _Number:
    """A number of the paper's form. path: in a run's results. metric, name: as papers' tables call it."""

    path: tuple[str, ...]
    metric: str
    name: str
    heading: str
    group: str


def _numbers(spec: AnySpec, modalities: Sequence[str]) -> dict[str, _Number]:
    """The numbers that the specification asks for, by the key of their cells."""
    names = (FUSED, *(modalities if spec.modalities else ()))
    alone = not spec.modalities and len(spec.metrics) > 1  # then a metric is a heading, not a group of columns
    found = {}
    for metric in spec.metrics:
        for name in names:
            heading = METRICS[metric] if alone else "Multi" if name == FUSED else modality_heading(name)
            found[f"{metric}/{name}"] = _Number((metric, name), metric, name, heading, "" if alone else METRICS[metric])
    if isinstance(spec, MissingSpec):
        for rate in spec.rates:
            path = ("missing_rates", f"{rate:g}", "accuracy")
            found[f"missing/{rate:g}"] = _Number(
                path, f"missing_{100 * rate:g}", FUSED, f"{rate:.0%}", "one missing in"
            )
        for name in modalities:
            path = ("missing", name, "accuracy")
            found[f"without/{name}"] = _Number(path, "without", name, modality_heading(name), "without")
    return found


def modality_heading(name: str) -> str:
    return name.upper() if len(name) <= 3 else f"{name[0].upper()}{name[1:]}"


def _what(rows: Sequence[Row]) -> str:
    splits = {row.split for row in rows if row.finished} or {"test"}
    return f"Numbers on {' and '.join(sorted(splits))}"


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"a{index - 25}"


# --- as text


def text_form(paper: PaperTable) -> str:
    """The table as aligned plain text, a block per corpus, with the notes below; no newline at the end."""
    blocks = []
    for corpus, headings, labels, cells in _blocks(paper):
        lines = aligned(["method", *headings], [[paper.heading(label), *(c.plain for c in own)]
                                                for label, own in zip(labels, cells, strict=True)])  # fmt: skip
        blocks.append("\n".join([*([f"{corpus}"] if len(paper.table.corpora) > 1 else []), *lines]))
    return "\n\n".join([*blocks, "\n".join(_sober(paper.notes))])


def _sober(notes: Sequence[str]) -> list[str]:
    """Notes for plain text, which has neither bold nor underlines."""
    return [note for note in notes if not note.startswith("Best of each column")]


def _blocks(paper: PaperTable) -> list[tuple[str, list[str], list[str], list[list[Shown]]]]:
    """(corpus, headings, labels, cells) of every corpus."""
    found = []
    for corpus in paper.table.corpora:
        columns = [column for column in paper.columns if column.corpus == corpus]
        labels = [label for label in paper.labels if any(row.corpus == corpus for row in paper.rows(label))]
        groups = [c.group.removeprefix(corpus).removeprefix(", ") for c in columns]
        headings = [f"{group} {c.heading}".strip() for group, c in zip(groups, columns, strict=True)]
        found.append((corpus, headings, labels, [[paper.shown(label, c) for c in columns] for label in labels]))
    return found


# --- Markdown


def markdown_form(paper: PaperTable) -> str:
    """The table in Markdown, one per corpus; the last column names the runs."""
    parts = [f"**{markdown_safe(paper.caption)}**"]
    for corpus, headings, labels, cells in _blocks(paper):
        if len(paper.table.corpora) > 1:
            parts.append(f"### {markdown_safe(corpus)}")
        rows = [[paper.heading(label), *map(_markdown, own)] for label, own in zip(labels, cells, strict=True)]
        runs = [[run for row in paper.rows(label) if row.corpus == corpus for run in row.runs] for label in labels]
        parts.append("\n".join(markdown_lines(["method", *headings], rows, runs)))
    notes = "\n".join(f"- {markdown_safe(note)}" for note in paper.notes)
    return "\n\n".join([*parts, notes]) + "\n"


def _markdown(cell: Shown) -> str:
    text = f"**{cell.text}**" if cell.best else f"<u>{cell.text}</u>" if cell.second else cell.text
    aside = ", ".join(f"{number} <sup>{mark}</sup>" for number, mark in cell.printed)
    return f"{text} [{aside}]" if aside else text


# --- LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "--", "…": r"\dots{}",
}  # fmt: skip


def latex_safe(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.splitlines()))


def latex_form(paper: PaperTable) -> str:
    r"""A table environment with booktabs; all corpora beside one another. Comments name the runs of every row."""
    columns = paper.columns
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}[t]",
        r"\centering",
        r"\small",
        rf"\caption{{{latex_safe(paper.caption)}}}",
        rf"\label{{tab:{re.sub('[^a-z0-9]+', '-', paper.caption.lower()).strip('-')[:40]}}}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
    ]
    if groups := paper.groups():
        at, cells, rules = 2, [], []
        for text, span in groups:
            cells.append(rf"\multicolumn{{{span}}}{{c}}{{{latex_safe(text)}}}")
            rules.append(rf"\cmidrule(lr){{{at}-{at + span - 1}}}")
            at += span
        lines += [" & ".join(["", *cells]) + r" \\", " ".join(rules)]
    lines += [" & ".join(["Method", *(latex_safe(c.heading) for c in columns)]) + r" \\", r"\midrule"]
    for label in paper.labels:
        names = " ".join(" ".join(run.split()) for row in paper.rows(label) for run in row.runs)  # ends no comment
        cells = [_latex(paper.shown(label, column)) for column in columns]
        lines.append(" & ".join([latex_safe(paper.heading(label)), *cells]) + rf" \\ % {names or 'no finished run'}")
    lines += [r"\bottomrule", r"\end{tabular}", "", r"\vspace{2pt}", r"\begin{minipage}{\linewidth}\footnotesize"]
    lines += [latex_safe(note) for note in paper.notes]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table}"]) + "\n"


def _latex(cell: Shown) -> str:
    text = latex_safe(cell.text)
    if text.startswith("-") and text != DASH:
        text = f"${text[0]}${text[1:]}"
    text = rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.second else text
    aside = ", ".join(rf"{number}\textsuperscript{{{mark}}}" for number, mark in cell.printed)
    return rf"{text} {{\scriptsize [{aside}]}}" if aside else text


# --- CSV


def csv_form(paper: PaperTable) -> str:
    """One line per corpus and label in full precision, with what papers print and where in columns of their own."""
    further: dict[tuple[str, str], dict[str, Any]] = {}
    for (corpus, label, key), values in paper.printed.items():
        own = further.setdefault((corpus, label), {})
        for i, one in enumerate(values, start=1):
            name = f"published_{key.replace('/', '_')}" + (f"_{i}" if i > 1 else "")
            own |= {name: one.value, f"{name}_source": one.source}
    return csv_table(replace(paper.table, columns=paper.table.columns | paper.table.further), further)
