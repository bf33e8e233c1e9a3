"""The manifests against Kubernetes' schemas and those of KubeRay, and what must be alike in them."""

from __future__ import annotations

import copy
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.cluster.shipped import KUBERAY, RAY_KINDS, ROOT, manifests, pod_templates, ray_clusters
from typer.main import get_command

from counterpoise.cli import app

SCHEMAS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("kuberay.yaml").read_text())
CUSTOM = sorted(set(SCHEMAS) - {"$defs"})
VERSION = "1.34"
MANIFESTS = dict(manifests())
PODS = dict(pod_templates())
CLUSTERS = dict(ray_clusters())
GRACE_S = 130


def check(document: dict[str, Any]) -> None:
    """Raise if a document does not fit its schema; a field that is unknown does not fit."""
    if document["kind"] in CUSTOM:
        schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS[document["kind"]]}
        jsonschema.validate(document["spec"], schema, cls=jsonschema.Draft202012Validator)
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}  # the rest of it
    kubernetes_validate.validate(document, VERSION, strict=True)


def check_pod(template: dict[str, Any]) -> None:
    named = {**template, "metadata": {"name": "x", **template.get("metadata", {})}}
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **named}, VERSION, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema(name: str) -> None:
    check(MANIFESTS[name])


@pytest.mark.parametrize("name", PODS)
def test_a_pod_fits_the_schema_of_kubernetes(name: str) -> None:
    check_pod(PODS[name])


def test_a_slip_does_not_fit() -> None:
    document = copy.deepcopy(next(d for d in MANIFESTS.values() if d["kind"] == "RayCluster"))
    document["spec"]["authOption"] = document["spec"].pop("authOptions")
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        check(document)
    template = copy.deepcopy(next(iter(PODS.values())))
    template["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_more_rights_than_the_namespace_allows(name: str) -> None:
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert "limits" in container["resources"]
    (namespace,) = [d for d in MANIFESTS.values() if d["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    if not name.endswith("/head"):  # whose autoscaler talks to Kubernetes
        assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", [n for n in PODS if not n.endswith("/submitter")])
def test_a_pod_of_ray_has_time_and_shared_memory(name: str) -> None:
    spec = PODS[name]["spec"]
    assert spec["terminationGracePeriodSeconds"] == GRACE_S
    (container,) = spec["containers"]
    script, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (ROOT / script.removeprefix("/app/")).is_file()
    assert int(seconds) < GRACE_S - 20, "Ray itself takes some seconds to end"
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    (shm,) = [v["emptyDir"] for v in spec["volumes"] if v["name"] == "shm"]
    assert shm["medium"] == "Memory"
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert int(shm["sizeLimit"].removesuffix("Gi")) <= memory / 2, "it counts as memory of the pod"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_wants_a_token_and_does_no_work_on_its_head(name: str) -> None:
    spec = CLUSTERS[name]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["rayVersion"] == metadata.version("ray")
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_all_pods_use_the_accounts_that_are_made_and_one_image() -> None:
    accounts = {d["metadata"]["name"] for d in MANIFESTS.values() if d["kind"] == "ServiceAccount"}
    used = {t["spec"].get("serviceAccountName") for n, t in PODS.items() if not n.endswith("/submitter")}
    assert used == accounts
    assert len({c["image"] for t in PODS.values() for c in t["spec"]["containers"]}) == 1
    assert {d["metadata"].get("namespace", "counterpoise") for d in MANIFESTS.values()} == {"counterpoise"}


def test_nothing_opens_a_cluster_to_the_outside() -> None:
    assert not [n for n, d in MANIFESTS.items() if d["kind"] in ("Ingress", "Service", "Gateway", "HTTPRoute")]
    policies = [d["spec"] for d in MANIFESTS.values() if d["kind"] == "NetworkPolicy"]
    (ray,) = [p for p in policies if p["podSelector"].get("matchExpressions")]
    assert ray["podSelector"] == {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    for rule in ray["ingress"]:
        assert rule["from"], "a rule without `from` lets everybody in"
        inside = any("podSelector" in peer and "namespaceSelector" not in peer for peer in rule["from"])
        assert inside or rule["ports"], "other namespaces reach single ports"
    submitter = next(t for n, t in PODS.items() if n.endswith("/submitter"))
    (label,) = submitter["metadata"]["labels"].items()
    peers = [peer.get("podSelector", {}).get("matchLabels", {}) for rule in ray["ingress"] for peer in rule["from"]]
    assert dict([label]) in peers


def test_ports_that_are_scraped_are_ports_of_pods_and_let_through() -> None:
    (monitor,) = [d["spec"] for d in MANIFESTS.values() if d["kind"] == "PodMonitor"]
    head = next(t for n, t in PODS.items() if n.endswith("/head"))["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    scraped = {ports[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]}
    rules = [
        d["spec"]["ingress"] for d in MANIFESTS.values() if d["kind"] == "NetworkPolicy" and "ingress" in d["spec"]
    ]
    allowed = {port["port"] for rule in rules[0] for port in rule.get("ports", [])}
    assert scraped <= allowed


def test_monitoring_prints_our_rules_and_dashboards_as_they_are() -> None:
    done = subprocess.run([KUBERAY / "monitoring.sh", "mine"], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))
    for document in documents:
        check(document)
    monitor, rules, *boards = documents
    assert monitor["metadata"]["labels"] == rules["metadata"]["labels"] == {"release": "mine"}
    assert rules["spec"] == yaml.safe_load((ROOT / "dashboards/prometheus/rules.yml").read_text())
    shown = {name: json.loads(text) for board in boards for name, text in board["data"].items()}
    there = {p.name: json.loads(p.read_text()) for p in (ROOT / "dashboards/grafana/boards").glob("*.json")}
    assert shown == there


def test_the_kustomization_mounts_the_folder_in_every_pod() -> None:
    content = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())
    documents = [d for f in content["resources"] for d in yaml.safe_load_all((KUBERAY / f).read_text())]
    (cluster,) = [d for d in documents if d["kind"] in RAY_KINDS]
    (claim,) = [d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"]
    (patch,) = content["patches"]
    assert patch["target"] == {"kind": cluster["kind"]}
    patched = jsonpatch.apply_patch(cluster, yaml.safe_load(patch["patch"]))
    check(patched)
    groups = [patched["spec"]["headGroupSpec"], *patched["spec"]["workerGroupSpecs"]]
    for group in groups:
        check_pod(group["template"])
        spec = group["template"]["spec"]
        assert {"name": "shared", "persistentVolumeClaim": {"claimName": claim}} in spec["volumes"]
        assert {"name": "shared", "mountPath": "/shared"} in spec["containers"][0]["volumeMounts"]


def test_a_job_goes_on_when_it_is_tried_again() -> None:
    (job,) = [d["spec"] for d in MANIFESTS.values() if d["kind"] == "RayJob"]
    words = job["entrypoint"].split()
    assert words[0] == "python"
    assert {"--name", "--auto-resume"} <= set(words)
    options = {name for parameter in get_command(app).commands["train"].params for name in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in words if word.startswith("--")} <= options
    assert words[words.index("--runs") + 1].startswith("s3://")
    for word in words:
        if word.startswith("/app/"):
            assert (ROOT / word.removeprefix("/app/")).is_file()
    assert job["backoffLimit"] > 0
    assert job["shutdownAfterJobFinishes"]
