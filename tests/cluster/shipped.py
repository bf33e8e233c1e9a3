"""What lies in cluster/, read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
RAY_KINDS = ("RayCluster", "RayJob")


def read(name: str) -> Any:
    """The only document of a file in cluster/."""
    return yaml.safe_load((CLUSTER / name).read_text())


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and name, document) of every Kubernetes document, without the kustomization."""
    for path in sorted(KUBERAY.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            for document in yaml.safe_load_all(path.read_text()):
                meta = document["metadata"]
                yield f"{path.name}/{document['kind']}/{meta.get('name', meta.get('generateName'))}", document


def ray_clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, spec of a RayCluster) of clusters and of jobs."""
    for name, document in manifests():
        if document["kind"] == "RayCluster":
            yield name, document["spec"]
        elif document["kind"] == "RayJob":
            yield name, document["spec"]["rayClusterSpec"]


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod template) of every kind of pod that is asked for."""
    for name, spec in ray_clusters():
        yield f"{name}/head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}/{group['groupName']}", group["template"]
    for name, document in manifests():
        if document["kind"] == "RayJob":
            yield f"{name}/submitter", document["spec"]["submitterPodTemplate"]


def compose() -> dict[str, Any]:
    found = read("compose.yaml")
    assert isinstance(found, dict)
    return found
