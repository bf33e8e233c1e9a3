"""`counterpoise watch`: how runs stand, drawn from their folders on disk or in object storage, live or ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from counterpoise import storage
from counterpoise.contracts import DataError
from counterpoise.engine.run import RunFolder, find_runs
from counterpoise.telemetry.display import (
    ENDINGS,
    FUSED,
    SILENT_S,
    STYLES,
    Tail,
    decision_line,
    end_line,
    epoch_line,
    event_line,
    start_line,
)
from counterpoise.telemetry.state import RunState
from counterpoise.wording import duration

LOCAL_S, REMOTE_S = 1.0, 10.0  # between two looks
FIND_S = 5.0  # between two searches for new runs
SETTLE_S = 20.0  # a folder in which nothing runs for so long is done
WIDTH = 40  # of a curve at most
DECISIONS, EVENTS = 8, 4  # the latest that are shown
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
ENDED = ("finished", "stopped", "failed", "interrupted")
STATE_STYLES = {"running": "green", "failed": "red", "interrupted": "yellow", "stopped": "yellow", "finished": "bold"}


@dataclass
class Watched:
    """A run that is looked at."""

    uri: str
    tail: Tail
    folder: RunFolder
    state: RunState = field(default_factory=RunState)
    said: str = ""  # the state that plain output has told of

    @classmethod
    def of(cls, uri: str) -> Watched:
        return cls(uri, Tail(uri), RunFolder(uri))

    def look(self) -> list[dict[str, Any]]:
        """Bring it up to date; the records that came."""
        new = self.tail.poll()
        for record in new:
            with suppress(
                TypeError, ValueError, KeyError, AttributeError
            ):  # one that makes no sense; it is in the file
                self.state.take(record)
        with suppress(TypeError, ValueError):
            self.state.take_status(self.folder.state(), self.tail.status)
        return new

    def past(self) -> list[dict[str, Any]]:
        """What happened before we looked, in order; what was done again is there once."""
        state = self.state
        records = [state.start, *state.epochs.values(), *state.decisions, *state.events]
        return sorted((record for record in records if record), key=lambda record: record.get("seq", 0))

    @property
    def ended(self) -> bool:
        return self.state.state in ENDED


def watch_runs(places: Sequence[str], *, once: bool = False, interval_s: float | None = None) -> None:
    """Show runs until all have ended; once: as they stand now. On a terminal in place, elsewhere line by line.

    Raises DataError if there are none.
    """
    console = Console(highlight=False)
    runs = {uri: Watched.of(uri) for uri in find_runs(places)}
    if not runs:
        raise DataError(
            f"no runs in {', '.join(storage.show(place) for place in places)}; name a run folder, or a folder of runs"
        )
    for run in runs.values():
        run.look()
    if once:
        console.print(_view(list(runs.values()), console, limit=False))
        return
    remote = not all(storage.is_local(uri) for uri in runs)
    pause = interval_s or (REMOTE_S if remote else LOCAL_S)
    with suppress(KeyboardInterrupt):  # looking ends, nothing else does
        if console.is_terminal and not console.is_dumb_terminal:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                live.update(_view(list(runs.values()), console), refresh=True)
                for _ in _looks(runs, places, pause):
                    live.update(_view(list(runs.values()), console), refresh=True)
            console.print(_view(list(runs.values()), console, limit=False))
        else:
            for run in runs.values():
                _say(run, run.past(), several=len(runs) > 1)
            for news in _looks(runs, places, pause):
                for run, records in news:
                    _say(run, records, several=len(runs) > 1)


def _looks(
    runs: dict[str, Watched], places: Sequence[str], pause: float
) -> Iterator[list[tuple[Watched, list[dict[str, Any]]]]]:
    """What was found in every look, until all runs have ended; new runs are taken in."""
    single = set(runs) == {place.rstrip("/") for place in places}
    found = busy = time.monotonic()
    looks = 0
    while True:
        now = time.monotonic()
        if not all(run.ended for run in runs.values()):
            busy = now
        elif single or now - busy > SETTLE_S:
            return
        time.sleep(pause)
        looks += 1
        if not single and now - found > FIND_S:
            found = now
            runs |= {uri: Watched.of(uri) for uri in find_runs(places) if uri not in runs}
        # Those that have ended are looked at now and then: somebody may go on with them.
        yield [(run, run.look()) for run in runs.values() if not run.ended or looks % 10 == 0]


# --- lines


def _say(run: Watched, news: Sequence[dict[str, Any]], several: bool) -> None:
    before = f"{run.tail.name}  " if several else ""
    for record in news:
        with suppress(TypeError, ValueError, KeyError, AttributeError):
            if text := _line(run, record):
                print(_clean(before + text), flush=True)
    if run.ended and run.said != run.state.state:
        print(_clean(end_line(run.tail.name, run.state.state, run.tail.summary)), flush=True)
    run.said = run.state.state


def _line(run: Watched, record: dict[str, Any]) -> str:
    kind = record.get("kind")
    if kind == "start":
        return start_line(record, run.tail.name)
    if kind == "epoch":
        return epoch_line(record, **run.tail.columns, left_s=run.tail.left_s(record))
    if kind == "decision":
        return decision_line(record)
    if kind == "event" and record.get("event") not in ENDINGS:
        return event_line(record)
    return ""


def _clean(text: str) -> str:
    """Names come from folders: nothing that moves the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


# --- pictures


def _view(runs: Sequence[Watched], console: Console, limit: bool = True) -> RenderableType:
    if len(runs) == 1:
        return picture(runs[0], console)
    return overview(runs, console, console.height - 4 if limit else None)


def curve(values: Sequence[float | None], low: float, high: float, width: int = WIDTH, bars: str = BARS) -> str:
    """Values as a row of bars between low and high; of more than `width` the last of each stretch."""
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    span = high - low
    text = ""
    for value in values:
        if value is None or value != value:
            text += " "
        else:
            share = (value - low) / span if span > 0 else 0.5
            text += bars[min(len(bars) - 1, max(0, int(share * len(bars))))]
    return text


def _bars(console: Console) -> str:
    return BARS if "utf" in console.encoding.lower() else PLAIN_BARS


def picture(run: Watched, console: Console, now: float | None = None) -> Group:
    """One run. now: the time by which ages are told; default: of this machine."""
    state, tail = run.state, run.tail
    now = time.time() if now is None else now
    parts: list[RenderableType] = [_title(run, now), *_progress(run, console)]
    if state.epochs:
        parts += ["", *_accuracies(state, console)]
        if len(state.modalities) > 1:
            parts += ["", *_scores(state, console)]
    if state.decisions:
        parts += ["", *_lines("decisions", [decision_line(d) for d in state.decisions], DECISIONS, "yellow")]
    events = [event_line(e) for e in state.events if e.get("event") not in ENDINGS]
    if events:
        parts += ["", *_lines("events", events, EVENTS, "dim")]
    facts = _facts(state, now)
    if facts:
        parts += ["", *facts]
    if state.state == "failed" and state.status.get("error"):
        parts += ["", Text(_clean(f"failed: {state.status['error']}"), "red")]
    if tail.summary is not None:
        parts += ["", Text(_clean(end_line(tail.name, "finished", tail.summary)), "bold")]
    return Group(*parts)


def _title(run: Watched, now: float) -> Text:
    state, start = run.state, run.state.start
    text = Text(_clean(run.tail.name), "bold")
    method, corpus = start.get("method") or state.status.get("method", "?"), start.get("corpus", "?")
    seed = f", seed {start['seed']}" if start.get("seed") is not None else ""
    text.append(_clean(f"  {method} on {corpus}{seed}  "), "not bold")
    text.append(state.state, STATE_STYLES.get(state.state, "dim"))
    at = state.status.get("time")
    if state.state == "running" and isinstance(at, int | float) and now - at > SILENT_S:
        text.append(f", silent for {duration(now - at)}", "yellow")
    return text


def _progress(run: Watched, console: Console) -> list[RenderableType]:
    state, status = run.state, run.state.status
    epoch, epochs, share = status.get("epoch"), state.num_epochs, state.progress()
    if state.state == "finished" or epoch is None or not epochs:
        return []
    words = [f"epoch {epoch}/{epochs}"]
    if status.get("batches"):
        words.append(f"batch {status.get('batch', 0)}/{status['batches']}")
    if isinstance(status.get("loss"), int | float):
        words.append(f"loss {status['loss']:.3f}")
    if share is not None:
        words.append(f"{share:.0%} done")
    if state.state == "running" and isinstance(status.get("eta_s"), int | float):
        words.append(f"{duration(status['eta_s'])} left")
    row = Table.grid(padding=(0, 2, 0, 0))
    bar = [ProgressBar(total=1.0, completed=share, width=WIDTH)] if share is not None and console.is_terminal else []
    row.add_row(*bar, Text(", ".join(words)))
    return [row]


def _grid() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=8)
    return table


def _accuracies(state: RunState, console: Console) -> list[RenderableType]:
    """Fused and single accuracies on one axis, and the gap on its own from 0."""
    epochs = sorted(state.epochs)
    names = [FUSED, *(state.modalities if len(state.modalities) > 1 else ())]
    found = [_accuracy(state.epochs[e]) for e in epochs]
    values = {name: [_value(accuracy.get(name)) for accuracy in found] for name in names}
    known = [v for own in values.values() for v in own if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    table = _grid()
    for name, own in values.items():
        style = "bold" if name == FUSED else STYLES.get(name, "cyan")
        _curve_row(table, name, own, epochs, low, high, style, console, best=max)
    gap = ""
    if len(names) > 2:
        gaps = [_value(state.epochs[e].get("gap")) for e in epochs]
        top = max((gap for gap in gaps if gap is not None), default=1.0)
        _curve_row(table, "gap", gaps, epochs, 0.0, top, "", console, best=min)
        gap = f", of the gap from 0 to {top:.3f}"
    span = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    split = "valid" if state.last.get("valid") else "train"
    return [Text(f"accuracy on {split}, {span}; bars from {low:.3f} to {high:.3f}{gap}", "dim"), table]


def _curve_row(
    table: Table,
    name: str,
    values: Sequence[float | None],
    epochs: Sequence[int],
    low: float,
    high: float,
    style: str,
    console: Console,
    best: Any,
) -> None:
    known = [(value, epoch) for value, epoch in zip(values, epochs, strict=True) if value is not None]
    now = f"{values[-1]:.3f}" if values[-1] is not None else "-"
    found = best(known, key=lambda pair: pair[0]) if known else None
    table.add_row(
        Text(_clean(name), style),
        Text(curve(values, low, high, bars=_bars(console)), style),
        now,
        Text(f"best {found[0]:.3f} in epoch {found[1]}" if found else "", "dim"),
    )


def _scores(state: RunState, console: Console) -> list[RenderableType]:
    """Scores on train, their ratios to the others, and what the thresholds say to that."""
    ratios, bounds, stacks = state.score_ratios(), state.thresholds(), state.classifiers()
    if not ratios:
        return []
    epochs = sorted(state.epochs)
    words = "scores on train, bars from 0 to 1, and their ratio to the others"
    if bounds:
        words += f"; balanced from {bounds['low']:.3f} to {bounds['high']:.3f}"
    table = _grid()
    for name, ratio in ratios.items():
        scores = [_value(((state.epochs[e].get("train") or {}).get("score") or {}).get(name)) for e in epochs]
        verdict = ""
        if bounds:
            below, above = ratio < bounds["low"], ratio > bounds["high"]
            verdict = "lags behind" if below else "is ahead" if above else "balanced"
        n = stacks.get(name)
        table.add_row(
            Text(_clean(name), STYLES.get(name, "cyan")),
            Text(curve(scores, 0.0, 1.0, bars=_bars(console)), STYLES.get(name, "cyan")),
            f"{scores[-1]:.3f}" if scores[-1] is not None else "-",
            f"ratio {ratio:.3f}",
            Text(verdict, "yellow" if verdict == "lags behind" else ""),
            "" if n is None else f"{n} classifier{'s' if n != 1 else ''}",
        )
    return [Text(words, "dim"), table]


def _lines(title: str, lines: Sequence[str], most: int, style: str) -> list[RenderableType]:
    hidden = len(lines) - most
    head = f"{title}, the last {most} of {len(lines)}" if hidden > 0 else title
    return [Text(head, "dim"), *(Text(_clean("  " + line), style) for line in lines[-most:])]


def _facts(state: RunState, now: float) -> list[RenderableType]:
    """Speed and checkpoints."""
    status, lines = state.status, []
    seconds, waited = _value(status.get("train_s")), _value(status.get("data_wait_s"))
    if seconds is None:  # a run of an older version
        seconds = sum(_value(record.get("seconds")) or 0.0 for record in state.epochs.values())
        waited = sum(_value(record.get("data_wait_s")) or 0.0 for record in state.epochs.values())
    rate = _value(status.get("samples_per_s")) or _value(state.last.get("samples_per_s"))
    parts = [f"{rate:,.0f} samples/s"] if rate else []
    if seconds and status.get("step"):
        parts.append(f"{1000 * seconds / status['step']:.1f} ms per step")
    if seconds and waited is not None:
        parts.append(f"{waited / seconds:.0%} of it waiting for data")
    if workers := state.start.get("workers"):
        parts.append(f"{workers} worker{'s' if workers != 1 else ''} on {state.start.get('device', '?')}")
    if parts:
        lines.append("speed       " + ", ".join(parts))
    own = [value for value in map(_value, status.get("rank_step_s") or ()) if value is not None]
    if len(own) > 1:
        slow, quick = own.index(max(own)), own.index(min(own))
        lines.append(
            f"workers     rank {slow} takes {1000 * own[slow]:.1f} ms for a step of its own, "
            f"rank {quick} {1000 * own[quick]:.1f} ms"
        )
    kept = status.get("checkpoint")
    if isinstance(kept, dict) and _value(kept.get("time")) is not None:
        text = f"checkpoint  at step {kept.get('step', '?')}, written in {_value(kept.get('seconds')) or 0.0:.2f} s"
        lines.append(text + (f", {duration(max(0.0, now - kept['time']))} ago" if state.state == "running" else ""))
    return [Text(_clean(line)) for line in lines]


def overview(runs: Sequence[Watched], console: Console, rows: int | None = None) -> RenderableType:
    """Several runs, a line each; those that run first, then the others. rows: how many there is room for."""
    ranked = sorted(runs, key=lambda run: run.state.state != "running")
    shown = ranked if rows is None else ranked[: max(rows, 3)]
    names = _short_names(ranked)
    lines = [_overview_row(run, names[run.uri], console) for run in shown]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = ["run", "method", "state", "epoch", "left", FUSED, "", "gap", "classifiers", "modalities"]
    widths = [max(len(column), *(len(line[i]) for line in lines)) for i, column in enumerate(columns)]
    room = console.width - sum(width + 2 for width in widths)
    if room < 0:  # what the picture of one run shows too
        columns.pop()
        room += widths.pop() + 2
    for column, width in zip(columns, widths, strict=True):
        least = max(12, width + room) if column == "run" else width
        table.add_column(column, no_wrap=True, min_width=min(width, least), overflow="ellipsis")
    for line in lines:
        table.add_row(*line[: len(columns)])
    counts = {name: sum(run.state.state == name for run in runs) for name in ("running", "created", *ENDED)}
    words = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    if len(shown) < len(ranked):
        words += f"; {len(ranked) - len(shown)} more are not shown"
    return Group(table, Text(words, "dim"))


def _overview_row(run: Watched, name: str, console: Console) -> list[Text]:
    state, last = run.state, run.state.last
    own = [_value(_accuracy(state.epochs[e]).get(FUSED)) for e in sorted(state.epochs)]
    accuracy = _accuracy(last)
    single = [f"{m} {accuracy[m]:.3f}" for m in state.modalities if _value(accuracy.get(m)) is not None]
    several = len(state.modalities) > 1
    eta = state.status.get("eta_s")
    return [
        Text(_clean(name), "bold"),
        Text(_clean(str(state.start.get("method") or state.status.get("method") or "?"))),
        Text(state.state, STATE_STYLES.get(state.state, "dim")),
        Text(f"{last.get('epoch', 0)}/{state.num_epochs or '?'}"),
        Text(duration(eta) if state.state == "running" and isinstance(eta, int | float) else ""),
        Text(f"{own[-1]:.3f}" if own and own[-1] is not None else "-"),
        Text(curve(own, 0.0, 1.0, width=12, bars=_bars(console))),
        Text(f"{last['gap']:.3f}" if several and _value(last.get("gap")) is not None else ""),
        Text("+".join(map(str, state.classifiers().values()))),
        Text(_clean("  ".join(single)) if several else ""),
    ]


def _short_names(runs: Sequence[Watched]) -> dict[str, str]:
    """Names of runs; with their folder's name where a name alone is not enough."""
    names = [run.uri.rsplit("/", 1)[-1] for run in runs]
    folders = {run.uri.rsplit("/", 1)[0] for run in runs}
    if len(folders) == 1:
        return {run.uri: name for run, name in zip(runs, names, strict=True)}
    return {run.uri: "/".join(run.uri.split("/")[-2:]) for run in runs}


def _accuracy(record: dict[str, Any]) -> dict[str, Any]:
    found = (record.get("valid") or record.get("train") or {}).get("accuracy")
    return dict(found) if isinstance(found, dict) else {}


def _value(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
