"""The folder `dashboards/`: what is generated in it, and where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import counterpoise
from counterpoise import storage
from counterpoise.contracts import ResourceError

BOARDS = "grafana/boards"
PROVISIONING = "grafana/provisioning"
RULES = "prometheus/rules.yml"
CONFIG = "prometheus/prometheus.yml"
SCRAPE_S = 5
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
NODE_TARGET, GPU_TARGET = "127.0.0.1:9100", "127.0.0.1:9400"  # node-exporter, DCGM exporter, where they usually are
_HEADING = "# Written by `counterpoise dashboards build`. Changes belong into counterpoise/dashboards/files.py.\n"


def root() -> Path:
    """The `dashboards/` folder of a checkout, or its copy inside an installed package."""
    package = Path(counterpoise.__file__).parent
    installed = package / "dashboards" / "assets"
    return installed if installed.is_dir() else package.parents[1] / "dashboards"


def prometheus_config(
    *,
    targets: str = "targets/*.json",
    rules: str = "rules.yml",
    ray: str = RAY_TARGETS,
    node: str | None = NODE_TARGET,
    gpu: str | None = GPU_TARGET,
) -> dict[str, Any]:
    """What Prometheus reads: runs and Ray by the files they write, exporters of the machine by their ports.

    targets: files of runs, a glob. Paths are relative to the configuration's folder. node, gpu: None for none.
    A run's `instance` is its host and session instead of a port that changes, so that a resumed run goes on in the
    same series.
    """
    session = {
        "source_labels": ["host", "session"],
        "regex": "(.+);(.+)",
        "replacement": "$1/$2",
        "target_label": "instance",
    }
    jobs: list[dict[str, Any]] = [
        {
            "job_name": "counterpoise",
            "file_sd_configs": [{"files": [targets], "refresh_interval": "5s"}],
            "relabel_configs": [session],
        },
        {"job_name": "ray", "file_sd_configs": [{"files": [ray], "refresh_interval": "15s"}]},
    ]
    for name, target in (("node", node), ("gpu", gpu)):
        if target is not None:
            jobs.append({"job_name": name, "static_configs": [{"targets": [target]}]})
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "10s"},
        "rule_files": [rules],
        "scrape_configs": jobs,
    }


def config_text(**places: Any) -> str:
    return _HEADING + yaml.safe_dump(prometheus_config(**places), sort_keys=False)


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard by the name of its file."""
    try:
        from counterpoise.dashboards.boards import BOARDS as builders
        from counterpoise.dashboards.panels import to_json
    except ImportError as error:
        raise ResourceError(
            f"building dashboards needs the extra `monitor` ({error}); uv sync --extra monitor"
        ) from None
    return {name: to_json(build()) for name, build in builders.items()}


def generated() -> dict[str, str]:
    """Every generated file by its place below `dashboards/`."""
    texts = {
        f"{BOARDS}/{name}.json": json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        for name, content in dashboards().items()
    }
    return texts | {CONFIG: config_text()}


def committed() -> dict[str, dict[str, Any]]:
    """The dashboards as they lie in the folder, which needs no extra."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((root() / BOARDS).glob("*.json"))
    }


def build(out: str) -> list[str]:
    """Write the generated files below a folder; the places of those that changed."""
    changed = []
    for name, text in generated().items():
        place = storage.join(out, name)
        if not storage.exists(place) or storage.read_text(place) != text:
            storage.write_text(place, text)
            changed.append(place)
    return changed
