"""The Dockerfile, the compose file and its secrets, as far as they can be checked without running a container."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pathspec
import pytest
import yaml
from compose_spec import PyCompose
from tests.cluster.shipped import CLUSTER, ROOT, compose, read

DOCKERFILE = CLUSTER / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of the Dockerfile, comments out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.strip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Whether the build does not get to see a file of the checkout."""
    patterns = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    return pathspec.PathSpec.from_lines("gitignore", patterns).match_file(path)


def test_hadolint_is_content() -> None:
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_into_the_image_exists_and_is_not_ignored() -> None:
    copied = [w for k, rest in instructions() if k == "COPY" and "--from" not in rest for w in rest.split()[:-1]]
    assert copied
    for source in copied:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [p for p in path.rglob("*.py") if "node_modules" not in p.parts]
        assert files == [p for p in files if not ignored(str(p.relative_to(ROOT)))]


@pytest.mark.parametrize("path", [".git/config", "runs/a/run.json", "cluster/secrets/ray_token", ".env", ".venv/x"])
def test_what_is_private_does_not_go_into_the_image(path: str) -> None:
    assert ignored(path)


def test_the_image_installs_what_is_locked_and_nothing_of_developers() -> None:
    extras = next(rest for k, rest in instructions() if k == "ARG" and rest.startswith("EXTRAS="))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"--extra (\w+)", extras)
    assert "ray" in named
    assert set(named) <= set(known)
    for words in [rest for k, rest in instructions() if k == "RUN" and "uv sync" in rest]:
        assert {"--frozen", "--no-dev", "--compile-bytecode"} <= set(words.split())


def test_versions_are_pinned() -> None:
    defaults = dict(rest.split("=", 1) for k, rest in instructions() if k == "ARG" and "=" in rest)
    images = [rest.split()[0] for k, rest in instructions() if k == "FROM"]
    images = [re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], image) for image in images]
    images += [re.sub(r"\$\{\w+:-(.*)\}", r"\1", s["image"]) for s in compose()["services"].values()]
    for image in images:
        assert re.search(r":v?\d+\.\d+", image), f"{image} names no version"
    assert defaults["UV"] in read("on-premise.yaml")["setup_commands"][1], "the same uv everywhere"


def test_the_container_is_not_root_and_wants_a_token() -> None:
    last = instructions()[max(i for i, (k, _) in enumerate(instructions()) if k == "FROM") :]
    assert dict(last)["USER"] == "1000"
    environment = dict(pair.split("=", 1) for k, rest in last if k == "ENV" for pair in shlex.split(rest))
    assert environment["RAY_AUTH_MODE"] == "token"
    for name, value in read("runtime_env.yaml")["env_vars"].items():
        assert environment.get(name, value) == value, f"{name} differs from runtime_env.yaml"
    assert "RAY_AUTH_TOKEN" not in environment


# --- compose


def plain() -> dict[str, Any]:
    """The compose file as Compose sees it: variables at their defaults, no fragments."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (CLUSTER / "compose.yaml").read_text())
    content = yaml.safe_load(text)
    return {key: value for key, value in content.items() if not key.startswith("x-")}


def checked(content: dict[str, Any]) -> None:
    """Raise if it is not Compose. pre_stop (Compose 2.30) is younger than the checker."""
    content = yaml.safe_load(yaml.safe_dump(content))
    for service in content["services"].values():
        for hook in service.pop("pre_stop", []):
            assert set(hook) <= {"command", "user", "privileged", "working_dir", "environment"}
    PyCompose.from_yaml(yaml.safe_dump(content, sort_keys=False)).to_spec()


def test_the_compose_file_fits_the_specification() -> None:
    checked(plain())
    slip = plain()
    slip["services"]["head"]["shmsize"] = "2gb"
    with pytest.raises(ValueError, match="shmsize"):
        checked(slip)


def test_everything_that_services_refer_to_is_there() -> None:
    content = plain()
    for name, service in content["services"].items():
        assert set(service.get("secrets", [])) <= set(content["secrets"]), name
        assert set(service.get("networks", [])) <= set(content["networks"]), name
        assert set(service.get("depends_on", [])) <= set(content["services"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in content["volumes"] or (CLUSTER / source).exists(), f"{name}: {source}"
    assert (CLUSTER / content["services"]["head"]["build"]["context"]).resolve() == ROOT
    assert (ROOT / content["services"]["head"]["build"]["dockerfile"]).is_file()


def test_prometheus_reads_what_the_dashboards_are_made_for() -> None:
    service = plain()["services"]["prometheus"]
    mounted = {v.split(":")[1]: v.split(":")[0] for v in service["volumes"]}
    config = yaml.safe_load((CLUSTER / mounted["/etc/prometheus/prometheus.yml"]).read_text())
    (ours,) = [job for job in config["scrape_configs"] if job["job_name"] == "counterpoise"]
    folder = ours["file_sd_configs"][0]["files"][0].split("/")[0]
    head = plain()["services"]["head"]
    assert f"{mounted[f'/etc/prometheus/{folder}']}:{head['environment']['COUNTERPOISE_METRICS_SD']}" in head["volumes"]
    assert service["network_mode"] == "service:head", "commands show metrics on the loopback of the head"


def test_what_stops_a_container_leaves_time_for_a_checkpoint() -> None:
    for name in ("head", "worker"):
        service = plain()["services"][name]
        ((script, seconds),) = [hook["command"] for hook in service["pre_stop"]]
        assert (ROOT / script.removeprefix("/app/")).is_file()
        assert int(seconds) < 120
        assert service["stop_grace_period"] == "2m"


def test_secrets_are_new_and_yours_alone(tmp_path: Path) -> None:
    place = tmp_path / "secrets"
    done = [subprocess.run([CLUSTER / "secrets.sh", folder], capture_output=True, text=True) for folder in
            (place, tmp_path / "others", place)]  # fmt: skip
    assert [d.returncode for d in done] == [0, 0, 6], "what is there is not overwritten"
    named = {Path(secret["file"]).name for secret in compose()["secrets"].values()}
    assert {p.name for p in place.iterdir()} == named
    for name in named:
        assert os.stat(place / name).st_mode & 0o077 == 0
        assert (place / name).read_text() != (tmp_path / "others" / name).read_text()
        assert (place / name).read_text().strip() not in done[0].stdout
    assert os.stat(place).st_mode & 0o077 == 0
    keys = configparser.ConfigParser()
    keys.read(place / "s3_credentials")
    (identity,) = json.loads((place / "s3_identities.json").read_text())["identities"]
    assert identity["credentials"] == [
        {"accessKey": keys["default"]["aws_access_key_id"], "secretKey": keys["default"]["aws_secret_access_key"]}
    ]
    assert re.fullmatch(r"[0-9a-f]{64}", (place / "ray_token").read_text())
