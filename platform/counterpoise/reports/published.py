"""Numbers that papers print (published.yaml), and which of them may stand beside a run's."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from counterpoise.contracts import ConfigError
from counterpoise.reports.records import RunData
from counterpoise.wording import did_you_mean

FILE = "published.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Corpus(_Part):
    classes: int
    test: int | None = None
    settings: dict[str, Any] = {}


class Paper(_Part):
    cite: str
    selects: Literal["valid", "test"]
    settings: bool = False


class Block(_Part):
    """One corpus of a table: a number per column, or none, for every row."""

    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]

    @model_validator(mode="after")
    def _full(self) -> Block:
        if wrong := [label for label, row in self.rows.items() if len(row) != len(self.columns)]:
            raise ValueError(f"{', '.join(wrong)}: not {len(self.columns)} numbers")
        if any(not 0 < value < 1 for row in self.rows.values() for value in row if value is not None):
            raise ValueError("numbers are in 0..1")
        return self


class PrintedTable(_Part):
    paper: str
    table: str
    metric: str
    usual: bool = False
    note: str = ""
    corpora: dict[str, Block]


class Library(_Part):
    corpora: dict[str, Corpus]
    papers: dict[str, Paper]
    tables: dict[str, PrintedTable]

    @model_validator(mode="after")
    def _known(self) -> Library:
        for name, table in self.tables.items():
            if table.paper not in self.papers or set(table.corpora) - set(self.corpora):
                raise ValueError(f"{name}: unknown paper or corpus")
        return self


@dataclass(frozen=True)
class Printed:
    """One number of a paper. source: paper and table."""

    value: float
    source: str


@cache
def library() -> Library:
    text = importlib.resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
    return Library(**yaml.safe_load(text))


def chosen_tables(names: Sequence[str] | None) -> dict[str, PrintedTable]:
    """The tables of these names, or of these papers; None: the usual ones."""
    known = library()
    if names is None:
        return {name: table for name, table in known.tables.items() if table.usual}
    found: dict[str, PrintedTable] = {}
    for name in names:
        some = {key: table for key, table in known.tables.items() if name in (key, table.paper)}
        if not some:
            raise ConfigError(
                f"published: unknown table or paper {name!r}{did_you_mean(name, [*known.tables, *known.papers])} "
                f"(papers: {', '.join(known.papers)}; tables: {', '.join(known.tables)})"
            )
        found |= some
    return found


def corpus_of(runs: Sequence[RunData]) -> str | None:
    """The corpus of papers that these runs are of: by the last part of its place, and its number of classes."""
    for run in runs:
        name, classes = run.corpus_name, len(run.start.get("classes") or ())
        if classes and name in library().corpora:
            return name if library().corpora[name].classes == classes else None
    return None


def printed(corpus: str, label: str, metric: str, column: str, tables: Mapping[str, PrintedTable]) -> list[Printed]:
    """What papers print for one cell."""
    found = []
    for table in tables.values():
        block = table.corpora.get(corpus)
        if block is None or table.metric != metric or column not in block.columns or label not in block.rows:
            continue
        value = block.rows[label][block.columns.index(column)]
        one = None if value is None else Printed(value, source_of(table))
        if one is not None and one not in found:
            found.append(one)
    return found


def source_of(table: PrintedTable) -> str:
    return f"{library().papers[table.paper].cite}, {table.table}"


def differences(corpus: str, runs: Sequence[RunData], tables: Mapping[str, PrintedTable]) -> list[str]:
    """In what these runs differ from the papers whose numbers stand beside theirs, one sentence each."""
    known, notes = library(), []
    papers = {table.paper for table in tables.values() if corpus in table.corpora}
    ours = {_selected_on(run) for run in runs if run.summary} - {None}
    theirs = {known.papers[name].selects for name in papers}
    if ours and theirs and ours != theirs:
        how = "the best epoch on test, which is too high" if theirs == {"test"} else "the best epoch on valid"
        if len(theirs) == 1:
            notes.append(f"Published numbers of {corpus} are those of {how}; ours were selected on {_and(ours)}.")
        else:
            cites = ", ".join(
                sorted(known.papers[name].cite for name in papers if known.papers[name].selects == "test")
            )
            notes.append(
                f"Of the published numbers of {corpus}, those of {cites} are of the best epoch on test, which is too "
                f"high; ours were selected on {_and(ours)}."
            )
    wanted = known.corpora[corpus].settings if any(known.papers[name].settings for name in papers) else {}
    other = []
    for key, value in wanted.items():
        own = {str(run.settings[key]) for run in runs if key in run.settings}
        if own and own != {str(value)}:
            other.append(f"{key.removesuffix('.name')} {_and(own)} (AUG: {value})")
    rows = {n for run in runs if isinstance(n := (run.start.get("samples") or {}).get("test"), int)}
    if (test := known.corpora[corpus].test) and rows and rows != {test}:
        other.append(f"{_and(f'{n:,}' for n in rows)} test rows (published: {test:,})")
    if other:
        notes.append(f"Our runs on {corpus} differ from the published ones: {'; '.join(other)}.")
    return notes + [table.note.strip() for table in tables.values() if corpus in table.corpora and table.note]


def _selected_on(run: RunData) -> str | None:
    selection = str((run.summary or {}).get("selection") or "")
    return next((split for split in ("valid", "test") if selection.startswith(split)), None)


def _and(words: Any) -> str:
    return " and ".join(sorted(map(str, words)))
