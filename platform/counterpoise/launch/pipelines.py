"""The end of what Ray Data runs in this process.

An execution that is left before its end goes on in threads. Asking something of a cluster that is no more, they make
Ray start another one, or end the whole process a minute later without a word.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection
from typing import Any

THREAD = "ray-data"  # of ours that read from an execution
_READERS = (THREAD, "iter_threaded")  # the second are Ray's
_WAIT_S = 30.0


def pipelines() -> list[threading.Thread]:
    """The threads of this process that execute a pipeline or read from one."""
    return [thread for thread in threading.enumerate() if thread.name in _READERS or _executes(thread)]


def _executes(thread: threading.Thread) -> bool:
    module = sys.modules.get("ray.data._internal.execution.streaming_executor")
    return module is not None and isinstance(thread, module.StreamingExecutor)


def end_pipelines(spared: Collection[threading.Thread] = ()) -> None:
    """Stop the executions of Ray Data in this process, and wait for the threads that read from them.

    spared: threads that go on, of somebody else's executions.
    """
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        running: list[Any] = [thread for thread in pipelines() if thread not in spared]
        if not running:
            return
        for thread in running:
            if _executes(thread):
                thread.shutdown(force=True)
        running[-1].join(0.1)
