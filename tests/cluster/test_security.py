"""Nothing that is shipped to set up clusters listens to the world, runs Ray without a token, or holds a secret."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.shipped import CLUSTER, ROOT, compose

COMPOSE = CLUSTER / "compose.yaml"
LOOPBACK = "127.0.0.1:"
PUBLIC = re.compile(r"0\.0\.0\.0|\[::\]|dashboard-host[= ](?!127\.0\.0\.1)")
OPEN_TOKEN = re.compile(r"RAY_AUTH_MODE\W+disabled|mode: disabled")
SECRETS = [
    re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bglsa_[A-Za-z0-9]{20,}|\bhf_[A-Za-z0-9]{30,}"),
    re.compile(r"\b[0-9a-f]{64}\b"),
    # a value behind a name that says secret, unless it comes from a variable, a program or a file
    re.compile(
        r"(?i)(password|passwd|secret(_access)?_key|secretkey|auth_token|api_key)[\"']?\s*[:=]\s*[\"']?[^\s\"'$%{/:?~]"
    ),
]


def shipped() -> list[Path]:
    """Files that git has in cluster/ and dashboards/, without generated boards and lists of npm packages."""
    done = subprocess.run(["git", "ls-files", "cluster", "dashboards"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [n for n in done.stdout.splitlines() if "/boards/" not in n and not n.startswith("dashboards/preview/")]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def findings(text: str) -> Iterator[str]:
    """Lines that open something or give something away. Comments are read too: people copy them."""
    for line in text.splitlines():
        if PUBLIC.search(line) or OPEN_TOKEN.search(line) or any(secret.search(line) for secret in SECRETS):
            yield line.strip()


@pytest.mark.parametrize("path", shipped(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_shipped_is_open_or_holds_a_secret(path: Path) -> None:
    found = list(findings(path.read_text()))
    if path == COMPOSE:  # inside of containers, see the next test
        found = [line for line in found if "0.0.0.0" not in line]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "ray start --head --dashboard-host=0.0.0.0",
        "ray start --head --dashboard-host 10.1.2.3",
        "--web.listen-address=[::]:9090",
        "RAY_AUTH_MODE=disabled ray start --head",
        "RAY_AUTH_MODE: disabled",
        "GF_SECURITY_ADMIN_PASSWORD: admin",
        'aws_secret_access_key = "wJalrXUtnFEMI"',
        "AWS_ACCESS_KEY_ID: AKIAIOSFODNN7EXAMPLE",
        "auth_token: " + 64 * "a",
    ],
)
def test_a_slip_is_found(line: str) -> None:
    assert list(findings(line)) == [line]


@pytest.mark.parametrize("path", [COMPOSE, ROOT / "dashboards" / "compose.yaml"], ids=["cluster", "dashboards"])
def test_containers_publish_on_loopback_only(path: Path) -> None:
    services: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    for name, service in services.items():
        assert all(str(port).startswith(LOOPBACK) for port in service.get("ports", [])), name
        assert not {"privileged", "pid", "ipc", "devices", "cap_add"} & set(service), name
        if service.get("network_mode") == "host":
            said = [*service.get("command", []), *service.get("environment", {}).values()]
            assert any(LOOPBACK in str(word) or word == LOOPBACK.rstrip(":") for word in said), name


def starts_of_ray() -> Iterator[tuple[str, str]]:
    """(file, command) of every command that starts Ray; a folded or continued one is in one line."""
    for path in shipped():
        if path.suffix in (".yaml", ".sbatch", ".sh"):
            text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
            for command in re.split(r"\n(?=\s*- |\s*\w+: |[a-z]\w* )", re.sub(r"\\\n\s*", " ", text)):
                if "ray start" in command:
                    yield str(path.relative_to(ROOT)), " ".join(command.split())


def test_ray_starts_with_a_token_and_its_dashboard_on_loopback() -> None:
    starts = list(starts_of_ray())
    assert len({name for name, _ in starts}) == 5, "AWS, GCP, machines of one's own, Slurm, Compose"
    for name, command in starts:
        text = (ROOT / name).read_text()
        if name == "cluster/compose.yaml":
            assert all(s["environment"]["RAY_AUTH_MODE"] == "token" for n, s in compose()["services"].items()
                       if n in ("head", "worker", "buckets"))  # fmt: skip
        elif name.endswith(".sbatch"):
            assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in text
            assert "--dashboard-host=127.0.0.1" in text
        else:
            assert "RAY_AUTH_MODE=token ray start" in command
            assert ("--head" not in command) or ("--dashboard-host=127.0.0.1" in command)


def test_pods_share_nothing_with_their_node() -> None:
    for path in (CLUSTER / "kuberay").glob("*.yaml"):
        assert not re.search(r"hostNetwork|hostPID|hostIPC|hostPath|privileged|LoadBalancer|NodePort", path.read_text())
