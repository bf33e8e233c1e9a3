"""Rules under promtool, and every expression of the dashboards asked of a Prometheus that scrapes real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Container, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cases import SMALL
from tests.conftest import Run, new_folder, settings
from tests.dashboards.needs import need_preview, need_prometheus

from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, NonFiniteLossError, ResourceError
from counterpoise.dashboards import checks, files, preview, promql, stack
from counterpoise.telemetry.emitter import Options, emitting
from counterpoise.telemetry.feed import following

FOREIGN = Path(__file__).with_name("foreign.prom")
PROMETHEUS = files.root() / "prometheus"
WAIT_S = 120.0


def test_promtool_is_content_with_rules_and_configuration(tmp_path: Path) -> None:
    need_prometheus()
    assert checks.promtool(["check", "rules", "rules.yml"], PROMETHEUS) == []
    for name in ("prometheus.yml", "rules.yml"):
        (tmp_path / name).write_text((PROMETHEUS / name).read_text())
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "a.json").write_text('[{"targets": ["127.0.0.1:1"], "labels": {"host": "h"}}]')
    assert checks.promtool(["check", "config", "prometheus.yml"], tmp_path) == []


def test_every_alert_fires_when_it_should() -> None:
    need_prometheus()
    assert checks.promtool(["test", "rules", "rules_test.yml"], PROMETHEUS) == []
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    tried = [case for test in tests for case in test["alert_rule_test"]]
    for alert in [rule["alert"] for group in rules for rule in group["rules"] if "alert" in rule]:
        assert [case for case in tried if case["alertname"] == alert and case["exp_alerts"]], f"{alert} never fires"
        assert [case for case in tried if case["alertname"] == alert and not case["exp_alerts"]], (
            f"{alert} always fires"
        )


@pytest.mark.parametrize("alert", ["CounterpoiseGapWide", "CounterpoiseRunStalled", "CounterpoiseCheckpointOld"])
def test_another_threshold_fails_the_tests_of_the_rules(alert: str, tmp_path: Path) -> None:
    need_prometheus()
    content = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    (rule,) = [r for group in content["groups"] for r in group["rules"] if r.get("alert") == alert]
    for old, new in (("> 0.20", "> 0.30"), ("> 300", "> 3000"), ("> 1800", "> 18000")):
        rule["expr"] = rule["expr"].replace(old, new)
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(content))
    (tmp_path / "rules_test.yml").write_text((PROMETHEUS / "rules_test.yml").read_text())
    (complaint,) = checks.promtool(["test", "rules", "rules_test.yml"], tmp_path)
    assert alert in complaint


# --- a Prometheus that scrapes


class _Foreign(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(FOREIGN.read_bytes())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    """host:port of something that exposes what Ray, node-exporter and DCGM do."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Foreign)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def prometheus(tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address of a Prometheus that looks every second, and the folder where runs register."""
    need_prometheus()
    sources = tmp_path / "dashboards"
    (sources / "prometheus").mkdir(parents=True)
    rules = (PROMETHEUS / "rules.yml").read_text().replace("interval: 10s", "interval: 1s")
    (sources / files.RULES).write_text(rules)
    monkeypatch.setattr(files, "root", lambda: sources)
    monkeypatch.setattr(files, "SCRAPE_S", 1)
    monkeypatch.setattr(files, "NODE_TARGET", foreign)
    monkeypatch.setattr(files, "GPU_TARGET", foreign)
    ray = tmp_path / "ray"
    ray.mkdir()
    (ray / Path(files.RAY_TARGETS).name).write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [foreign]}]))
    monkeypatch.setenv("RAY_TMPDIR", str(ray))
    places = stack.Places(str(tmp_path / "targets"), str(tmp_path / "data"), port=0)
    with stack.stack(places, lambda text: None, grafana=False) as running:
        yield running.prometheus, tmp_path / "targets"


def ask(prometheus: str, expr: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": expr})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=30) as answer:
        found = json.load(answer)
    assert found["status"] == "success", found
    result: list[dict[str, Any]] = found["data"]["result"]
    return result


def unanswered(prometheus: str, among: Container[str] | None = None) -> list[str]:
    """Expressions of the committed dashboards that have no data now; among: look at these only."""
    names = ("corpus", "method", "run", "modality", "sweep")
    values = {name: ".*" for name in names} | {"split": "valid"} | promql.usual_values(range_s=300)
    missing = []
    for dashboard in COMMITTED.values():
        for use in promql.uses(dashboard):
            expr, name = use.expr.replace('run="$run"', 'run=~"$run"'), f"{use.where}: {use.expr}"
            if (among is None or name in among) and not ask(prometheus, promql.fill(expr, values)):
                missing.append(name)
    return missing


COMMITTED = files.committed()


@pytest.mark.timeout(600)
def test_every_expression_has_an_answer_while_runs_train(
    prometheus: tuple[str, Path], corpus: str, run_experiment: Run, tmp_path: Path
) -> None:
    """Runs of three methods that end well and one that fails, then one that trains while Prometheus is asked."""
    address, targets = prometheus
    root = tmp_path / "runs"

    def train(name: str, stop: Callable[[], str | None] | None = None, **changes: Any) -> None:
        content = settings(corpus, **changes)
        experiment, provenance = resolve(content)
        folder = new_folder(root, experiment, provenance, name)
        with following({folder.uri: False}):
            run_experiment(content, folder=folder, stop=stop, checkpoint_every_s=0.0)

    left: list[str] | None = None
    steps, until = iter(range(10_000)), float("inf")

    def stop() -> str | None:
        nonlocal left, until
        step = next(steps)
        if step == 30:  # the fourth epoch: ACA has acted
            until = time.monotonic() + WAIT_S
        if step >= 30 and left != [] and time.monotonic() < until:
            time.sleep(1.0)  # Prometheus looks once between two steps, and sees counters grow
            left = unanswered(address, left)
        return None

    with emitting(Options(0, folder=str(targets), linger_s=0.0), str(root), "tests"):
        train("g-blend", method=SMALL["g_blend"])
        train("ogm-ge", method=SMALL["ogm_ge"])
        with pytest.raises(NonFiniteLossError):
            train("nan", method="joint", optim={"lr": 1e30})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("counterpoise.engine.loop.CONTROL_INTERVAL_S", 0.0)
            train("aug", stop, method={**SMALL["aug"], "weights": "fixed"}, epochs=6)
    assert left == []
    # The endpoint is named by host and session, so that a resumed run goes on in the same series.
    found = ask(address, 'count by (instance) (last_over_time(counterpoise_run_info{run="aug"}[5m]))')
    assert [one["metric"]["instance"].partition("/")[2] for one in found] == ["tests"]
    assert {one["metric"]["alertname"] for one in ask(address, "last_over_time(ALERTS[5m])")} >= {
        "CounterpoiseRunFailed",
        "CounterpoiseLossNotFinite",
    }


def test_an_expression_without_series_is_noticed(prometheus: tuple[str, Path]) -> None:
    """The test above can fail: nothing trains here."""
    assert len(unanswered(prometheus[0])) > 50


# --- counterpoise monitor


def test_monitor_runs_until_ctrl_c_and_leaves_nothing_behind(tmp_path: Path) -> None:
    need_prometheus()
    environment = {**os.environ, "GRAFANA_TOKEN": "secret-of-mine", "PYTHONPATH": str(files.root().parent / "platform")}
    process = subprocess.Popen(
        [sys.executable, "-m", "counterpoise", "monitor", "--runs", str(tmp_path / "runs"), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("scraping"):
            break
    (address,) = [line.split()[1] for line in said if line.startswith("prometheus")]
    assert address.startswith("http://127.0.0.1:")
    (child,) = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert "secret-of-mine" not in Path(f"/proc/{child}/environ").read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, said
    process.stderr.close()
    assert not Path(f"/proc/{child}").exists()
    assert (tmp_path / "runs" / ".monitor" / "tsdb").is_dir() and (tmp_path / "runs" / ".metrics").is_dir()


def test_a_wish_to_stop_ends_the_start(tmp_path: Path) -> None:
    need_prometheus()
    places = stack.Places.of(str(tmp_path / "runs"), None, None, 0, 0, "1d")
    with pytest.raises(KeyboardInterrupt), stack.stack(places, lambda text: None, stopped=lambda: "SIGINT"):
        pass
    # Nothing of it goes on: its data folder can be had again.
    with stack.stack(places, lambda text: None, grafana=False) as running:
        running.check()
        assert stack.targets_up(running.prometheus) == {}


def test_monitor_says_which_port_is_taken(tmp_path: Path, foreign: str) -> None:
    need_prometheus()
    port = int(foreign.partition(":")[2])
    places = stack.Places.of(str(tmp_path), None, None, port, 0, "1d")
    with pytest.raises(ConfigError, match=f"--port {port} cannot be had"), stack.stack(places, lambda text: None):
        pass


def test_monitor_without_prometheus_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    places = stack.Places.of(str(tmp_path), None, None, 0, 0, "1d")
    with pytest.raises(ResourceError, match="apt-get install prometheus"), stack.stack(places, lambda text: None):
        pass


def test_a_server_that_dies_at_once_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "prometheus"
    script.write_text("#!/bin/sh\necho the disk is full; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    places = stack.Places.of(str(tmp_path / "runs"), None, None, 0, 0, "1d")
    with pytest.raises(ResourceError, match="code 3: the disk is full"), stack.stack(places, lambda text: None):
        pass


def test_runs_in_a_bucket_need_a_folder_for_targets() -> None:
    with pytest.raises(ConfigError, match="--metrics-sd"):
        stack.Places.of("s3://bucket/runs", None, None, 0, 0, "1d")


GRAFANA = """#!{python}
import http.server, json, os
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({{k: v for k, v in os.environ.items() if k[:3] in ("GF_", "COU")}}).encode())
    def log_message(self, *a): pass
address = (os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"]))
http.server.HTTPServer(address, H).serve_forever()
"""


def test_grafana_where_it_is_installed_gets_our_files_and_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for Grafana: what it is told."""
    program = tmp_path / "grafana-server"
    program.write_text(GRAFANA.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    places = stack.Places.of(str(tmp_path / "runs"), None, None, 0, 0, "1d")
    storage = tmp_path / "runs" / ".monitor"
    storage.mkdir(parents=True)
    server = stack.start_grafana([str(program)], places, "http://127.0.0.1:9")
    try:
        server.wait_until("/api/health")
        with urllib.request.urlopen(server.url + "/api/health", timeout=10) as answer:
            told = json.load(answer)
    finally:
        server.stop()
    assert told["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert told["COUNTERPOISE_PROMETHEUS_URL"] == "http://127.0.0.1:9"
    assert not [name for name in told if "PASSWORD" in name]
    for name in ("GF_PATHS_PROVISIONING", "COUNTERPOISE_DASHBOARDS", "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"):
        assert Path(told[name]).exists(), name
    uids = yaml.safe_load((Path(told["GF_PATHS_PROVISIONING"]) / "datasources" / "counterpoise.yaml").read_text())
    assert uids["datasources"][0]["url"] == "$COUNTERPOISE_PROMETHEUS_URL"


# --- preview


@pytest.mark.timeout(600)
def test_a_preview_has_panels_without_errors(prometheus: tuple[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files, "root", lambda: ROOT)
    need_preview()
    drawn = preview.preview(prometheus[0], str(tmp_path / "out"), range_s=60)
    assert [picture.errors for picture in drawn] == [[], [], []]
    _, sweep, training = sorted(drawn, key=lambda picture: picture.file)
    assert (sweep.panels, training.panels) == (12, 31)
    assert Path(training.file).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not {"Scrape targets", "CPU busy", "GPU busy", "CPU of Ray's nodes"} & set(training.empty)
    assert "Leaderboard" in sweep.empty  # nothing trains


ROOT = files.root()


def test_a_preview_without_its_code_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ResourceError, match="preview --install"):
        preview.preview("http://127.0.0.1:9", str(tmp_path))


def test_a_preview_of_an_unknown_dashboard_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'sweep'.*imbalance, sweep, training"):
        preview.preview("http://127.0.0.1:9", str(tmp_path), boards=["sweeps"])
