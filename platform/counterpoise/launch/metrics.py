"""A run's metrics through Ray: on a cluster that is there anyway, its nodes' endpoints show them too.

Ray puts `ray_` before every name and adds labels of its own. What is not said again for about 20 s vanishes from its
endpoints, so the driver says everything every few seconds. A cluster that is started for one command has Ray's metrics
switched off: there Prometheus reads the command's own endpoint, as it does without Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from counterpoise.telemetry.catalogue import METRICS

if TYPE_CHECKING:
    from counterpoise.telemetry.emitter import Samples


class RayMetrics:
    """Called with all samples now and then; does nothing while this process has no connection to Ray."""

    def __init__(self) -> None:
        self._session = ""
        self._known: dict[str, Any] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}

    def __call__(self, samples: Samples) -> None:
        import ray
        from ray.util.metrics import Counter, Gauge

        if not ray.is_initialized():
            return
        session = ray.get_runtime_context().get_job_id()
        if session != self._session:  # another connection: the old one's metrics are gone
            self._session, self._known, self._counted = session, {}, {}
        for metric in METRICS:
            for labels, value in samples.get(metric.name, ()):
                if metric.name not in self._known:
                    kind = Counter if metric.kind == "counter" else Gauge
                    self._known[metric.name] = kind(metric.name, metric.help, tag_keys=metric.all_labels)
                tags = dict(zip(metric.all_labels, labels, strict=True))
                if metric.kind == "gauge":
                    self._known[metric.name].set(value, tags=tags)
                elif (more := value - self._counted.get((metric.name, labels), 0.0)) > 0:
                    self._known[metric.name].inc(more, tags=tags)
                    self._counted[metric.name, labels] = value
