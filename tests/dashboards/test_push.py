"""Pushing to a loopback server that takes what Grafana's API description takes, and fails in Grafana's ways."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Done
from tests.dashboards.standin import TOKEN, Answer, FakeGrafana, as_json

from counterpoise.contracts import ConfigError, RefusedError
from counterpoise.dashboards import files, push


@pytest.fixture
def grafana(fake: FakeGrafana) -> push.Grafana:
    return push.Grafana(fake.url, TOKEN, timeout_s=2.0)


DASHBOARDS = files.committed()


def test_a_first_push_makes_everything_and_a_second_changes_nothing(fake: FakeGrafana, grafana: push.Grafana) -> None:
    first = push.push(grafana, DASHBOARDS)
    assert len(first.created) == 4 and not first.changed and not first.unchanged
    assert fake.folders == {"counterpoise": "Counterpoise"}
    for dashboard in DASHBOARDS.values():
        assert fake.dashboards[dashboard["uid"]] == {**dashboard, "id": 7, "version": 1}
    fake.requests.clear()
    again = push.push(grafana, DASHBOARDS)
    assert len(again.unchanged) == 3 and not again.created and not again.changed
    assert not [request for request in fake.requests if request.startswith("POST")]


def test_what_was_edited_in_grafana_is_put_back(fake: FakeGrafana, grafana: push.Grafana) -> None:
    push.push(grafana, DASHBOARDS)
    fake.dashboards["counterpoise-sweep"]["title"] = "mine"
    done = push.push(grafana, DASHBOARDS)
    assert done.changed == ["Counterpoise / Sweep"] and len(done.unchanged) == 2
    assert fake.dashboards["counterpoise-sweep"]["version"] == 2


def test_a_folder_that_somebody_makes_at_the_same_time_is_taken(fake: FakeGrafana, grafana: push.Grafana) -> None:
    for status in (409, 412):
        fake.odd = lambda method, path, s=status: as_json(s, {"message": "x"}) if path == "/api/folders" else None
        assert not push.push(grafana, DASHBOARDS).created[3:]


def test_grafana_below_a_path(fake: FakeGrafana) -> None:
    fake.prefix = "/monitoring/grafana"
    assert push.Grafana(fake.url, TOKEN).version() == "13.0.0"


def test_decisions_become_annotations_once(
    fake: FakeGrafana, said: Callable[..., str], finished: Callable[[str], Done]
) -> None:
    run = finished("aug")
    added = [record for record in run.records("decision") if record["add"]]
    assert added
    text = said("--annotations", run.folder.uri)
    assert f"annotations {len(added)} added, 0 there already" in text
    assert len(fake.annotations) == len(added)
    first = fake.annotations[0]
    assert first["dashboardUID"] == "counterpoise-imbalance" and first["time"] == round(added[0]["time"] * 1000)
    assert first["tags"] == ["counterpoise", "run:whole-aug", "method:aug"]
    assert first["text"].startswith("whole-aug: epoch 1  classifier added to ") and "ratio" in first["text"]
    assert f"annotations 0 added, {len(added)} there already" in said("--annotations", run.folder.uri)
    assert len(fake.annotations) == len(added)


def test_without_a_token_it_only_says_what_it_would_do(
    fake: FakeGrafana, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFANA_TOKEN")
    text = said()
    assert text.startswith("0 ") and "dry run: GRAFANA_TOKEN" in text and "Counterpoise / Sweep" in text
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    assert "dry run; nothing was sent" in said("--dry-run")
    assert fake.requests == []


# --- what goes wrong

SAVE, READ = "/api/dashboards/db", "/api/dashboards/uid/counterpoise-imbalance"
CASES: dict[str, tuple[str, Answer, str]] = {
    "401": (SAVE, as_json(401, {"message": "Invalid API key"}), "refused to save .* with 401 .*wrong or has expired"),
    "403": (SAVE, as_json(403, {"message": "denied"}), "403 .*needs the role Editor"),
    "404": (SAVE, as_json(404, {"message": "Not found"}), "404 .*whole address"),
    "409": (SAVE, as_json(409, {"message": "conflict"}), "409 .*provisioned from files"),
    "412": (SAVE, as_json(412, {"message": "version-mismatch"}), "412 .version-mismatch"),
    "400": (SAVE, as_json(400, {"message": "Cannot save provisioned dashboard"}), "400 .Cannot save provisioned"),
    "400 with a list": (SAVE, as_json(400, ["what"]), "with 400"),
    "500": (SAVE, as_json(500, {"message": "database is locked"}), "failed with 500 .*database is locked"),
    "502 page": (SAVE, (502, "text/html", b"<h1>Bad Gateway</h1>"), "failed with 502"),
    "500 null": (SAVE, (500, "application/json", b"null"), "answered nonsense"),
    "204": (SAVE, (204, "application/json", b""), "the answer is no JSON"),
    "login page": (READ, (200, "text/html", b"<html>log in</html>"), "no JSON; .*login page"),
    "redirect": (READ, (302, "text/html", b""), "redirects elsewhere"),
    "another service": ("/api/health", as_json(200, {"ok": True}), "is no Grafana"),
    "database": ("/api/health", as_json(200, {"database": "failing"}), "trouble with its database: failing"),
    "no dashboard": (READ, as_json(200, ["x"]), "without the dashboard"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_one_clear_error(name: str, fake: FakeGrafana, said: Callable[..., str]) -> None:
    path, answer, pattern = CASES[name]
    fake.odd = lambda method, asked: answer if asked == path else None
    text = said()
    assert text.startswith("4 ") and re.search(pattern, text), text
    assert TOKEN not in text and "\n" not in text.strip()


def test_a_server_that_does_not_answer_in_time(fake: FakeGrafana) -> None:
    def slow(method: str, path: str) -> None:
        time.sleep(1.0)

    fake.odd = slow
    with pytest.raises(push.GrafanaError, match="no answer in time"):
        push.Grafana(fake.url, TOKEN, timeout_s=0.2).version()


def test_nobody_listens(said: Callable[..., str], fake: FakeGrafana, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.server.shutdown()
    fake.server.server_close()
    assert "nobody answers there" in said()


def test_a_token_is_not_sent_over_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="https, or a tunnel"):
        push.Grafana("http://grafana.example.org:3000", TOKEN)
    push.Grafana("https://grafana.example.org", TOKEN)  # asks nothing yet


def test_a_proxy_does_not_see_the_token_of_a_server_on_loopback(
    fake: FakeGrafana, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert push.Grafana(fake.url, TOKEN).version() == "13.0.0"


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("", ConfigError, "is not set"),
        ("grafana.example.org", ConfigError, "give an address"),
        ("https://a.org:port", ConfigError, "no address"),
        ("https://a.org/?orgId=1", ConfigError, "give an address"),
        ("https://me:pass@a.org", RefusedError, "name or password"),
    ],
)
def test_a_wrong_address_is_refused_without_repeating_secrets(
    url: str, error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFANA_URL", url)
    with pytest.raises(error, match=says) as caught:
        push.address()
    assert "pass@" not in str(caught.value)


def test_a_token_file_must_be_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFANA_TOKEN", raising=False)
    place = tmp_path / "token"
    place.write_text(TOKEN + "\n")
    monkeypatch.setenv("GRAFANA_TOKEN_FILE", str(place))
    place.chmod(0o640)
    with pytest.raises(RefusedError, match=r"0640.*chmod 600"):
        push.token()
    place.chmod(0o600)
    assert push.token() == TOKEN
    place.write_text("two words")
    with pytest.raises(ConfigError, match="holds no token") as caught:
        push.token()
    assert "two words" not in str(caught.value)
    place.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        push.token()


# --- a real Grafana, where one is named


@pytest.mark.skipif(
    not (os.environ.get("GRAFANA_URL") and os.environ.get("GRAFANA_TOKEN")),
    reason="off unless GRAFANA_URL and GRAFANA_TOKEN name a Grafana that may be written to",
)
def test_a_real_grafana_takes_the_dashboards() -> None:
    secret = push.token()
    assert secret is not None
    grafana = push.Grafana(push.address(), secret)
    grafana.version()
    push.push(grafana, DASHBOARDS)
    assert len(push.push(grafana, DASHBOARDS).unchanged) == 3
    for dashboard in DASHBOARDS.values():
        there = grafana.dashboard(dashboard["uid"])
        assert there is not None and len(there["panels"]) == len(dashboard["panels"])
    tags = ["counterpoise", f"run:test-{time.time():.0f}"]
    grafana.annotate(push.ANNOTATED, round(time.time() * 1000), tags, "a test")
    assert [one["text"] for one in grafana.annotations(push.ANNOTATED, tags)] == ["a test"]
    with urllib.request.urlopen(f"{grafana.url}/api/health", timeout=20) as answer:
        assert json.load(answer)["database"] == "ok"
