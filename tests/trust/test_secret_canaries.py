"""Secrets that are planted in the environment, in places and in errors: nothing that is written or printed has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import settings
from tests.trust.faults import keep

from counterpoise import cli, doctor
from counterpoise.cli import main
from counterpoise.engine import job
from counterpoise.engine import run as run_module

PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0CANARY01",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret-0123456789",
    "AWS_SESSION_TOKEN": "planted-session-0123456789",
    "GRAFANA_TOKEN": "glsa_planted0123456789abcdef",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "RAY_AUTH_TOKEN": "planted-ray-0123456789abcdef",
    "WANDB_API_KEY": "planted-wandb-0123456789",
    "MY_SERVICE_PASSWORD": "planted-password-0123",
}
IN_PLACES = {"a password in a URL": "planted-url-password-1", "a signature": "planted-signature-9876543210"}
URL = f"https://somebody:{IN_PLACES['a password in a URL']}@host/x?X-Amz-Signature={IN_PLACES['a signature']}"
EVERYTHING = {**PLANTED, **IN_PLACES}


@pytest.fixture
def command(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., int]:
    """command(words...) -> exit code; what it prints is kept in said.txt."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", URL)
    monkeypatch.setenv("COUNTERPOISE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=1)))

    def call(*words: str) -> int:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        with open(tmp_path / "said.txt", "a") as file:
            file.write("".join(capfd.readouterr()))
        return int(caught.value.code or 0)

    return call


def leaks(place: Path) -> list[str]:
    """Which secrets are in which files, names of files included."""
    files = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    return sorted(
        f"{what} in {name}"
        for what, value in EVERYTHING.items()
        for name, data in files.items()
        if value.encode() in data or value in name
    )


def failing(*_: Any, **__: Any) -> None:
    """As libraries quote what they were given."""
    raise RuntimeError(f"cannot open {URL} with {json.dumps(PLANTED)} and Bearer {PLANTED['RAY_AUTH_TOKEN']}")


def everything(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A run, one that fails with secrets in its error, and all that is made of them."""
    assert command("train", "e.yaml", "--runs", "runs", "--name", "good", "--metrics-sd", "sd") == 0
    with monkeypatch.context() as patch:
        patch.setattr(job, "Trainer", failing)
        with pytest.raises(RuntimeError) as caught:
            main(["train", "e.yaml", "--runs", "runs", "--name", "bad", "--metrics-port", "off"])
    with open(folder / "said.txt", "a") as file, monkeypatch.context() as patch:
        patch.setattr(cli, "say", lambda text="": file.write(f"{text}\n"))
        cli._unexpected(caught.type, caught.value, None)  # what a process of its own would print
    command("report", "runs/good", "runs/bad", "-o", "report.html")
    command("export", "runs/good", "-o", "exported")
    command("doctor", "--json")
    command("doctor")
    command("dashboards", "build", "-o", "boards")
    command("train", "e.yaml", "--runs", f"s3://key:{IN_PLACES['a password in a URL']}@bucket/x", "--dry-run")
    command("corpora", "check", f"gopher://key:{IN_PLACES['a password in a URL']}@bucket/x/")


def test_no_secret_is_written_or_printed(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything(command, monkeypatch, tmp_path)
    assert (tmp_path / "runs" / "bad" / "records.jsonl").exists() and (tmp_path / "report.html").exists()
    assert "cannot open https://[redacted]@host" in (tmp_path / "runs" / "bad" / "records.jsonl").read_text()
    found = leaks(tmp_path)
    keep(
        "21 secrets", "secrets", {"planted": len(EVERYTHING), "files": sum(1 for _ in tmp_path.rglob("*"))}, found == []
    )
    assert found == []


def test_the_search_finds_them_where_nothing_is_hidden(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control."""
    monkeypatch.setattr(run_module, "redact", lambda value: value)
    monkeypatch.setattr(doctor, "_clean", lambda text: text)
    everything(command, monkeypatch, tmp_path)
    found = leaks(tmp_path)
    keep("21 secrets", "control: nothing is hidden", {"planted": len(EVERYTHING)}, found == [], control=True)
    places = {text.split(" in ")[-1] for text in found}
    assert {"said.txt", "runs/bad/records.jsonl", "runs/bad/status.json"} <= places
    assert {text.split(" in ")[0] for text in found} >= {*PLANTED} - {"AWS_ENDPOINT_URL"}
