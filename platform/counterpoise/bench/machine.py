"""What the measurements share: the machine in words, processes that take turns, and what a process tree uses."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import statistics
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from counterpoise.contracts import CounterpoiseError, ResourceError

SAMPLE_S = 0.05  # between two looks at a tree's memory
START_S = 300.0  # for a process to import what it needs and open its data


def machine() -> dict[str, Any]:
    """The machine, and how busy it is before anything is measured."""
    import psutil
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_line(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']:g} GiB, load {facts['load_before']:g} "
        f"before; Python {facts['python']}, torch {facts['torch']}"
    )


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4])

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def spread_text(spread: Mapping[str, float], digits: int = 2) -> str:
    """1.08 (1.02 to 1.19), of what `Spread.to_json` gave."""
    return "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(d=digits, **spread)


class Tree:
    """A process with all its descendants.

    Memory is the sum of proportional set sizes where the system has them (Linux), so that a page shared by several
    processes counts once; elsewhere of resident set sizes. The page cache is the system's and does not count.
    """

    def __init__(self, pid: int) -> None:
        import psutil

        self._psutil = psutil
        self._process = psutil.Process(pid)

    def _members(self) -> Iterator[Any]:
        with contextlib.suppress(self._psutil.Error):
            yield from [self._process, *self._process.children(recursive=True)]

    def memory_bytes(self) -> int:
        total = 0
        for member in self._members():
            with contextlib.suppress(self._psutil.Error):
                found = member.memory_full_info()
                total += getattr(found, "pss", 0) or found.rss
        return total

    def cpu_s(self) -> float:
        """Seconds of CPU used so far, those of ended children included."""
        total = 0.0
        for member in self._members():
            with contextlib.suppress(self._psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return total


@contextlib.contextmanager
def watched(tree: Tree, over: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Yields a list whose only element is the most memory of the tree seen so far, in bytes. over: told each."""
    peak = [tree.memory_bytes()]
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(SAMPLE_S):
            now = tree.memory_bytes()
            peak[0] = max(peak[0], now)
            if over is not None:
                over(now)

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


class Side:
    """A process of its own that answers one request at a time.

    make: in the new process, called with `spec`; what it returns is called with every request (plain data both ways).
    wait: until it is ready; else `ready` does, for processes that wait for one another.
    """

    def __init__(self, name: str, make: Callable[[Any], Callable[[Any], Any]], spec: Any, *, wait: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, spec), name=name)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.tree = Tree(self._process.pid)
        self.facts: Any = None
        if wait:
            self.ready()

    def ready(self) -> None:
        """Wait until it answers requests."""
        try:
            self.facts = self._answer(START_S)
        except BaseException:
            self.close()
            raise

    def ask(self, request: Any) -> Any:
        self.send(request)
        return self.answer()

    def send(self, request: Any) -> None:
        self._ours.send(request)

    def answer(self) -> Any:
        return self._answer(None)

    def kill(self) -> None:
        """End the process, whatever it is doing; `ask` then raises ResourceError."""
        self._process.kill()

    def _answer(self, timeout_s: float | None) -> Any:
        if not self._ours.poll(timeout_s):
            raise ResourceError(f"{self.name}: not ready after {timeout_s:.0f} s; the machine may be too busy")
        try:
            kind, value = self._ours.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            raise ResourceError(f"{self.name}: its process ended (exit code {self._process.exitcode})") from None
        if kind == "error":
            raise value if isinstance(value, CounterpoiseError) else ResourceError(f"{self.name}: {value}")
        return value

    def close(self) -> None:
        self._ours.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(connection: Any, make: Callable[[Any], Callable[[Any], Any]], spec: Any) -> None:
    """In the process of a side."""
    try:
        answer = make(spec)
        connection.send(("value", getattr(answer, "facts", None)))
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send(("value", answer(request)))
    except CounterpoiseError as error:
        connection.send(("error", error))
    except Exception:
        connection.send(("error", traceback.format_exc()))
