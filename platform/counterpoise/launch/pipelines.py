"""The end of what Ray Data runs in this process.

An execution that is left before its end goes on in threads. Asking something of a cluster that is no more, they make
Ray start another one, or end the whole process a minute later without a word.
"""

from __future__ import annotations

import sys
import threading
import time

THREAD = "ray-data"  # of ours that read from an execution
_READERS = (THREAD, "iter_threaded")  # the second are Ray's
_WAIT_S = 30.0


def end_pipelines() -> None:
    """Stop every execution of Ray Data in this process, and wait for the threads that read from one."""
    module = sys.modules.get("ray.data._internal.execution.streaming_executor")
    if module is None:
        return
    end = time.monotonic() + _WAIT_S
    while time.monotonic() < end:
        executor = module.StreamingExecutor
        running = [t for t in threading.enumerate() if isinstance(t, executor) or t.name in _READERS]
        if not running:
            return
        for thread in running:
            if isinstance(thread, executor):
                thread.shutdown(force=True)
        running[-1].join(0.1)
