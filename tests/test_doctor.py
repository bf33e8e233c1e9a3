import json
import os
import re
import shutil
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from counterpoise import cli, doctor
from counterpoise.doctor import Finding

PACKAGE = Path(doctor.__file__).parent
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No variable of the machine, no home folder and no Ray of it reaches a test."""
    for name in os.environ:
        if name in doctor.ENVIRONMENT or name.startswith(doctor.PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def levels(findings):
    return {f.what: f.level for f in findings}


def only(findings, what):
    [finding] = [f for f in findings if f.what == what]
    return finding


# ------------------------------------------------------------------------------------------------ packages


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("torch", "2.9.1", "problem"),
        ("torch", "2.10.0", "ok"),
        ("torch", "2.15.0+cu132", "ok"),
        ("torch", "2.10.0a0+git1", "problem"),
        ("ray", "2.55.9", "problem"),
        ("ray", "2.56.0", "ok"),
        ("pyarrow", "23.0.0", "problem"),
        ("pyarrow", "23.0.1", "ok"),
        ("pyarrow", "100.0", "ok"),
        ("transformers", "5.2.9", "problem"),
        ("transformers", "5.3.0", "ok"),
        ("numpy", "1.0", "ok"),
        ("lightning", "2.6.1", "ok"),
        ("lightning", "2.6.2", "problem"),
        ("lightning", "2.6.3", "problem"),
        ("lightning", "2.6.4", "ok"),
    ],
)
def test_versions_with_known_holes_are_problems(name, version, level):
    finding = doctor.check_version(name, version)
    assert (finding.level, finding.refusal) == (level, name == "lightning" and level == "problem")
    assert version in finding.detail
    assert (finding.remedy is not None) == (level == "problem")


def test_a_hole_is_named_before_an_unmet_requirement():
    assert "CVE-2026-24747" in doctor.check_version("torch", "2.9", ">=2.11").detail
    assert ">=2.11" in doctor.check_version("torch", "2.10.1", ">=2.11").detail
    assert doctor.check_version("torch", "2.11.0", ">=2.11").level == "ok"


def test_a_version_that_cannot_be_read_is_a_problem():
    assert doctor.check_version("torch", "unknown").level == "problem"


def fake_packages(monkeypatch, versions, requires):
    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requires)


def test_missing_packages_are_problems_and_missing_extras_notes(monkeypatch):
    fake_packages(
        monkeypatch,
        {"counterpoise": "0.1.0", "numpy": "1.9", "torch": "2.9", "lightning": "2.6.3"},
        [
            "numpy>=2.0",
            "scipy>=1.15",
            "torch>=2.11",
            "ray[data]>=2.60; extra == 'ray'",
            "pywin; sys_platform == 'win32'",
        ],
    )
    found = doctor._guarded("packages", doctor._packages)
    assert levels(found) == {
        "counterpoise": "ok",
        "numpy": "problem",
        "scipy": "problem",
        "torch": "problem",
        "ray": "note",
        "lightning": "problem",
    }
    assert only(found, "ray").remedy == "uv sync --inexact --extra ray"
    assert only(found, "lightning").refusal


def test_torchvision_must_fit_torch():
    assert doctor._matching("0.29", "2.15.0+cu132", ["numpy", "torch (>=2.14.0)"], "r").level == "ok"
    wrong = doctor._matching("0.26", "2.15.0+cu132", ["torch==2.11.0"], "r")
    assert wrong.level == "problem" and "2.11.0" in wrong.detail


def test_a_torch_that_cannot_be_imported_is_a_problem_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = only(doctor._guarded("torch", doctor._torch), "torch")
    assert finding.level == "problem" and "uv sync" in finding.remedy


@pytest.mark.parametrize(
    ("missing", "off", "level"), [(3, "1", "problem"), (3, "", "note"), (0, "1", "note"), (0, "", "ok")]
)
def test_uncompiled_torch_matters_most_where_nothing_may_be_compiled(monkeypatch, missing, off, level):
    monkeypatch.setattr(doctor, "_uncompiled", lambda package: missing)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", off)
    [finding] = doctor._bytecode()
    assert finding.level == level and (level == "ok" or finding.remedy)


# --------------------------------------------------------------------------------------------------- devices


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_gpu_there", lambda: True)
    assert [f.level for f in doctor._cuda(torch)] == ["problem"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [f.level for f in doctor._cuda(torch)] == ["note"]
    monkeypatch.setattr(doctor, "_gpu_there", lambda: False)
    assert [f.level for f in doctor._cuda(torch)] == ["ok"]


def test_limits_of_cgroups_are_read_in_both_versions(tmp_path):
    own = tmp_path / "own"
    (tmp_path / "cpu/job").mkdir(parents=True)
    (tmp_path / "pod/job").mkdir(parents=True)
    own.write_text("0::/pod/job\n")
    assert doctor._cpu_quota(str(tmp_path), str(own)) is None
    (tmp_path / "pod/job/cpu.max").write_text("max 100000\n")
    (tmp_path / "pod/cpu.max").write_text("150000 100000\n")
    (tmp_path / "pod/memory.max").write_text("1000\n")
    assert doctor._cpu_quota(str(tmp_path), str(own)) == 1.5
    assert doctor._memory_limit(str(tmp_path), str(own)) == 1000
    own.write_text("4:memory:/\n3:cpu:/job\n")
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/job/cpu.cfs_period_us").write_text("100000\n")
    assert doctor._cpu_quota(str(tmp_path), str(own)) is None
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text("50000\n")
    assert doctor._cpu_quota(str(tmp_path), str(own)) == 0.5
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert doctor._memory_limit(str(tmp_path), str(own)) is None


def test_more_threads_than_cores_are_noted():
    finding = only(list(doctor._cpu(10_000)), "CPU")
    assert finding.level == "note" and "OMP_NUM_THREADS" in finding.remedy


# ------------------------------------------------------------------------------------------------------- ray


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:6379", "ray://localhost:10001", "http://127.0.0.1:8265", "[::1]:6379", "::1", "127.8.9.1:1/path"],
)
def test_loopback_addresses(address):
    assert doctor.is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.5:6379",
        "ray://head:10001",
        "http://127.0.0.1@evil.example:8265",
        "http://evil.example?@127.0.0.1:80",
        "127.0.0.1.evil.example:1",
        "localhost.evil.example",
        "127.0.0.1:1,10.0.0.1:1",
        "0.0.0.0:6379",
        "",
    ],
)
def test_addresses_that_may_be_another_machine(address):
    assert not doctor.is_loopback(address)


@pytest.mark.parametrize("mode", [None, "", "disabled"])
def test_a_remote_ray_without_token_is_refused(monkeypatch, mode):
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.5:10001")
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    finding = only(doctor._guarded("ray", doctor._ray), "cluster")
    assert finding.level == "problem" and finding.refusal and "RAY_AUTH_MODE=token" in finding.remedy


def test_a_remote_ray_with_token_is_allowed(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.5:10001")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert levels(doctor._ray()) == {"ray": "ok", "cluster": "note", "token": "problem"}
    token = tmp_path / "token"
    token.write_text("canary")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    found = list(doctor._ray())
    assert levels(found) == {"ray": "ok", "cluster": "ok", "token": "note"}
    assert only(found, "token").remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    assert levels(doctor._ray())["token"] == "ok"


def test_auto_means_the_cluster_this_machine_knows(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert not only(doctor._ray(), "cluster").refusal
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("127.0.0.1:6379")
    assert only(doctor._ray(), "cluster").level == "ok"
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.5:6379")
    assert only(doctor._ray(), "cluster").refusal


@pytest.mark.parametrize("name", doctor.SWITCHES)
def test_letting_data_run_code_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    finding = only(doctor._ray(), "data that runs code")
    assert finding.refusal and finding.remedy == f"unset {name}"


# -------------------------------------------------------------------------------------------- disk, storage


@pytest.mark.parametrize(("free", "level"), [(2**29, "problem"), (5 * 2**30, "note"), (50 * 2**30, "ok")])
def test_little_disk(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**40, 2**40 - free, free))
    monkeypatch.setenv("COUNTERPOISE_RUNS", str(tmp_path / "not" / "yet"))
    found = doctor._guarded("disk", doctor._disk)
    assert levels(found) == {"runs": level, "corpora": level, "temp": level}
    assert "not there yet" in only(found, "runs").detail
    assert not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    [finding] = doctor._place("runs", str(tmp_path), "export COUNTERPOISE_RUNS=...")
    assert finding.level == "problem" and "Read-only" in finding.detail


def test_a_remote_place_is_not_asked(monkeypatch):
    monkeypatch.setenv("COUNTERPOISE_RUNS", "s3://user:canary-word@bucket/runs")
    finding = only(doctor._guarded("disk", doctor._disk), "runs")
    assert finding.level == "ok" and "s3://bucket/runs" in finding.detail


def test_half_a_pair_of_keys_is_a_problem(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-canary")
    assert only(doctor._storage(), "credentials").remedy == "export AWS_ACCESS_KEY_ID=..."
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-canary")
    assert only(doctor._storage(), "credentials").level == "ok"


@pytest.mark.parametrize(
    ("endpoint", "level"),
    [("https://s3.example", "ok"), ("http://127.0.0.1:9000", "ok"), ("http://s3.example", "note"), ("s3.x", "problem")],
)
def test_endpoints(monkeypatch, endpoint, level):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    assert only(doctor._storage(), "endpoint").level == level


# --------------------------------------------------------------------------------------------- the whole


SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY0001",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-0002",
    "AWS_SESSION_TOKEN": "canary-session-0003",
    "AWS_ROLE_ARN": "arn:aws:iam::canary-0004",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "1234567",
    "RAY_AUTH_TOKEN": "canary-token-0005",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"env": {"HF_TOKEN": "canary-0006"}}',
    "COUNTERPOISE_PASSWORD": "canary-0007",
    "GRAFANA_TOKEN": "canary-grafana-0008",
    "HTTPS_PROXY": "canary-user:canary-0009@proxy.example:3128",
    "AWS_ENDPOINT_URL_S3": "https://canary-user:canary/0010@s3.example/?signature=canary-0011",
    "RAY_ADDRESS": "ray://canary-user:canary-0012@10.0.0.5:10001",
    "COUNTERPOISE_RUNS": "s3://canary-user:canary-0013@bucket/runs",
}


@pytest.mark.parametrize(
    ("what", "module", "package", "purpose"),
    [
        ("soundfile", "soundfile", "soundfile", "sound cannot be read"),
        ("Pillow", "PIL", "pillow", "pictures cannot be read"),
        ("PyAV", "av", "av", "videos of downloads cannot be read"),
        ("OpenCV", "cv2", "opencv-python-headless", "optical flow cannot be computed"),
        ("pebble", "pebble", "pebble", "downloads cannot be made into corpora"),
    ],
)
def test_a_decoder_that_is_missing_or_broken_is_a_problem_with_a_remedy(monkeypatch, what, module, package, purpose):
    assert only(list(doctor._decoders()), what).level == "ok"
    monkeypatch.setitem(sys.modules, module, None)
    broken = only(list(doctor._decoders()), what)
    assert broken.level == "problem" and broken.detail.endswith(f": {purpose}")
    assert broken.remedy == f"uv sync --inexact --reinstall-package {package}"
    there = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == package else there(name))
    missing = only(list(doctor._decoders()), what)
    assert missing.detail == f"{package} is not installed: {purpose}"
    assert missing.remedy == "uv sync --inexact"


def test_what_an_extra_needs_is_installed_with_that_extra():
    assert doctor._installing("transformers") == "uv sync --inexact --extra text"
    assert doctor._installing("ray") == "uv sync --inexact --extra ray"
    assert doctor._installing("av") == "uv sync --inexact"


def test_a_codec_that_is_missing_is_named(monkeypatch):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"h264", "flv"})
    finding = only(list(doctor._decoders()), "PyAV")
    assert finding.level == "problem" and "cannot read H.264, FLV" in finding.detail


def test_no_secret_is_ever_printed(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for as_json in ([], ["--json"]):
        result = CliRunner().invoke(cli.app, ["doctor", *as_json])
        assert result.exit_code == 6  # the Ray address has no token
        assert "canary" not in result.output.lower()
        assert "1234567" not in result.output
        for name in SECRETS:
            assert name in result.output or name == "GRAFANA_TOKEN"
        assert "proxy.example:3128" in result.output


def test_no_secret_in_the_text_of_an_error(monkeypatch):
    monkeypatch.setenv("GRAFANA_TOKEN", "canary-grafana-0008")

    def check():
        yield Finding("", "first", "ok", "fine")
        raise RuntimeError("403 for canary-grafana-0008 at https://me:canary@host/x?key=canary\nsecond line")

    first, second = doctor._guarded("group", check)
    assert first == Finding("group", "first", "ok", "fine")
    assert second.level == "problem" and second.what == "check"
    assert second.detail == "the check failed: RuntimeError: 403 for [hidden] at https://host/x"


def test_every_variable_that_the_package_reads_is_known():
    access = r"(?:environ(?:\.get|\.setdefault|\.pop)?[\[(]|getenv\(|envvar=)\s*"
    pattern = re.compile(access + r"""["'](\w+)|["'](\w+)["'] (?:not )?in os\.environ""")
    sources = [path for path in PACKAGE.rglob("*.py") if path.name != "doctor.py"]
    read = {name for path in sources for pair in pattern.findall(path.read_text()) for name in pair if name}
    assert {"COUNTERPOISE_HOME", "COUNTERPOISE_RUNS", "RAY_ADDRESS", "WORLD_SIZE"} <= read
    assert {name for name in read if name not in doctor.ENVIRONMENT and not name.startswith(doctor.PREFIXES)} == set()


def test_set_variables_are_shown_with_their_values(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    monkeypatch.setenv("CI", "")
    found = {f.what: f.detail for f in doctor._environment()}
    assert found["OMP_NUM_THREADS"].startswith("3 ")
    assert found["RAY_DEDUP_LOGS"] == "0"
    assert found["CI"].startswith("(empty)")
    assert "AWS_REGION" in found["not set"] and "OMP_NUM_THREADS" not in found["not set"]


def test_this_machine_is_examined_as_json():
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert {tuple(f) for f in found} == {("group", "what", "level", "detail", "remedy", "refusal")}
    assert {f["level"] for f in found} <= {"ok", "note", "problem"}
    assert list(dict.fromkeys(f["group"] for f in found)) == [group for group, _ in doctor._GROUPS]
    assert not [f for f in found if f["detail"].startswith("the check failed")]
    assert result.exit_code == (4 if any(f["level"] == "problem" for f in found) else 0)


def test_problems_come_last_with_their_remedies():
    found = [
        Finding("disk", "runs", "problem", "full", "export COUNTERPOISE_RUNS=/larger"),
        Finding("disk", "temp", "ok", "/tmp"),
        Finding("ray", "ray", "note", "not installed " * 10, "uv sync --extra ray"),
    ]
    lines = doctor.render(found, width=70).splitlines()
    assert lines[0] == "disk" and lines[1].split() == ["ok", "temp", "/tmp"]
    assert max(map(len, lines)) <= 70
    assert lines[-5:-2] == [
        "problems",
        f"  problem  runs{' ' * 8}full",
        f"{' ' * 23}→ export COUNTERPOISE_RUNS=/larger",
    ]
    assert lines[-1] == "1 problem, 1 note"
    assert doctor.render([found[1]]).splitlines()[-1] == "everything is in order"
    refused = Finding("ray", "cluster", "problem", "open", "export RAY_AUTH_MODE=token", refusal=True)
    assert doctor.render([refused]).splitlines()[-1] == "1 problem; 1 of them refused for safety"


@pytest.mark.parametrize(("refusal", "code"), [(False, 4), (True, 6)])
def test_exit_codes(monkeypatch, refusal, code):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("g", "w", "problem", "d", "r", refusal)])
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == code


def test_neither_ray_nor_any_extra_is_imported():
    import subprocess

    code = "import sys; from counterpoise import doctor; doctor.examine(); sys.exit('ray' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 0
