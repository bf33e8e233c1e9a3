"""The live display: a progress bar on a terminal, plain lines elsewhere.

It reads run folders and nothing else, so it shows runs in this process, in a Ray job and on another machine alike. A
file that is absent or half written is read again later. Everything goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from counterpoise import storage
from counterpoise.contracts import Record
from counterpoise.wording import duration

FUSED = "fused"
LOCAL_POLL_S = 0.3
REMOTE_POLL_S = 5.0
MIN_LINE_S = 1.0  # plain output: epochs that follow one another faster are thinned, decisions never
SILENT_S = 120.0  # a run silent for this long while a later one speaks was killed
ENDED = ("finished", "failed", "interrupted")
STYLES = {"audio": "blue", "visual": "dark_orange3", "text": "green", "image": "yellow", "flow": "magenta"}


# --- lines


def epoch_line(
    record: Record,
    *,
    epochs: int | None = None,
    modalities: Sequence[str] | None = None,
    stages: Sequence[str] = (),
    left_s: float | None = None,
    labels: bool = True,
) -> str:
    """One finished epoch in one line. labels: name the numbers; without, they stand below `epoch_header`.

    stages: names of the run's stages; the epoch's own is shown if there are several.

    Accuracies are on valid where there is such a split, else on train. The gap is shown for two modalities or more.
    """
    cells = _epoch_cells(record, epochs, modalities, stages, left_s)
    if labels:
        return "  ".join(f"{name} {text}".rstrip() for name, text, _ in cells).rstrip()
    return "  ".join(text.rjust(width) for _, text, width in cells).rstrip()


def epoch_header(
    record: Record,
    *,
    epochs: int | None = None,
    modalities: Sequence[str] | None = None,
    stages: Sequence[str] = (),
) -> str:
    """The names of the columns of `epoch_line(..., labels=False)`."""
    cells = _epoch_cells(record, epochs, modalities, stages, 0.0)
    return "  ".join(name.rjust(width) for name, _, width in cells).rstrip()


def _epoch_cells(
    record: Record,
    epochs: int | None,
    modalities: Sequence[str] | None,
    stages: Sequence[str],
    left_s: float | None,
) -> list[tuple[str, str, int]]:
    """Name, text and width of every column."""
    accuracy = accuracy_of(record)
    names = [name for name in (modalities or accuracy) if name != FUSED]
    digits = len(str(epochs or 0))
    count = f"{record.get('epoch', '?')!s:>{digits}}" + (f"/{epochs}" if epochs else "")
    cells = [("epoch", count)]
    if len(set(stages)) > 1:
        cells.append(("stage", str(record.get("stage", "?")).ljust(max(map(len, stages)))))
    cells += [
        ("loss", number(_part(record, "train").get("loss"))),
        (FUSED, number(accuracy.get(FUSED))),
    ]
    if len(names) > 1:
        cells += [(name, number(accuracy.get(name))) for name in names]
        cells.append(("gap", number(record.get("gap"))))
    if classifiers := _mapping(record.get("classifiers")):
        cells.append(("classifiers", "+".join(str(classifiers.get(name, "?")) for name in names)))
    if left_s is not None:
        cells.append(("left", f"{duration(left_s):>6}"))
    return [(name, text, max(len(name), len(text), 5)) for name, text in cells]


def decision_line(record: Record) -> str:
    """One decision in one line, e.g. "epoch 5  classifier added to visual (3 now): ratio 0.620 < 0.990"."""
    inputs = _mapping(record.get("inputs"))
    added = [str(name) for name in record.get("add") or ()]
    now = _mapping(record.get("classifiers"))
    if added:
        what = "classifier added to " + ", ".join(f"{m} ({now[m]} now)" if m in now else m for m in added)
    elif record.get("action") == "assign_classifier":
        what = "no classifier added"
    else:
        what = str(record.get("action") or "decision").replace("_", " ")
        if weights := _mapping(inputs.get("weights")):
            what += ": " + ", ".join(f"{name} {number(value)}" for name, value in weights.items())
    return f"epoch {record.get('epoch', '?')}  {what}" + _because(inputs, added)


def _because(inputs: Mapping[str, Any], added: Sequence[str]) -> str:
    ratios = {m: r for m, r in _mapping(inputs.get("ratios")).items() if isinstance(r, int | float)}
    low = inputs.get("threshold_low")
    if low is None and isinstance(sigma := inputs.get("sigma"), int | float):
        low = sigma - (inputs.get("tau") or 0.0)
    parts = []
    for name in [m for m in added if m in ratios] or list(ratios):
        label = "ratio" if len(added) == 1 else f"ratio of {name}"
        # Two modalities are judged on the ratio of the first, so the second's may lie a hair above the threshold.
        relation = f" < {low:.3f}" if isinstance(low, int | float) and ratios[name] < low else ""
        parts.append(f"{label} {number(ratios[name])}{relation}")
    return f": {', '.join(parts)}" if parts else ""


def start_line(record: Record, name: str = "run") -> str:
    """What is about to run, in one line."""
    parts = [f"{record.get('run', name)}: {record.get('method', '?')} on {record.get('corpus', '?')}"]
    if record.get("seed") is not None:
        parts.append(f"seed {record['seed']}")
    if record.get("epochs"):
        each = f" of {n} batches" if (n := record.get("batches")) else ""
        parts.append(f"{_plural(record['epochs'], 'epoch')}{each}")
    if record.get("workers"):
        parts.append(f"{_plural(record['workers'], 'worker')} on {record.get('device', '?')}")
    return ", ".join(parts)


def end_line(name: str, state: str, summary: Mapping[str, Any] | None = None) -> str:
    """How a run ended, in one line."""
    summary = summary or {}
    split = next((s for s in ("test", "valid", "train") if _mapping(summary.get(s))), "test")
    result = _mapping(summary.get(split))
    accuracy = _mapping(result.get("accuracy"))
    parts = [f"{name} {state}"]
    if summary.get("wall_s") is not None:
        parts[0] += f" in {duration(summary['wall_s'])}"
    if accuracy:
        names = [FUSED, *(n for n in accuracy if n != FUSED)] if len(accuracy) > 2 else [FUSED]
        parts.append(f"{split} accuracy " + "  ".join(f"{n} {number(accuracy.get(n))}" for n in names))
        if len(accuracy) > 2:
            parts[-1] += f"  gap {number(result.get('gap'))}"
    if summary.get("selected_epoch") is not None:
        parts.append(f"epoch {summary['selected_epoch']} selected")
    return ", ".join(parts)


ENDINGS = ("failed", "interrupted")  # shown as the state a run ends in; the command says the reason


def event_line(record: Record) -> str:
    """Anything else that happened, in one line."""
    if record.get("event") == "straggler":
        return (
            f"straggler: rank {record.get('rank', '?')} takes {record.get('step_ms', '?')} ms for a step of its own, "
            f"the others {record.get('others_ms', '?')} ms (step {record.get('step', '?')})"
        )
    free = {k: v for k, v in record.items() if k not in ("seq", "time", "kind", "event")}
    detail = ", ".join(f"{k} {v}" for k, v in free.items())
    return str(record.get("event", "event")).replace("_", " ") + (f": {detail}" if detail else "")


def _plural(n: Any, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def number(value: Any) -> str:
    """Three digits, or a dash for what is no number."""
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _part(record: Record, name: str) -> dict[str, Any]:
    return _mapping(record.get(name))


def accuracy_of(record: Record) -> dict[str, Any]:
    """Accuracies of an epoch: on valid where there is such a split, else on train."""
    return _mapping((_part(record, "valid") or _part(record, "train")).get("accuracy"))


# --- reading a folder that is being written


@dataclass
class Tail:
    """What one run folder has said so far."""

    uri: str
    start: Record = field(default_factory=dict)
    last: Record = field(default_factory=dict)  # the last epoch
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    stale: tuple[Any, Any] | None = None  # state and time of a status that was there before the run went on
    _offset: int = 0  # end of the last whole line read
    _mark: bytes = b""  # that line
    _seen: set[tuple[Any, Any]] = field(default_factory=set)

    @property
    def name(self) -> str:
        return str(self.start.get("run") or self.status.get("run") or self.uri.rstrip("/").rsplit("/", 1)[-1])

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(str(m) for m in self.start.get("modalities") or ())

    @property
    def epochs(self) -> int | None:
        return self.start.get("epochs") or self.status.get("epochs")

    @property
    def columns(self) -> dict[str, Any]:
        """What `epoch_line` and `epoch_header` must know of the run."""
        stages = [str(stage["name"]) for stage in self.start.get("stages") or ()]
        return {"epochs": self.epochs, "modalities": self.modalities, "stages": stages}

    @property
    def state(self) -> str:
        if self.summary is not None:
            return "finished"
        if self.stale is not None and self.stale == (self.status.get("state"), self.status.get("time")):
            return "created"
        return str(self.status.get("state", "absent"))

    def left_s(self, record: Record) -> float | None:
        """Time left after this epoch; the status knows better only if it is about the same epoch or a later one."""
        epoch, epochs = record.get("epoch"), self.epochs
        if not isinstance(epoch, int) or not isinstance(epochs, int):
            return None
        eta = self.status.get("eta_s")
        current = self.state == "running" and self.status.get("epoch") in (epoch, epoch + 1)
        if current and isinstance(eta, int | float) and epoch < epochs:
            return float(eta)
        seconds = record.get("seconds")
        return float(seconds) * (epochs - epoch) if isinstance(seconds, int | float) else None

    def skip_past(self, resuming: bool | None) -> None:
        """Leave out what is there if the run is being resumed; None: judge by its status."""
        status = _parsed(_read(storage.join(self.uri, "status.json")))
        status = status if isinstance(status, dict) else {}
        if resuming is None:
            state, at = status.get("state"), status.get("time")
            silent = isinstance(at, int | float) and time.time() - at > SILENT_S
            resuming = state in ("interrupted", "failed") or (state == "running" and silent)
        if resuming:
            self.poll()
            self.summary, self.stale = None, (status.get("state"), status.get("time"))

    def poll(self) -> list[Record]:
        """Records that came since the last call, in order; `status` is brought up to date."""
        data = _read(storage.join(self.uri, "status.json"))
        if isinstance(status := _parsed(data), dict):
            self.status = status
        return [record for record in self._new_records() if self._take(record)]

    def _new_records(self) -> list[Record]:
        place = storage.join(self.uri, "records.jsonl")
        data = _read_from(place, self._offset - len(self._mark))
        if data is not None and not data.startswith(self._mark):  # cut back and written on, as a resumed run does
            self._offset, self._mark = 0, b""
            data = _read_from(place, 0)
        if data is None:
            return []
        whole = data[len(self._mark) : data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.split(b"\n")
        self._mark = lines[-2] + b"\n" if len(lines) > 1 else self._mark
        return [record for line in lines if isinstance(record := _parsed(line), dict)]

    def _take(self, record: Record) -> bool:
        key = (record.get("seq"), record.get("time"))
        if key in self._seen and key != (None, None):
            return False
        self._seen.add(key)
        kind = record.get("kind")
        if kind == "start":
            self.start = record
        elif kind == "epoch":
            self.last = record
        elif kind == "end":
            self.summary = _mapping(record.get("summary"))
        return True


def _read(uri: str) -> bytes | None:
    try:
        fs, path = storage.filesystem(uri)
        return bytes(fs.cat_file(path))
    except Exception:  # absent, half written, the network: whatever it was, the next poll tries again
        return None


def _read_from(uri: str, offset: int) -> bytes | None:
    """What the file holds from `offset` on; None if it cannot be read now."""
    try:
        fs, path = storage.filesystem(uri)
        fs.invalidate_cache()
        size = int(fs.size(path))
        return bytes(fs.cat_file(path, start=offset, end=size)) if size > offset else b""
    except Exception:  # as above
        return None


def _parsed(data: bytes | None) -> Any:
    try:
        return json.loads(data) if data else None
    except ValueError:
        return None


# --- following


def follow(
    runs: Sequence[str],
    *,
    stop: threading.Event,
    console: Console | None = None,
    interactive: bool | None = None,
    resuming: bool | None = None,
    poll_s: float | None = None,
) -> None:
    """Show runs, one after the other, until all have ended or `stop` is set; then what is left to read is shown.

    interactive: a bar that is updated in place; by default where stderr is a terminal and no CI. resuming: what
    the folders hold already is the past: it is not shown, and an interruption or failure in it does not count. By
    default that is so for runs that were interrupted, have failed, or have not stirred for long.
    """
    console = console or Console(stderr=True, highlight=False)
    show: _Display = _Live(console) if is_interactive(console, interactive) else _Plain(console)
    with show.opened():
        for i, uri in enumerate(runs):
            tail = Tail(uri)
            tail.skip_past(resuming)
            pause = poll_s or (LOCAL_POLL_S if storage.is_local(uri) else REMOTE_POLL_S)
            _follow_one(tail, show, stop, pause, following=runs[i + 1 :])


def is_interactive(console: Console, wish: bool | None) -> bool:
    if wish is not None:
        return wish
    isatty: Callable[[], bool] = getattr(console.file, "isatty", lambda: False)
    return console.is_terminal and isatty() and not console.is_dumb_terminal and not os.environ.get("CI")


def _follow_one(tail: Tail, show: _Display, stop: threading.Event, pause: float, following: Sequence[str]) -> None:
    show.begin(tail)
    while True:
        stopped = stop.is_set()  # asked before reading, so that what was written until then is read
        for record in tail.poll():
            _show(record, show)
        show.refresh()
        if tail.summary is not None or stopped:
            break
        if tail.state in ENDED or _passed_over(tail, following):
            for record in tail.poll():  # the status may be written just before the last record
                _show(record, show)
            break
        stop.wait(pause)
    show.finish(end_line(tail.name, tail.state, tail.summary) if tail.state in ENDED else None)


def _passed_over(tail: Tail, later: Sequence[str]) -> bool:
    """Whether a later run is under way while this one has not started, or has not stirred for long."""
    for uri in later:
        status = _parsed(_read(storage.join(uri, "status.json")))
        if not isinstance(status, dict) or status.get("state") in (None, "created"):
            continue
        if tail.state != "running":
            return True
        theirs, ours = status.get("time"), tail.status.get("time")
        if isinstance(theirs, int | float) and isinstance(ours, int | float) and theirs - ours > SILENT_S:
            return True
    return False


def _show(record: Record, show: _Display) -> None:
    # A display must not end a run because a record is not what it should be; the record is in the file.
    with suppress(TypeError, ValueError, KeyError, AttributeError):
        _show_kind(record, record.get("kind"), show)


def _show_kind(record: Record, kind: Any, show: _Display) -> None:
    if kind == "start":
        show.line(start_line(record, show.tail.name), "bold")
    elif kind == "epoch":
        show.epoch(record)
    elif kind == "decision":
        show.line(decision_line(record), "bold yellow" if record.get("add") else "dim")
    elif kind == "event" and record.get("event") not in ENDINGS:
        show.line(event_line(record), "dim")


class _Display:
    """What both ways of showing share."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tail = Tail("")

    @contextmanager
    def opened(self) -> Iterator[None]:
        yield

    def begin(self, tail: Tail) -> None:
        self.tail = tail

    def line(self, text: str, style: str) -> None:
        raise NotImplementedError

    def epoch(self, record: Record) -> None:
        raise NotImplementedError

    def refresh(self) -> None:
        """Called after every poll."""

    def finish(self, text: str | None) -> None:
        if text is not None:
            self.line(text, "bold")

    def _print(self, text: str, style: str = "") -> None:
        # Names come from folders: no markup, no emoji, and nothing that moves the cursor.
        clean = "".join(c if c.isprintable() else "?" for c in text)
        self.console.print(Text(clean, style), soft_wrap=True, highlight=False)


class _Plain(_Display):
    """One line per epoch and decision. Epochs faster than `MIN_LINE_S` are thinned, the latest is shown."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._shown_at = float("-inf")  # time of the last epoch shown, on the run's clock
        self._held: tuple[str, float, float] | None = None  # line, its time, when it was held back on our clock

    def begin(self, tail: Tail) -> None:
        super().begin(tail)
        self._shown_at = float("-inf")

    def line(self, text: str, style: str) -> None:
        self._release()
        self._print(text)

    def epoch(self, record: Record) -> None:
        left = self.tail.left_s(record)
        text = epoch_line(record, **self.tail.columns, left_s=left)
        at = float(record.get("time") or 0.0)
        self._held = (text, at, time.monotonic())
        if at - self._shown_at >= MIN_LINE_S:
            self._release()

    def refresh(self) -> None:
        if self._held and time.monotonic() - self._held[2] >= MIN_LINE_S:
            self._release()

    def finish(self, text: str | None) -> None:
        self._release()
        super().finish(text)

    def _release(self) -> None:
        if self._held:
            text, self._shown_at, _ = self._held
            self._held = None
            self._print(text)


class _Live(_Display):
    """Lines that stay, and below them two that are updated in place: the bar and the last numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=console.file is sys.stderr,
        )
        self._header_due = True
        self._shown: tuple[Any, ...] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self._live:
            yield

    def begin(self, tail: Tail) -> None:
        super().begin(tail)
        self._header_due = True

    def line(self, text: str, style: str) -> None:
        self._print(text, style)

    def epoch(self, record: Record) -> None:
        if self._header_due:
            self._print(epoch_header(record, **self.tail.columns), "dim")
            self._header_due = False
        self._print(epoch_line(record, **self.tail.columns, left_s=self.tail.left_s(record), labels=False))

    def refresh(self) -> None:
        shown = (self.tail.uri, self.tail.status, self.tail.last)
        if shown == self._shown and self.tail.state not in (
            "absent",
            "created",
        ):  # leave the terminal alone, e.g. while somebody selects text
            return
        self._shown = shown
        with suppress(TypeError, ValueError):  # a status that makes no sense; the next one may
            self._live.update(self._panel(), refresh=True)

    def finish(self, text: str | None) -> None:
        self._shown = None
        self._live.update(Text(""), refresh=True)
        super().finish(text)

    def _panel(self) -> Group:
        tail, status = self.tail, self.tail.status
        epoch, epochs = _whole(status.get("epoch")), _whole(tail.epochs)
        batch, batches = _whole(status.get("batch")), max(_whole(status.get("batches")), 1)
        done = max(epoch - 1, 0) * batches + batch
        bar = Table.grid(padding=(0, 1), expand=True)
        for options in ({"no_wrap": True, "overflow": "ellipsis"}, {"ratio": 1}, {"no_wrap": True}, {"no_wrap": True}):
            bar.add_column(**options)
        waiting = tail.state in ("absent", "created")
        count = "starting" if waiting else f"epoch {epoch}/{epochs}"
        left = "" if waiting else f"{duration(status.get('eta_s'))} left"
        name, method = Text(tail.name, "bold"), str(status.get("method") or tail.start.get("method") or "")
        bar.add_row(
            name if method in tail.name else name.append(f" {method}", "not bold"),
            ProgressBar(total=max(epochs * batches, 1), completed=min(done, epochs * batches), pulse=waiting),
            count,
            left,
        )
        return Group(bar, self._numbers(status))

    def _numbers(self, status: Mapping[str, Any]) -> Text:
        last, text = self.tail.last, Text(no_wrap=True, overflow="ellipsis")
        if not last and status.get("loss") is None:
            return text
        text.append(f"loss {number(status.get('loss'))}")
        accuracy, classifiers = accuracy_of(last), _mapping(last.get("classifiers"))
        text.append(f"  {FUSED} {number(accuracy.get(FUSED))}", "bold")
        if len(self.tail.modalities) > 1:
            for name in self.tail.modalities:
                stack = f" x{classifiers[name]}" if name in classifiers else ""
                text.append(f"  {name}{stack} {number(accuracy.get(name))}", STYLES.get(name, "cyan"))
            text.append(f"  gap {number(last.get('gap'))}")
        rate = status.get("samples_per_s")
        if isinstance(rate, int | float):
            text.append(f"  {rate:.0f} samples/s", "dim")
        return text


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value == value else 0
