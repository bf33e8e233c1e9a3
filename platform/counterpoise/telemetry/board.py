"""The display of a sweep: a table of the trials that run, updated in place on a terminal; plain lines elsewhere.

Like the display of a run it reads run folders, and what it is told by whoever runs the sweep. All goes to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from counterpoise import storage
from counterpoise.contracts import Record
from counterpoise.telemetry.display import (
    FUSED,
    LOCAL_POLL_S,
    REMOTE_POLL_S,
    Tail,
    accuracy_of,
    decision_line,
    end_line,
    is_interactive,
    number,
)
from counterpoise.wording import duration

PLAIN_INTERVAL_S = 30.0  # between two lines that say how far it is
MOST_ROWS = 20


@dataclass
class Row:
    """A trial that runs."""

    label: str
    seed: int
    tail: Tail
    looked: float = float("-inf")


class Board:
    """begin and end trials as they do; refresh often."""

    def __init__(self, root: str, total: int, console: Console | None = None, interactive: bool | None = None) -> None:
        """total: trials of the sweep, those that ended before included."""
        self._root, self._total = root, total
        self._console = console or Console(stderr=True, highlight=False)
        self._rows: dict[str, Row] = {}
        self._poll_s = LOCAL_POLL_S if storage.is_local(root) else REMOTE_POLL_S
        self._said = time.monotonic()
        self._live: Live | None = None
        if is_interactive(self._console, interactive):
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=self._console.file is sys.stderr,
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        if self._live is None:
            yield
            return
        with self._live:
            yield

    def begin(self, name: str, label: str, seed: int) -> None:
        if name in self._rows:
            return
        tail = Tail(storage.join(self._root, name))
        tail.skip_past(None)
        self._rows[name] = Row(label, seed, tail)
        if self._live is None:
            self.line(f"{name} begins")

    def end(self, name: str, state: str, detail: str = "") -> None:
        row = self._rows.pop(name, None)
        summary = None
        if row is not None and state == "finished":
            self._poll(row, force=True)
            summary = row.tail.summary
        text = end_line(name, state, summary) + (f": {detail}" if detail else "")
        self.line(text, "" if state == "finished" else "bold")

    def drop(self, name: str) -> None:
        """A trial that did not begin after all."""
        self._rows.pop(name, None)

    def line(self, text: str, style: str = "") -> None:
        """A line that stays."""
        clean = "".join(c if c.isprintable() else "?" for c in text)
        self._console.print(Text(clean, style), soft_wrap=True, highlight=False)

    def share(self, name: str) -> float:
        """How far a running trial has got, 0..1."""
        row = self._rows.get(name)
        epochs = row.tail.epochs if row else None
        done = row.tail.last.get("epoch", 0) if row else 0
        return min(1.0, done / epochs) if isinstance(epochs, int) and epochs else 0.0

    def refresh(self, ended: int, left_s: float | None) -> None:
        """ended: trials that have ended, of the total."""
        for name, row in self._rows.items():
            for record in self._poll(row):
                self._show(name, record)
        running = f"{len(self._rows)} running" if self._rows else "processes are starting"
        head = f"{ended} of {self._total} trials ended, {running}"
        head += f", about {duration(left_s)} left" if left_s is not None else ""
        if self._live is not None:
            with suppress(TypeError, ValueError):  # a status that makes no sense; the next one may
                self._live.update(Group(self._table(), Text(head, "bold")), refresh=True)
        elif time.monotonic() - self._said > PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            self.line(head)
            for name, row in list(self._rows.items())[:MOST_ROWS]:
                self.line("  " + "  ".join([name, *(text for text in self._numbers(row.tail) if text)]))

    def _poll(self, row: Row, force: bool = False) -> list[Record]:
        if not force and time.monotonic() - row.looked < self._poll_s:
            return []
        row.looked = time.monotonic()
        return row.tail.poll()

    def _show(self, name: str, record: Record) -> None:
        with suppress(TypeError, ValueError, KeyError, AttributeError):  # the record is in the file, whatever it is
            if record.get("kind") == "decision" and record.get("add"):
                self.line(f"{name}  {decision_line(record)}", "yellow")

    def _numbers(self, tail: Tail) -> list[str]:
        """Epoch, accuracy, gap, classifiers."""
        last: Mapping[str, Any] = tail.last
        classifiers = last.get("classifiers") or {}
        return [
            f"epoch {last.get('epoch', 0)}/{tail.epochs or '?'}",
            f"fused {number(accuracy_of(dict(last)).get(FUSED))}",
            f"gap {number(last.get('gap'))}" if last.get("gap") is not None else "",
            f"classifiers {'+'.join(str(classifiers.get(m, '?')) for m in tail.modalities)}" if classifiers else "",
        ]

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("trial", "seed", "epoch", "fused", "gap", "classifiers", "state"):
            right = heading in ("seed", "epoch", "fused", "gap")
            table.add_column(heading, justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        for row in list(self._rows.values())[:MOST_ROWS]:
            cells = [text.rpartition(" ")[2] for text in self._numbers(row.tail)]
            state = row.tail.state
            state = "starting" if state in ("absent", "created") else state
            table.add_row(row.label or "run", str(row.seed), *cells, state)
        if len(self._rows) > MOST_ROWS:
            table.add_row(f"... and {len(self._rows) - MOST_ROWS} more")
        return table
