"""Pushing against the description of Grafana's API (contract/grafana.yaml), which Prism holds both sides to.

As a proxy before the stand-in it refuses requests and answers that do not fit; alone it answers with any status that is
described. Pages, redirects and answers that are no JSON are in no description: test_push.py has them.
"""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import yaml
from tests.conftest import Done
from tests.dashboards import prism
from tests.dashboards.needs import need_prism
from tests.dashboards.standin import TOKEN, FakeGrafana, as_json

from counterpoise.dashboards import files, push
from counterpoise.dashboards.stack import Server

DASHBOARDS = files.committed()
DESCRIPTION: dict[str, Any] = yaml.safe_load(prism.DESCRIPTION.read_text())
SWEEP = {"uid": "counterpoise-sweep", "title": "Sweep"}
# What asks for each operation of the description.
CALLS: dict[str, Callable[[push.Grafana], object]] = {
    "GET /api/health": lambda grafana: grafana.version(),
    "GET /api/folders/{uid}": lambda grafana: grafana.make_folder("counterpoise", "Counterpoise"),
    "POST /api/folders": lambda grafana: grafana.make_folder("counterpoise", "Counterpoise"),
    "GET /api/dashboards/uid/{uid}": lambda grafana: grafana.dashboard("counterpoise-sweep"),
    "POST /api/dashboards/db": lambda grafana: grafana.save(SWEEP, "counterpoise", "a test"),
    "GET /api/annotations": lambda grafana: grafana.annotations("counterpoise-imbalance", ["counterpoise", "run:a"]),
    "POST /api/annotations": lambda grafana: grafana.annotate("counterpoise-imbalance", 1, ["counterpoise"], "a test"),
}
# What comes of those answers that are no failure.
FINE: dict[tuple[str, int], object] = {
    ("GET /api/health", 200): "13.0.0",
    ("GET /api/folders/{uid}", 200): False,
    ("GET /api/folders/{uid}", 404): True,  # it is made then
    ("POST /api/folders", 200): True,
    ("POST /api/folders", 409): False,  # somebody was quicker
    ("GET /api/dashboards/uid/{uid}", 200): {"id": 7, "uid": "counterpoise-sweep", "title": "Edited", "version": 3},
    ("GET /api/dashboards/uid/{uid}", 404): None,
    ("POST /api/dashboards/db", 200): None,
    ("GET /api/annotations", 200): [{"id": 65, "time": 1, "tags": ["counterpoise"], "text": "another"}],
    ("POST /api/annotations", 200): None,
}
SAYS = {401: "wrong or has expired", 403: "the role Editor", 404: "the whole address", 412: "at the same time"}
ANSWERS = [
    (f"{method.upper()} {path}", int(status))
    for path, operations in DESCRIPTION["paths"].items()
    for method, operation in operations.items()
    for status in operation["responses"]
]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_prism()
    with prism.serving(tmp_path_factory.mktemp("prism")) as server:
        yield server


@pytest.fixture
def proxy(
    fake: FakeGrafana, said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    need_prism()
    with prism.serving(tmp_path, upstream=fake.url) as server:
        monkeypatch.setenv("GRAFANA_URL", server.url)  # instead of the stand-in's, which `said` names
        fake.requests.clear()
        yield server


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int, str | None]]]:
    """Lets Prism answer requests, given as "METHOD path", with a status.

    Gives the list of what was asked: request, status, and what Prism found wrong.
    """
    send = requests.adapters.HTTPAdapter.send

    def prefer(**statuses: int) -> list[tuple[str, int, str | None]]:
        seen: list[tuple[str, int, str | None]] = []

        def sending(self: Any, request: requests.PreparedRequest, *rest: Any, **more: Any) -> requests.Response:
            what = f"{request.method} {urlsplit(str(request.url)).path}"
            if what in statuses:
                request.headers["Prefer"] = f"code={statuses[what]}"
            answer = send(self, request, *rest, **more)
            seen.append((what, answer.status_code, answer.headers.get("sl-violations")))
            return answer

        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", sending)
        return seen

    return prefer


def test_what_is_pushed_and_answered_is_as_described(
    proxy: Server, fake: FakeGrafana, said: Callable[..., str], finished: Callable[[str], Done]
) -> None:
    """All that a push does, through the proxy: made, left alone, put back."""
    run = finished("aug").folder.uri
    first = said("--annotations", run)
    assert first.startswith("0 ") and first.count("created ") == 4 and "0 there already" in first, first
    assert {dashboard["uid"] for dashboard in DASHBOARDS.values()} == set(fake.dashboards) and fake.annotations
    again = said("--annotations", run)
    assert again.count("unchanged ") == 3 and "annotations 0 added" in again, again
    fake.dashboards["counterpoise-sweep"]["title"] = "mine"
    assert "changed     Counterpoise / Sweep" in said()
    used = {request.replace("/uid/" + request.rsplit("/", 1)[-1], "/uid/{uid}") for request in fake.requests}
    assert {one.replace("folders/counterpoise", "folders/{uid}") for one in used} == set(CALLS)


def test_every_answer_that_is_described_has_a_case() -> None:
    assert {operation for operation, _ in ANSWERS} == set(CALLS) and set(FINE) <= set(ANSWERS)
    assert {401, 404, 409, 412, 500} <= {status for _, status in ANSWERS}


@pytest.mark.parametrize(("operation", "status"), ANSWERS)
def test_every_answer_is_understood(
    operation: str, status: int, mock: Server, asked: Callable[..., list[tuple[str, int, str | None]]]
) -> None:
    path = operation.replace("folders/{uid}", "folders/counterpoise").replace("{uid}", "counterpoise-sweep")
    before = {"GET /api/folders/counterpoise": 404} if operation == "POST /api/folders" else {}
    seen = asked(**before, **{path: status})
    grafana = push.Grafana(mock.url, TOKEN)
    if (operation, status) in FINE:
        assert CALLS[operation](grafana) == FINE[operation, status]
    else:
        with pytest.raises(push.GrafanaError) as caught:
            CALLS[operation](grafana)
        text = str(caught.value)
        assert f" {status} " in text and SAYS.get(status, "") in text and TOKEN not in text
        assert ("failed with" if status >= 500 else "refused to") in text
        assert "what Grafana says" in text or operation == "GET /api/health", "Grafana's own words"
    assert (path, status, None) in seen and not [one for one in seen if one[2]], "and nothing was wrong with a request"


def test_prism_refuses_what_grafana_would(mock: Server) -> None:
    """The tests above can fail."""
    grafana = push.Grafana(mock.url, TOKEN)
    with pytest.raises(push.GrafanaError, match="add an annotation with 400"):
        grafana.annotate("counterpoise-imbalance", "soon", [], "a test")  # type: ignore[arg-type]
    with pytest.raises(push.GrafanaError, match="save the dashboard  with 422"):
        grafana.save({"uid": "counterpoise-sweep", "title": ""}, "counterpoise", "a test")
    with pytest.raises(push.GrafanaError, match="with 401"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("grafana_api.grafana_api.TokenAuth.__call__", lambda self, request: request)
        grafana.dashboard("counterpoise-sweep")


def test_an_answer_that_is_not_as_described_is_noticed(proxy: Server, fake: FakeGrafana) -> None:
    fake.odd = lambda method, path: as_json(200, {"database": "ok", "version": 13}) if path == "/api/health" else None
    with pytest.raises(push.GrafanaError, match="failed with 500"):
        push.Grafana(proxy.url, TOKEN).version()


def test_an_answer_that_does_not_come(mock: Server) -> None:
    grafana = push.Grafana(mock.url, TOKEN, timeout_s=0.5)
    mock.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(push.GrafanaError, match="no answer in time"):
            push.push(grafana, DASHBOARDS)
    finally:
        mock.process.send_signal(signal.SIGCONT)
    with urllib.request.urlopen(f"{mock.url}/api/health", timeout=30) as answer:
        assert json.load(answer)["database"] == "ok"
