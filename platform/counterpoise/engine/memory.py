"""Memory of a worker: kept from step to step on a CPU; and running out of it, said in a way that helps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator

import torch

from counterpoise.config import Experiment
from counterpoise.contracts import CounterpoiseError

_WORDS = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc")
_UNITS = {"": 1, "B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Of torch on the CPU, torch on a GPU, numpy.
_ASKED = re.compile(r"(?:tried to allocate|allocate) ([\d.]+) ?(KiB|MiB|GiB|TiB|bytes|B)?\b", re.IGNORECASE)


# Parameters of glibc's mallopt(3), and the variables by which a user sets them for a process.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_TUNED_BY = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


class OutOfMemoryError(CounterpoiseError):
    """A run needs more memory than there is. Another run may need less, so others go on."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def asked_bytes(error: BaseException) -> int | None:
    """What could not be had, if the error says it."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _UNITS[found[2] or ""]) if found and (found[2] or "") in _UNITS else None


def size(num_bytes: float) -> str:
    """Bytes in words, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def peak_bytes(device: str) -> int:
    """The most memory this process has had: on its GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reuse_memory(device: str) -> None:
    """Let this process, if it computes on a CPU, keep what a step frees for the next one.

    glibc hands large blocks back to the system as soon as they are freed, and gets them anew page by page: for a
    ResNet-18 that is a tenth to a third of a step. The price is gaps between blocks (see docs/speed.md). Left alone:
    other allocators and systems, and whoever has tuned glibc's by its environment variables.
    """
    tuned = any(name in os.environ for name in _TUNED_BY) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device.startswith("cpu") and platform.libc_ver()[0] == "glibc" and not tuned:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def explained(experiment: Experiment, device: str, where: Callable[[], str], workers: int = 1) -> Iterator[None]:
    """Turn a failed allocation into an OutOfMemoryError. It would only come again, so nobody tries again.

    where: says in words where the run is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = asked_bytes(error)
        what = f"{size(asked)} more" if asked is not None else "more"
        compute, remedies = experiment.compute, [f"a smaller batch_size (now {experiment.batch_size})"]
        if compute.parts < 2:
            remedies.append("compute.parts=4, which computes activations again in parts")
        else:
            remedies.append(f"more compute.parts (now {compute.parts})")
        if device.startswith("cuda") and compute.precision != "bf16":
            remedies.append("compute.precision=bf16")
        if workers > 1 and not device.startswith("cuda"):
            remedies.append("fewer workers on this machine")
        if experiment.data.cache != "off":
            remedies.append("data.cache=off")
        place = "the GPU" if device.startswith("cuda") else "this machine"
        raise OutOfMemoryError(
            f"out of memory in {where()}: {what} could not be had, this process has used up to "
            f"{size(peak_bytes(device))} of {place}. Try {', '.join(remedies[:-1])} or {remedies[-1]}"
        ) from error
