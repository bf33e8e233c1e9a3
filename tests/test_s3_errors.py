"""Object storage that cannot be used: every command says so in one line that names the place and what to change."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tests.conftest import settings
from tests.test_storage import error_body, failing_server, use_server

from counterpoise import storage
from counterpoise.cli import main
from counterpoise.contracts import ConfigError, ResourceError

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]  # servers and clients warn of their own

PAGE = b"<!DOCTYPE html>\n<html><body>It works!</body></html>"


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def closed_port() -> Iterator[str]:
    with socket.socket() as bound:  # bound, so that nobody else gets it, but not listening
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def answering(status: int, body: bytes, kind: str = "application/xml") -> Iterator[str]:
    def behave(handler, _):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    with failing_server(behave) as (endpoint, _):
        yield endpoint


@contextlib.contextmanager
def named(endpoint: str) -> Iterator[str]:
    yield endpoint


# How the server is wrong; what the line says besides the place and the server; exit code.
WRONG = {
    "denied": (lambda: answering(403, error_body("AccessDenied")), ["access denied at", "AWS_PROFILE", "nowhere"], 4),
    "no bucket": (lambda: answering(404, error_body("NoSuchBucket")), ["no bucket nowhere at"], 4),
    "page": (lambda: answering(200, PAGE, "text/html"), ["web page", "AWS_ENDPOINT_URL_S3 is"], 4),
    "page, 404": (lambda: answering(404, PAGE, "text/html"), ["no S3 server", "AWS_ENDPOINT_URL_S3 is"], 4),
    "refused": (closed_port, ["cannot connect", "failed after 3 tries", "AWS_ENDPOINT_URL_S3 is"], 4),
    "silent": (silent_server, ["no answer", "failed after 3 tries", "AWS_ENDPOINT_URL_S3 is"], 4),
    "no such host": (lambda: named("http://s3.invalid:9000"), ["not known to DNS", "AWS_ENDPOINT_URL_S3 is"], 4),
    "no URL": (lambda: named("127.0.0.1:9000"), ["give a URL such as https://"], 2),
}


def no_host_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question leaves this machine."""
    real = socket.getaddrinfo

    def lookup(host, *more, **options):
        if host == "s3.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


@pytest.fixture
def quick() -> Iterator[None]:
    with storage.limits(deadline_s=30.0, read_s=0.5, connect_s=0.5, backoff_s=0.05, backoff_max_s=0.1, attempts=3):
        yield


@pytest.fixture
def commands(corpus: str, tmp_path: Path) -> dict[str, list[str]]:
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(settings(corpus)))
    return {
        "card": ["corpora", "check", "s3://nowhere/corpus/"],
        "out": ["corpora", "prepare", "av_digits", "--out", "s3://nowhere/corpus"],
        "runs": ["train", str(tmp_path / "e.yaml"), "--runs", "s3://nowhere/runs", "--name", "a"],
    }


def ended(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, float]:
    capfd.readouterr()
    start = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    took = time.monotonic() - start
    assert isinstance(caught.value.code, int)
    return caught.value.code, capfd.readouterr().err.strip(), took


@pytest.mark.parametrize("command", ["card", "out", "runs"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_server_that_is_wrong_is_named_in_one_line_with_what_to_change(
    fault: str,
    command: str,
    commands: dict[str, list[str]],
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    serve, said, code = WRONG[fault]
    no_host_is_known(monkeypatch)
    with serve() as endpoint:
        use_server(monkeypatch, endpoint)
        found, text, took = ended(commands[command], capfd)
    assert found == code, text
    line = text.splitlines()[-1]
    assert line.startswith("counterpoise: s3://nowhere/") and text.count("counterpoise: ") == 1
    assert "Traceback" not in text and "test-secret" not in text
    assert endpoint in line
    for part in said:
        assert part in line
    assert took < 30  # starting the first client takes seconds on a busy machine


@pytest.mark.parametrize("command", ["card", "out", "runs"])
def test_a_bucket_that_is_missing_is_named(
    command: str, commands: dict[str, list[str]], bucket: str, moto: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = ended(commands[command], capfd)
    assert code == 4
    assert f"there is no bucket nowhere at {moto}; make it, or correct its name or AWS_ENDPOINT_URL_S3" in text


@pytest.mark.parametrize("command", ["card", "out", "runs"])
def test_without_credentials_each_command_says_which_to_set(
    command: str,
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_server(monkeypatch, "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    code, text, _ = ended(commands[command], capfd)
    assert code == 4
    assert "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in text


def test_a_profile_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_server(monkeypatch, "http://127.0.0.1:10")  # of its own: clients are kept by endpoint
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"AWS_PROFILE is 'nobody', which is neither in ~/.aws/config"):
        storage.exists("s3://nowhere/x")


def test_a_key_that_the_server_does_not_know_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(403, error_body("InvalidAccessKeyId")) as endpoint:
        use_server(monkeypatch, endpoint)
        with pytest.raises(ResourceError, match=r"access denied at .*\(InvalidAccessKeyId\)"):
            storage.list_names("s3://nowhere/x")


def test_a_page_that_is_stored_as_a_page_is_read(bucket: str) -> None:
    storage.write_bytes(f"{bucket}/report.html", PAGE)
    assert storage.read_bytes(f"{bucket}/report.html") == PAGE
    storage.write_bytes(f"{bucket}/video.mp4", PAGE)  # what a download left there; its row says so
    assert storage.read_bytes(f"{bucket}/video.mp4") == PAGE


def test_a_passing_fault_costs_one_try_each_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(handler, number: int) -> bool:
        if number > 3:
            return True
        handler.say(503, error_body("SlowDown"))
        return False

    with failing_server(busy) as (endpoint, requests):
        use_server(monkeypatch, endpoint)
        with storage.limits(backoff_s=0.01, backoff_max_s=0.02):
            assert storage.size("s3://nowhere/key") == 1000
    assert requests == ["HEAD /nowhere/key"] * 4
