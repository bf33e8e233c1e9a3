"""A progress callback for long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL_S = 5.0


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields a callback (done, total, text) to be called as often as convenient."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int, text: str) -> None:
            nonlocal last
            if done >= total or time.monotonic() - last >= PLAIN_INTERVAL_S:
                last = time.monotonic()
                print(f"{label}: {done} of {total} {text}".rstrip(), file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)

        def draw(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{label} {text}".rstrip())

        yield draw
