"""Blows that `counterpoise verify` deals to runs of its own: where they land is planned by step, not by the clock.

A worker strikes before it gets the planned batch, after it has written down where it stood; a blow lands once. What a
worker cannot do itself, such as ending the driver, somebody else does while it waits there (`hold`).
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray

from counterpoise import storage
from counterpoise.contracts import Batch, Comm, CounterpoiseError
from counterpoise.engine.run import RunFolder

HOLD_S = 120.0  # a worker that waits for somebody else to act goes on after this
_LOOK_S = 0.1


@dataclass(frozen=True)
class Blow:
    """name: of its files in the run's folder. step: batches of the run before it. rank: of the worker; -1 is the last.

    kind: kill the worker; kill all of Ray on a node that is not `spare` (then its rank is the last one on such a node);
    or hold the run there until it is told to go on.
    """

    name: str
    kind: Literal["worker", "node", "hold"]
    step: int
    rank: int = -1
    spare: str = ""

    def landed(self, run: str) -> str:
        """Where it is written down: epoch, batch, step, rank, host, node, pid, workers and time."""
        return storage.join(run, "logs", f"blow-{self.name}.json")

    def back(self, run: str) -> str:
        """Where it is written down when training went on after it: step, workers and time."""
        return storage.join(run, "logs", f"blow-{self.name}-back.json")

    def go(self, run: str) -> str:
        """What a held worker waits for."""
        return storage.join(run, "logs", f"blow-{self.name}-go")


class Struck:
    """A data source of one worker, with blows between its batches; all else is the source's."""

    def __init__(self, data: Any, run: str, comm: Comm, blows: Sequence[Mapping[str, Any]]) -> None:
        self._data, self._comm = data, comm
        self._folder = RunFolder(run)
        nodes = comm.gather(ray.get_runtime_context().get_node_id())
        nodes = comm.broadcast(nodes)
        self._blows = [Blow(**blow) for blow in blows]
        self._ranks = {blow.name: self._rank(blow, nodes) for blow in self._blows}
        done = comm.broadcast([storage.exists(b.landed(run)) for b in self._blows] if comm.rank == 0 else None)
        self._past = [blow for blow, is_done in zip(self._blows, done, strict=True) if is_done]
        self._due = [blow for blow in self._blows if blow not in self._past]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def _rank(self, blow: Blow, nodes: Sequence[str]) -> int:
        if blow.kind == "node":
            return max((rank for rank, node in enumerate(nodes) if node != blow.spare), default=-1)
        return blow.rank % self._comm.world

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        batches = len(self._data.bounds()) - 1
        for number, batch in enumerate(self._data.train_batches(epoch, start), start):
            step = (epoch - 1) * batches + number
            self._tell_back(step)
            for blow in [b for b in self._due if b.step == step]:
                self._due.remove(blow)
                if self._ranks[blow.name] == self._comm.rank:
                    self._strike(blow, epoch, number, step)
            yield batch

    def _tell_back(self, step: int) -> None:
        past, self._past = self._past, []
        for blow in past if self._comm.rank == 0 else []:
            if not storage.exists(blow.back(self._folder.uri)):
                self._write(blow.back, blow, {"step": step, "workers": self._comm.world, "time": time.time()})

    def _strike(self, blow: Blow, epoch: int, batch: int, step: int) -> None:
        run = self._folder.uri
        where = {"epoch": epoch, "batch": batch, "step": step, "rank": self._comm.rank, "workers": self._comm.world}
        here = {"host": socket.gethostname(), "node": ray.util.get_node_ip_address(), "pid": os.getpid()}
        self._write(blow.landed, blow, {**asdict(blow), **where, **here, "time": time.time()})
        if blow.kind == "hold":
            end = time.monotonic() + HOLD_S
            while not storage.exists(blow.go(run)):
                if time.monotonic() > end:
                    raise CounterpoiseError(f"nobody acted on {blow.name} within {HOLD_S:.0f} s")
                time.sleep(_LOOK_S)
            return
        if blow.kind == "node":
            os.kill(os.getppid(), signal.SIGKILL)  # the raylet; what it has started goes with it
        os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, place: Any, blow: Blow, content: dict[str, Any]) -> None:
        name = place(self._folder.uri).removeprefix(f"{self._folder.uri}/")
        self._folder.write_json(name, content)
