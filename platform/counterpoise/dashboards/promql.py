"""PromQL of the dashboards: which series an expression asks for, and what it is with variables filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from counterpoise.contracts import ResourceError
from counterpoise.telemetry.catalogue import METRICS

# Series of others that panels name, with the labels they group or select by. Ray: 2.60's metrics agent and its train
# and data libraries; node_*: node-exporter; DCGM_*: NVIDIA's DCGM exporter.
FOREIGN: dict[str, frozenset[str]] = {
    name: frozenset(labels.split())
    for name, labels in {
        "up": "job instance host session",
        "ALERTS": "alertname alertstate severity run corpus method instance job",
        "ray_node_cpu_utilization": "instance SessionName",
        "ray_node_mem_used_host": "instance SessionName",
        "ray_node_mem_total_host": "instance SessionName",
        "ray_node_gpus_utilization": "instance SessionName GpuIndex",
        "ray_node_gram_used": "instance SessionName GpuIndex",
        "ray_node_gram_available": "instance SessionName GpuIndex",
        "ray_object_store_memory": "instance SessionName Location",
        "ray_data_iter_total_blocked_seconds": "dataset",
        "node_cpu_seconds_total": "instance cpu mode",
        "node_memory_MemAvailable_bytes": "instance",
        "node_memory_MemTotal_bytes": "instance",
        "node_filesystem_avail_bytes": "instance device fstype mountpoint",
        "node_filesystem_size_bytes": "instance device fstype mountpoint",
        "node_network_receive_bytes_total": "instance device",
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE": "Hostname gpu instance",
        "DCGM_FI_DEV_FB_USED": "Hostname gpu instance",
        "DCGM_FI_DEV_FB_FREE": "Hostname gpu instance",
        "DCGM_FI_DEV_GPU_TEMP": "Hostname gpu instance",
    }.items()
}
RECORDED = {"counterpoise:data_wait_share:rate5m": frozenset(("run", "corpus", "method"))}
OF_TARGET = frozenset(("job", "instance", "host", "session"))

_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")


def known_series() -> dict[str, frozenset[str]]:
    """Labels of every series that an expression may name."""
    return {m.name: frozenset(m.all_labels) | OF_TARGET for m in METRICS} | RECORDED | FOREIGN


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with Grafana's variables replaced. Unknown ones stay, so that a parser complains."""
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[2], found[0]), text)


def usual_values(step_s: int = 15, range_s: int = 900) -> dict[str, str]:
    """Grafana's own variables as it would fill them."""
    return {"__rate_interval": f"{max(4 * 5, step_s + 5)}s", "__interval": f"{step_s}s", "__range": f"{range_s}s"}


@dataclass(frozen=True)
class Use:
    """An expression and where it stands: dashboard, panel, field."""

    where: str
    expr: str


def panels_of(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels, those in closed rows included; rows come before their panels."""
    for panel in dashboard.get("panels", []):
        yield panel
        yield from panel.get("panels") or []


def uses(dashboard: Mapping[str, Any]) -> Iterator[Use]:
    """Every expression of a dashboard: panels, annotations, and the selectors of its variables."""
    name = dashboard["title"]
    for panel in panels_of(dashboard):
        for target in panel.get("targets", []):
            yield Use(f"{name}: panel {panel['title']!r}, query {target['refId']}", target["expr"])
    for annotation in dashboard.get("annotations", {}).get("list", []):
        if "expr" in annotation:
            yield Use(f"{name}: annotation {annotation['name']!r}", annotation["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query" and (found := label_values(variable["query"]["query"])):
            yield Use(f"{name}: variable {variable['name']}", found[0])


def label_values(query: str) -> tuple[str, str] | None:
    """Selector and label of `label_values(selector, label)`."""
    found = re.fullmatch(r"label_values\((.+),\s*(\w+)\)", query)
    return (found[1], found[2]) if found else None


def parse(expr: str) -> Any:
    """The syntax tree. Raises ValueError with the parser's words."""
    try:
        import promql_parser
    except ImportError:
        raise ResourceError("checking PromQL needs the extra `monitor`; uv sync --extra monitor") from None
    return promql_parser.parse(expr)


def faults(expr: str) -> list[str]:
    """What is wrong with an expression whose variables are filled: syntax, unknown metrics, unknown labels."""
    try:
        tree = parse(expr)
    except ValueError as error:
        return [str(error)]
    known, found = known_series(), []
    labels: set[str] = set()
    for name, asked in _selectors(tree):
        if name not in known:
            found.append(f"no metric is called {name}")
            continue
        labels |= known[name]
        found += [f"{name} has no label {label}" for label in sorted(asked - known[name] - {"__name__"})]
    return found + [f"no series of it has the label {label}" for label in sorted(_grouped(expr) - labels)]


def _selectors(tree: Any) -> Iterator[tuple[str, set[str]]]:
    import promql_parser

    found: list[tuple[str, set[str]]] = []

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((str(node.name), {matcher.name for matcher in node.matchers.matchers}))
        return True

    promql_parser.walk(tree, look)
    yield from found


def _grouped(expr: str) -> set[str]:
    """Labels named by by(...), on(...) and the like."""
    clauses = re.findall(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)", expr)
    return {label.strip() for clause in clauses for label in clause.split(",") if label.strip()}
