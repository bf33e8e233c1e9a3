"""Prometheus, and Grafana where it is installed, beside runs of this machine: on loopback, until Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from counterpoise import storage
from counterpoise.contracts import ConfigError, ResourceError
from counterpoise.dashboards import files
from counterpoise.telemetry.emitter import clean_targets
from counterpoise.wording import duration

LOOPBACK = "127.0.0.1"
PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
READY_S = 90.0  # a machine that trains is busy
STOP_S = 20.0
POLL_S = 0.2
LOOK_S = 1.0  # between two looks at what is scraped
_HOMES = ("/usr/share/grafana", "/opt/homebrew/share/grafana", "/usr/local/share/grafana")


@dataclass(frozen=True)
class Places:
    """targets: where runs register. data: ours alone. Ports: 0 for any that is free."""

    targets: str
    data: str
    port: int = PROMETHEUS_PORT
    grafana_port: int = GRAFANA_PORT
    retention: str = "30d"

    @classmethod
    def of(cls, runs: str, targets: str | None, data: str | None, port: int, grafana_port: int, keep: str) -> Places:
        """What the command line says. targets, data: None for `.metrics` and `.monitor` where the runs are."""
        for name, value in (("--metrics-sd", targets), ("--data", data)):
            if not storage.is_local(value or runs):
                raise ConfigError(f"{name}: give a folder of this machine; runs lie at {storage.show(runs)}")
        return cls(
            targets=storage.local_path(targets or storage.join(runs, ".metrics")),
            data=storage.local_path(data or storage.join(runs, ".monitor")),
            port=port,
            grafana_port=grafana_port,
            retention=keep,
        )


@dataclass(frozen=True)
class Running:
    """What is up: addresses, None for what is not there. check: raises ResourceError if a server has ended."""

    prometheus: str
    grafana: str | None
    check: Callable[[], None]


@contextmanager
def stack(
    places: Places, say: Callable[[str], None], *, grafana: bool = True, stopped: Callable[[], object] = bool
) -> Iterator[Running]:
    """Start the servers and stop them when the block ends. stopped: asked while they start."""
    started: list[Server] = []

    def check() -> None:
        for one in started:
            one.check()

    try:
        server = start_prometheus(places, say)
        started.append(server)
        server.wait_until("/-/ready", stopped)
        shown = None
        if grafana and (command := _grafana_command()) is None:
            say("grafana     not installed; `counterpoise dashboards preview` draws the dashboards without it")
        elif grafana and command is not None:
            started.append(start_grafana(command, places, server.url))
            started[-1].wait_until("/api/health", stopped)
            shown = started[-1].url
        yield Running(server.url, shown, check)
    finally:
        for one in reversed(started):
            one.stop()


def monitor(places: Places, stopped: Callable[[], object], say: Callable[[str], None]) -> None:
    """`counterpoise monitor`: the servers until `stopped` says so, or one of them ends."""
    with stack(places, say, stopped=stopped) as running:
        say(f"prometheus  {running.prometheus}  alerts {running.prometheus}/alerts")
        if running.grafana is not None:
            say(f"grafana     {running.grafana}/d/counterpoise-imbalance")
        say(f"targets     {places.targets}: train with --runs there, or with --metrics-sd {places.targets}")
        say(f"data        {places.data}, kept for {places.retention}; Ctrl-C stops the servers")
        seen = None
        while True:
            now = targets_up(running.prometheus)
            time.sleep(LOOK_S)
            if stopped():  # asked last: Ctrl-C reaches the servers as well
                return
            running.check()
            if now is not None and now != seen:
                seen = now
                say(f"scraping    {', '.join(f'{n} {job}' for job, n in now.items()) or 'nothing yet'}")


def targets_up(prometheus: str) -> dict[str, int] | None:
    """Targets that answer, by job; None if Prometheus does not say."""
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/targets?state=active", timeout=5) as answer:
            found = json.load(answer)["data"]["activeTargets"]
    except (OSError, ValueError, KeyError):
        return None
    up: dict[str, int] = {}
    for target in found:
        if target.get("health") == "up":
            job = str(target["labels"].get("job"))
            up[job] = up.get(job, 0) + 1
    return up


# --- servers


@dataclass
class Server:
    """A child process, its address, and its log."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def check(self) -> None:
        if (code := self.process.poll()) is not None:
            raise ResourceError(f"{self.name} ended with code {code}: {self.last_words()}")

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"{' | '.join(lines[-3:])[-600:] or 'it said nothing'} (all of it in {self.log})"

    def wait_until(self, ready: str, stopped: Callable[[], object] = bool) -> None:
        """Until `ready`, a path, answers with 200. Raises KeyboardInterrupt if `stopped` says so before."""
        began = time.monotonic()
        while time.monotonic() - began < READY_S:
            if stopped():
                raise KeyboardInterrupt
            self.check()
            try:
                with urllib.request.urlopen(self.url + ready, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            time.sleep(POLL_S)
        raise ResourceError(f"{self.name} was not ready within {duration(READY_S)}: {self.last_words()}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_prometheus(places: Places, say: Callable[[str], None]) -> Server:
    """A Prometheus that scrapes what registers in `places.targets`; not yet ready."""
    command = shutil.which("prometheus")
    if command is None:
        raise ResourceError(
            "prometheus is not installed; apt-get install prometheus (Debian, Ubuntu), brew install prometheus, or "
            f"with containers: docker compose -f {files.root() / 'compose.yaml'} up"
        )
    port = _port(places.port, "--port")
    storage.make_folder(places.targets)
    clean_targets(places.targets)
    data = Path(places.data)
    storage.make_folder(str(data))
    config = data / "prometheus.yml"
    found = {"node": files.NODE_TARGET, "gpu": files.GPU_TARGET}
    exporters = {name: place if _listens(f"http://{place}") else None for name, place in found.items()}
    for name, target in exporters.items():
        say(f"{name:11} {'scraped at ' + target if target else 'no exporter at ' + found[name]}")
    ray = os.path.join(os.environ.get("RAY_TMPDIR") or "/tmp/ray", Path(files.RAY_TARGETS).name)
    text = files.config_text(
        targets=os.path.join(places.targets, "*.json"), rules=str(files.root() / files.RULES), ray=ray, **exporters
    )
    storage.write_text(str(config), text, durable=False)
    arguments = [
        f"--config.file={config}",
        f"--storage.tsdb.path={data / 'tsdb'}",
        f"--storage.tsdb.retention.time={places.retention}",
        f"--web.listen-address={LOOPBACK}:{port}",
    ]
    return _start("Prometheus", [command, *arguments], f"http://{LOOPBACK}:{port}", data / "prometheus.log")


def _grafana_command() -> list[str] | None:
    if command := shutil.which("grafana"):
        return [command, "server"]
    command = shutil.which("grafana-server")
    return [command] if command else None


def start_grafana(command: list[str], places: Places, prometheus: str) -> Server:
    """A Grafana with our data source and dashboards; whoever reaches the loopback may look, nobody may log in."""
    port = _port(places.grafana_port, "--grafana-port")
    data = Path(places.data) / "grafana"
    storage.make_folder(str(data))
    root = files.root()
    environment = {
        "GF_SERVER_HTTP_ADDR": LOOPBACK,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_PATHS_DATA": str(data),
        "GF_PATHS_LOGS": str(data / "log"),
        "GF_PATHS_PLUGINS": str(data / "plugins"),
        "GF_PATHS_PROVISIONING": str(root / files.PROVISIONING),
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(root / files.BOARDS / "imbalance.json"),
        "COUNTERPOISE_PROMETHEUS_URL": prometheus,
        "COUNTERPOISE_DASHBOARDS": str(root / files.BOARDS),
    }
    home = next((place for place in _HOMES if os.path.isdir(place)), None)
    arguments = [*command, *([f"--homepath={home}"] if home else [])]
    return _start("Grafana", arguments, f"http://{LOOPBACK}:{port}", Path(places.data) / "grafana.log", environment)


def _start(name: str, command: list[str], url: str, log: Path, environment: Mapping[str, str] | None = None) -> Server:
    # Tokens and keys of ours are no business of the servers.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "GRAFANA_", "WANDB_", "HF_"))}
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**inherited, **(environment or {})},
        )
    return Server(name, process, url, log)


def _port(wanted: int, flag: str) -> int:
    """A port that nobody has; `wanted`, or any for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            raise ConfigError(
                f"{flag} {wanted} cannot be had ({error.strerror}); give another one, or 0 for any that is free"
            ) from None
        return int(probe.getsockname()[1])


def _listens(url: str) -> bool:
    host, _, port = url.rpartition("/")[2].partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
