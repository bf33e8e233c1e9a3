"""Ray's TorchTrainer with two changes. This is the only module that knows insides of Ray Train (2.60)."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from counterpoise.contracts import CounterpoiseError
from counterpoise.launch.worker import WorkerLost

# Helpers of Ray Train that a cluster which ends with the command does without; each is a process to start.
_DISPENSABLE = ("PlacementGroupCleanerCallback", "DatasetsCallback")


class Policy(DefaultFailurePolicy):
    """Workers that died are replaced; an error that a worker reported would only come again."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(f, CounterpoiseError) and not isinstance(f, WorkerLost) for f in failures):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class Steady(FixedScalingPolicy):
    """A cluster that cannot grow need not be asked to; asking takes an actor that must start before the workers."""

    def after_controller_start(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class Trainer(TorchTrainer):
    """trimmed: start no helper process that only matters in a cluster which stays."""

    def __init__(self, *args: Any, trimmed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trimmed = trimmed

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if not (self._trimmed and type(c).__name__ in _DISPENSABLE)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        config: Any = self.run_config.failure_config
        kwargs["failure_policy"] = Policy(config)
        if self._trimmed:
            scaling: Any = self.scaling_config
            kwargs["scaling_policy"] = Steady(scaling)
        return super()._initialize_and_run_controller(**kwargs)  # type: ignore[misc]
