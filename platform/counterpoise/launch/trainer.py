"""Ray's TorchTrainer as training needs it. This is the only module that knows insides of Ray Train (2.60).

A group of workers ends before its time because workers died, because it is to go on elsewhere (`Moved`), or because of
an error that would only come again. In the first two cases another group starts where there is room: with as many
workers as were asked for, or, if fewer will do, with as many as there is room for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy, _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from counterpoise.contracts import CounterpoiseError, Moved, ResourceError
from counterpoise.launch import room
from counterpoise.launch.worker import AFTER, WorkerLost

SETTLE_S = 3.0  # what an ended group held is free again after about so long; until then more may come
_LOOK_S = 0.3
# Helpers of Ray Train, each a process to start. We hand it no datasets. Placement groups of a driver that dies go with
# its job; the cleaner is for controllers that die while their job lives on, as those of trials that Tune ends do, and
# stays behind for ever where a driver was killed.
_DATASETS, _CLEANER = "DatasetsCallback", "PlacementGroupCleanerCallback"


class Policy(DefaultFailurePolicy):
    """Workers that died are replaced, `max_failures` times; an error that a worker reported would only come again.

    A group that moves costs nothing, nor does a node that was taken away with notice.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lost: list[str] = []  # what died, in order
        self.starved = 0  # deaths by Ray's memory monitor
        self.after = ""  # why the next group starts
        self.workers: dict[int, str] = {}  # where each rank was

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        failures: Mapping[int, Exception] = getattr(training_failed_error, "worker_failures", {})
        cause = getattr(training_failed_error, "controller_failure", None)
        own = [f for f in (*failures.values(), cause) if isinstance(f, CounterpoiseError)]
        if moved := next((f for f in own if isinstance(f, Moved)), None):
            self.after = moved.why
            return FailureDecision.RETRY
        if any(not isinstance(f, WorkerLost) for f in own):
            return FailureDecision.RAISE
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            return FailureDecision.RETRY  # how long to wait for room is not decided here
        if cause is not None and not isinstance(cause, RayError | WorkerGroupStartupFailedError):
            return FailureDecision.RAISE
        self.after = self._what_died(failures, cause)
        if _is_preemption_failure(training_failed_error):
            return FailureDecision.RETRY
        self.lost.append(self.after)
        self.starved += any(isinstance(failure, OutOfMemoryError) for failure in failures.values())
        if self.starved > 1:  # the others may have left by now, but twice is no accident
            return FailureDecision.RAISE
        most = self.failure_config.max_failures
        return FailureDecision.RETRY if most < 0 or len(self.lost) <= most else FailureDecision.RAISE

    def _what_died(self, failures: Mapping[int, Exception], cause: Any) -> str:
        if cause is not None:
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            return f"workers did not start ({line})"
        dead = [rank for rank, failure in sorted(failures.items()) if not isinstance(failure, WorkerLost)]
        if not dead:
            return "the connection between workers broke"
        return ", ".join(f"worker {r} on {self.workers.get(r, '?')} died" for r in dead[:4]) + (
            f" and {len(dead) - 4} more" if len(dead) > 4 else ""
        )


class Room(ScalingPolicy):
    """A group starts where there is room for it: for `most` workers at once, for fewer (at least `least`) when no more
    come for a while, and for none when `wait_s` are over.

    autoscaler: tell Ray's autoscaler what is wanted; asking takes an actor that must start before the workers.
    """

    def __init__(self, config: Any, least: int, most: int, wait_s: float, autoscaler: bool) -> None:
        super().__init__(config)
        self.least, self.most, self.wait_s, self.autoscaler = least, most, wait_s, autoscaler
        self._since: float | None = None  # when a group was first wanted

    def _get_num_workers_for_resource_request(self) -> int:
        return self.most

    def after_controller_start(self, *args: Any, **kwargs: Any) -> None:
        if self.autoscaler:
            super().after_controller_start(*args, **kwargs)

    def _maybe_send_resource_request(self) -> None:
        if self.autoscaler:
            super()._maybe_send_resource_request()

    def make_decision_for_running_worker_group(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_send_resource_request()
        self._since = None
        return NoopDecision()  # a group that should grow ends itself, with a checkpoint (`worker.py`)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._maybe_send_resource_request()
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        need = self.scaling_config._resources_per_worker_not_none
        # Ray would go on placing workers on a node that has just gone.
        count = 0 if (gone := room.silent()) else room.fitting(room.free(), need, self.most, room.totals())
        if count >= self.most or (count >= self.least and now - self._since >= SETTLE_S):
            return ResizeDecision(num_workers=count, resources_per_worker=need)
        if now - self._since > self.wait_s:
            wanted = f"{self.least} workers" if self.least == self.most else f"{self.least} to {self.most} workers"
            each = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
            missing = f"; {', '.join(gone)} did not answer" if gone else ""
            raise ResourceError(
                f"waited {self.wait_s:.0f} s for room for {wanted} ({each} each, and a CPU for reading), and the Ray "
                f"cluster has room for {count}{missing}; the last checkpoint is kept: add nodes, or use fewer "
                "--workers (or --min-workers), and continue with --resume"
            )
        time.sleep(_LOOK_S)
        return NoopDecision()


class Group(WorkerGroup):
    """Ray leaves workers and their place behind if they cannot be connected after they have started."""

    def _start(self) -> None:
        try:
            super()._start()
        except Exception:
            if self.has_started():
                _end(self)
            raise


def _end(group: WorkerGroup) -> None:
    """End workers without asking those that are alive to take leave of those that are dead."""
    with contextlib.suppress(Exception):  # some of them cannot be asked
        group.abort()


class Controller(TrainController):
    """Frees what a group held before it looks for room for the next, and tells that one what happened."""

    worker_group_cls = Group
    _nodes: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed): of the group before, address by id

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        if self._worker_group is not None:
            _end(self._worker_group)
            self._worker_group = None
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        policy: Any = self._failure_policy
        after = policy.after
        if gone := self._gone(policy.workers):
            after = f"{after}; {gone}" if after else gone
        environment = {**(self._run_config.worker_runtime_env or {})}
        environment["env_vars"] = {**environment.get("env_vars", {}), AFTER: after}
        self._run_config.worker_runtime_env = environment
        super()._start_worker_group(num_workers, resources_per_worker)
        group: Any = self._worker_group
        self._nodes = {w.metadata.node_id: w.metadata.node_ip for w in group.get_workers()}
        policy.workers = {w.distributed_context.world_rank: w.metadata.node_ip for w in group.get_workers()}

    def _gone(self, workers: Mapping[int, str]) -> str:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        gone = [ip for node, ip in self._nodes.items() if node not in alive]
        if not gone:
            return ""
        return f"node {gone[0]} is gone" if len(gone) == 1 else f"nodes {', '.join(gone)} are gone"

    def lost(self) -> list[str]:
        """What died, in order."""
        policy: Any = self._failure_policy
        return list(policy.lost)


@dataclass
class Connection(TorchConfig):
    """Workers of torch.distributed who listen where the others of the cluster can reach them."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """gloo listens where the host's name points to, which on many hosts is loopback; take Ray's address instead."""
    import psutil

    address = ray.util.get_node_ip_address()
    for name, known in psutil.net_if_addrs().items():
        if any(one.address == address for one in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class Trainer(TorchTrainer):
    """least, most: workers. wait_s: for room for them. trimmed: start no helper process that only matters in a cluster
    which stays. lost: gets what died, in order."""

    def __init__(
        self,
        *args: Any,
        least: int,
        most: int,
        wait_s: float,
        lost: list[str],
        trimmed: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._least, self._most, self._wait_s, self._lost, self._trimmed = least, most, wait_s, lost, trimmed

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        in_actor = ray.get_runtime_context().get_actor_id() is not None
        dispensable = (_DATASETS,) if in_actor and not self._trimmed else (_DATASETS, _CLEANER)
        return [c for c in callbacks if type(c).__name__ not in dispensable]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        """As Ray's, with our controller."""
        scaling: Any = self.scaling_config
        failure: Any = self.run_config.failure_config
        kwargs["failure_policy"] = Policy(failure)
        kwargs["scaling_policy"] = Room(scaling, self._least, self._most, self._wait_s, autoscaler=not self._trimmed)
        raylet: Any = ray._raylet
        here = {raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        # Its methods wait for one another in a thread, as Ray's own do not mind.
        environment = {**get_env_vars_to_propagate(), "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        actor: Any = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})(Controller)
        controller = actor.remote(**kwargs)
        ray.get(controller.run.remote())
        result = ray.get(controller.get_result.remote())
        self._lost += ray.get(controller.lost.remote())
        return result
