"""A stand-in for Grafana, and what `counterpoise dashboards push` says to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from tests.dashboards.standin import TOKEN, FakeGrafana
from typer.testing import CliRunner

from counterpoise.cli import app
from counterpoise.contracts import CounterpoiseError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGrafana]:
    for name in [n for n in os.environ if n.startswith("GRAFANA_")]:
        monkeypatch.delenv(name)
    made = FakeGrafana()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def said(fake: FakeGrafana, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `counterpoise dashboards push` prints; the exit code comes first."""
    monkeypatch.setenv("GRAFANA_URL", fake.url)
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["dashboards", "push", *arguments])
        if isinstance(done.exception, CounterpoiseError):
            return f"{done.exception.exit_code} {done.exception}"
        assert done.exception is None, done.exception
        return f"{done.exit_code} {done.output}"

    return run
