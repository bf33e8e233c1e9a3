"""What runs write, handed on while they go on: the way to the metrics, to trackers, and to whatever comes next.

A feed reads run folders, as the display does, in a thread of its own. The run knows nothing of it and never waits for
it; what a sink raises is a warning, once, and that sink gets no more.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from counterpoise import storage
from counterpoise.contracts import Record
from counterpoise.telemetry.display import REMOTE_POLL_S, Tail

POLL_S = 0.5  # as often as a run on local disk writes its status
WAIT_S = 5.0  # the longest that the beginning or the end of a run waits to be read


class Sink(Protocol):
    """Gets what the runs of a feed write. Called from one thread."""

    def begin(self, uri: str, records: Sequence[Record]) -> None:
        """A run is followed from now on. records: those of before, if it is being continued."""
        ...

    def record(self, uri: str, record: Record) -> None:
        """A new record. What a run does again after a restart comes again."""
        ...

    def status(self, uri: str, state: str, status: Mapping[str, Any]) -> None:
        """The content of status.json, whenever it was looked at; state: of the run, see `RunFolder.state`."""
        ...

    def end(self, uri: str) -> None:
        """Nothing more comes of this run for now."""
        ...


class Feed:
    """Follows runs and hands what they write to sinks."""

    def __init__(self, sinks: Sequence[Sink], warn: Callable[[str], None] = lambda text: None) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._tails: dict[str, Tail] = {}
        self._looked: dict[str, float] = {}
        self._orders: queue.SimpleQueue[tuple[str, str, threading.Event]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="feed", daemon=True)
        self._thread.start()

    def follow(self, uri: str, resuming: bool = False) -> None:
        """Follow a run that is about to start, unless it is followed. resuming: what its folder holds is its past."""
        self._order("resume" if resuming else "begin", uri)  # waits, or the first lines might be taken for its past

    def leave(self, uri: str) -> None:
        """The run has ended: read what is left, and follow it no more."""
        self._order("leave", uri)

    def close(self) -> None:
        """End the thread; what is left unread stays so."""
        self._order("close", "")
        self._thread.join(WAIT_S)

    def _order(self, what: str, uri: str) -> None:
        done = threading.Event()
        self._orders.put((what, uri, done))
        done.wait(WAIT_S)

    # --- in the thread

    def _loop(self) -> None:
        while True:
            try:
                what, uri, done = self._orders.get(timeout=POLL_S)
            except queue.Empty:
                for uri in self._tails:
                    pause = POLL_S if storage.is_local(uri) else REMOTE_POLL_S
                    if time.monotonic() - self._looked.get(uri, 0.0) >= 0.9 * pause:
                        self._look(uri)
                continue
            if what in ("begin", "resume") and uri not in self._tails:
                self._begin(uri, what == "resume")
            elif what == "leave" and uri in self._tails:
                self._look(uri)
                del self._tails[uri]
                self._tell("end", uri)
            done.set()
            if what == "close":
                return

    def _begin(self, uri: str, resuming: bool) -> None:
        tail = Tail(uri)
        past = tail.poll() if resuming else []
        if resuming:
            tail.summary, tail.stale = None, (tail.status.get("state"), tail.status.get("time"))
        self._tails[uri] = tail
        self._tell("begin", uri, past)

    def _look(self, uri: str) -> None:
        tail = self._tails[uri]
        for record in tail.poll():
            self._tell("record", uri, record)
        self._looked[uri] = time.monotonic()
        if tail.status and tail.stale != (tail.status.get("state"), tail.status.get("time")):
            self._tell("status", uri, tail.state, tail.status)

    def _tell(self, what: str, *arguments: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, what)(*arguments)
            except Exception as error:  # a view of a run must not end it
                self._sinks.remove(sink)
                name = getattr(sink, "name", type(sink).__name__)
                self._warn(f"{name}: {type(error).__name__}: {error}; it gets no more, the run goes on")


_open: list[Feed] = []


def current() -> Feed | None:
    """The feed that is open in this process, if one is."""
    return _open[-1] if _open else None


@contextmanager
def feeding(sinks: Sequence[Sink], warn: Callable[[str], None] = lambda text: None) -> Iterator[Feed]:
    """A feed to `sinks` for the time of the block; runs that are started in it are followed."""
    feed = Feed(sinks, warn)
    _open.append(feed)
    try:
        yield feed
    finally:
        _open.remove(feed)
        feed.close()


@contextmanager
def following(runs: Mapping[str, bool]) -> Iterator[None]:
    """Let the feed that is open, if one is, follow runs for the time of the block. runs: URI -> whether it resumes."""
    feed = current()
    if feed is None:
        yield
        return
    for uri, resuming in runs.items():
        feed.follow(uri, resuming)
    try:
        yield
    finally:
        for uri in runs:
            feed.leave(uri)
