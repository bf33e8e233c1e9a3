"""Metrics for Prometheus: one HTTP endpoint per command, for all runs that it executes.

The numbers come from the runs' folders through a feed, so that a training step does nothing for them. Prometheus finds
the endpoint by a file in a folder (its `file_sd_configs`), which exists as long as the endpoint does. Whatever goes
wrong here is a warning: neither a port that is taken, nor a client that hangs, nor a full disk touches a run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import MetricsHandler

from counterpoise import __version__, storage
from counterpoise.contracts import ConfigError, CounterpoiseError, Record
from counterpoise.plain import NotPlain, read_yaml
from counterpoise.telemetry.catalogue import LABEL_LENGTH, LIMITS, METRICS, PREFIX
from counterpoise.telemetry.feed import Feed, feeding
from counterpoise.telemetry.state import RunState

LOOPBACK = "127.0.0.1"
CLIENT_S = 5.0  # a client that has not sent its request, or read the answer, by then is dropped
CLIENTS = 16  # at a time; more are turned away
READERS = 100  # that are told apart
KEEP_S = 300.0  # a run that has ended is shown for so long: Prometheus looks back five minutes
KEEP = 32  # runs that have ended are shown at most, the latest: series of a sweep of hundreds stay below 2000
BEAT_S = 10.0  # between two looks at whether our file is still there
PUBLISH_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 20.0, 60.0  # for the last scrape
_META = "__meta_counterpoise_"
_MOST_LEFT_OUT = 10_000  # values that are remembered, to count each once

# All samples of all runs, with the values of every label of their metric in order.
Samples = dict[str, list[tuple[tuple[str, ...], float]]]


@dataclass(frozen=True)
class Options:
    """Where and how a command shows its metrics.

    port: 0 for any that is free. address: to listen at. folder: for the file that Prometheus finds us by; None: none.
    linger_s: how long to wait for one more scrape at the end; None: only if there were scrapes, as long as they take.
    """

    port: int = 0
    address: str = LOOPBACK
    folder: str | None = None
    linger_s: float | None = None

    @classmethod
    def parse(cls, port: str, address: str, folder: str | None, linger_s: float | None, runs: str) -> Options | None:
        """From the words of the command line; None for `off`. folder: None for `.metrics` where the runs are."""
        if port == "off":
            return None
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ConfigError(f"--metrics-port is {port!r}; give a port, 0 for any free one, or off")
        if folder is None and storage.is_local(runs):
            folder = os.path.join(storage.local_path(runs), ".metrics")
        elif folder is not None and not storage.is_local(folder):
            raise ConfigError(f"--metrics-sd is {storage.show(folder)!r}; Prometheus reads a folder of this machine")
        return cls(int(port), address, folder, linger_s)


@dataclass
class _Run:
    """A run that is shown. labels: the values of `RUN`."""

    name: str
    sweep: str
    state: RunState = field(default_factory=RunState)
    facts: dict[str, Any] = field(default_factory=dict)  # of its experiment, until it has begun
    ended: float | None = None
    known: dict[str, set[str]] = field(default_factory=dict)  # values of bounded labels

    @property
    def labels(self) -> tuple[str, str, str] | None:
        """None as long as nothing is known of the run."""
        start = self.facts | self.state.start
        if "corpus" not in start or "method" not in start:
            return None
        return self.name, corpus_name(str(start["corpus"])), _label(str(start["method"]))

    def info(self) -> dict[str, str]:
        start = self.facts | self.state.start
        values = {key: start.get(key) for key in ("seed", "protocol", "workers", "device", "parameters")}
        values |= {"sweep": self.sweep, "modalities": ",".join(self.state.modalities), "version": __version__}
        return {key: _label("" if value is None else str(value)) for key, value in values.items()}


class Metrics:
    """A sink of a feed: keeps where its runs stand, and gives it as metrics."""

    name = "metrics"

    def __init__(self, root: str = "") -> None:
        """root: the folder of runs; a run is named by its place below it."""
        self._root = root.rstrip("/")
        self._runs: dict[str, _Run] = {}
        self._mutex = threading.Lock()
        self._unusable = 0
        self.settled = float("-inf")  # since when nothing new is to be read, because the last run has ended
        self._left_out: dict[str, set[tuple[str, str]]] = {}

    # --- of the feed

    def begin(self, uri: str, records: Sequence[Record]) -> None:
        name = self._name(uri)
        run = _Run(name, name.rpartition("/")[0], facts=_experiment(uri))
        with self._mutex:
            self._forget()
            self._runs.pop(uri, None)
            if len(self._runs) >= LIMITS["run"]:
                self._leave_out("run", "", name)
                return
            self._runs[uri] = run
            if records:
                self._try(run.state.look_back, records)

    def record(self, uri: str, record: Record) -> None:
        with self._mutex:
            if run := self._runs.get(uri):
                self._try(run.state.take, record)

    def status(self, uri: str, state: str, status: Mapping[str, Any]) -> None:
        with self._mutex:
            if run := self._runs.get(uri):
                self._try(run.state.take_status, state, status)

    def end(self, uri: str) -> None:
        with self._mutex:
            if run := self._runs.get(uri):
                run.ended = self.settled = time.monotonic()

    def _name(self, uri: str) -> str:
        uri = uri.rstrip("/")
        if self._root and uri.startswith(self._root + "/"):
            return _label(uri[len(self._root) + 1 :])
        return _label(uri.rsplit("/", 1)[-1])

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except (TypeError, ValueError, KeyError, AttributeError):  # a record that makes no sense; it is in the file
            self._unusable += 1

    def _forget(self) -> None:
        now = time.monotonic()
        ended = sorted((run.ended, uri) for uri, run in self._runs.items() if run.ended is not None)
        for number, (when, uri) in enumerate(reversed(ended)):
            if number >= KEEP or now - when > KEEP_S:
                del self._runs[uri]

    # --- for Prometheus

    def samples(self) -> Samples:
        """What all runs have to show now, by full name of the metric."""
        found: Samples = {metric.name: [] for metric in METRICS}
        with self._mutex:
            self._forget()
            for run in self._runs.values():
                if (labels := run.labels) is None:
                    continue
                for name, values, number in run.state.samples():
                    if self._admit(run, name, values):
                        found[PREFIX + name].append(((*labels, *map(_label, values)), number))
            found[PREFIX + "exporter_left_out_total"] = [
                ((label,), float(len(self._left_out.get(label, ())))) for label in LIMITS
            ]
            found[PREFIX + "exporter_unusable_records_total"] = [((), float(self._unusable))]
        return found

    def infos(self) -> list[tuple[tuple[str, ...], dict[str, str]]]:
        """Labels and content of `run_info`."""
        with self._mutex:
            return [(run.labels, run.info()) for run in self._runs.values() if run.labels is not None]

    def _admit(self, run: _Run, name: str, values: tuple[str, ...]) -> bool:
        """Whether a sample may be shown; a label's values beyond its limit may not."""
        for label, value in zip(_LABELS[name], values, strict=True):
            limit = LIMITS.get(label)
            if limit is None:
                continue
            known = run.known.setdefault(label, set())
            if value in known:
                continue
            if len(known) >= limit:
                self._leave_out(label, run.name, value)
                return False
            known.add(value)
        return True

    def _leave_out(self, label: str, run: str, value: str) -> None:
        left = self._left_out.setdefault(label, set())
        if len(left) < _MOST_LEFT_OUT:
            left.add((run, value))

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants it."""
        samples = self.samples()
        for metric in METRICS:
            if metric.kind == "info":
                info = InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, labels=metric.all_labels[:3])
                for labels, content in self.infos():
                    info.add_metric(labels, content)
                yield info
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.all_labels)
            for labels, value in samples[metric.name]:
                family.add_metric(labels, value)
            yield family


_LABELS = {metric.name.removeprefix(PREFIX): metric.labels for metric in METRICS}


def _experiment(uri: str) -> dict[str, Any]:
    """What a run's experiment says of it; {} if it cannot be read."""
    try:
        content = read_yaml(storage.read_text(storage.join(uri, "experiment.yaml")))
        method = content["method"]["name"] if isinstance(content["method"], dict) else content["method"]
        return {key: content.get(key) for key in ("corpus", "seed", "protocol")} | {"method": method}
    except (CounterpoiseError, OSError, NotPlain, KeyError, TypeError, AttributeError):
        return {}


def corpus_name(place: str) -> str:
    """A corpus in one word: its name, or the folder of its card."""
    parts = [part for part in place.split("/") if part]
    if len(parts) > 1 and parts[-1] in ("corpus.yaml", "corpus.yml"):
        parts.pop()
    return _label(parts[-1]) if parts else ""


def _label(value: str) -> str:
    """A label's value: printable, and not too long."""
    clean = "".join(c if c.isprintable() else "?" for c in value)
    return clean if len(clean) <= LABEL_LENGTH else clean[: LABEL_LENGTH - 3] + "..."


# --- the endpoint


class _Handler(MetricsHandler):
    """/metrics and nothing else."""

    timeout = CLIENT_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.split("?", 1)[0] != "/metrics":
            self.send_error(404, explain="metrics are at /metrics")
            return
        began = time.monotonic()
        super().do_GET()
        who = ("User-Agent", "X-Prometheus-Scrape-Timeout-Seconds")
        self.server.scraped((self.client_address[0], *(self.headers.get(name, "") for name in who)), began)


class _Server(ThreadingHTTPServer):
    """Answers every client in a thread of its own, a few at a time."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, family: socket.AddressFamily) -> None:
        self.address_family = family
        self.scrapes: dict[tuple[str, ...], list[float]] = {}  # by reader: when the last two answered in full began
        self._room = threading.BoundedSemaphore(CLIENTS)
        super().__init__(address, _Handler.factory(registry))

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer would ask for the host's full name, which may take long

    def scraped(self, reader: tuple[str, ...], began: float) -> None:
        if reader in self.scrapes or len(self.scrapes) < READERS:
            self.scrapes[reader] = [*self.scrapes.get(reader, [])[-1:], began]

    def readers(self) -> dict[tuple[str, ...], list[float]]:
        """Those that come again and again; if there are none, whoever came."""
        known = dict(self.scrapes)
        return {reader: times for reader, times in known.items() if len(times) == 2} or known

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client went away or was too slow; that is its own business."""


class Endpoint:
    """Metrics over HTTP, and the file by which Prometheus finds them, until `close`."""

    def __init__(self, metrics: Metrics, options: Options, session: str, warn: Callable[[str], None]) -> None:
        """session: what is run, a label of the target. Raises OSError if no port can be had."""
        self._options, self._session, self._warn = options, session, warn
        self._metrics = metrics
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(metrics)
        self._server = self._listen(registry)
        self.port = int(self._server.server_address[1])
        self._closed = threading.Event()
        self._file: str | None = None
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        if options.folder is not None:
            self._register()
            threading.Thread(target=self._stay_registered, name="metrics-target", daemon=True).start()

    def _listen(self, registry: CollectorRegistry) -> _Server:
        options = self._options
        where = socket.getaddrinfo(options.address, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        try:
            return _Server(where[4][:2], registry, where[0])  # type: ignore[arg-type]
        except OSError as error:
            if not options.port:
                raise
            server = _Server((str(where[4][0]), 0), registry, where[0])
            self._warn(
                f"port {options.port} cannot be had ({error.strerror or error}); "
                f"metrics are on port {server.server_address[1]} instead"
            )
            return server

    @property
    def target(self) -> str:
        """host:port as a Prometheus on this machine, or in this network, reaches it."""
        address = self._options.address
        if address in ("", "0.0.0.0", "::"):
            address = socket.gethostname()
        return f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.target}/metrics"

    # --- the file

    def _register(self) -> None:
        folder = self._options.folder
        assert folder is not None
        try:
            clean_targets(folder)
            process = psutil.Process()
            labels = {
                "job": "counterpoise",
                "host": socket.gethostname(),
                "session": _label(self._session),
                f"{_META}pid": str(process.pid),
                f"{_META}started": f"{process.create_time():.2f}",
            }
            name = f"{_file_word(socket.gethostname())}-{process.pid}-{self.port}.json"
            content = json.dumps([{"targets": [self.target], "labels": labels}], indent=2) + "\n"
            place = os.path.join(folder, name)
            storage.write_text(place, content, durable=False)
            self._file = place
        except (CounterpoiseError, OSError, psutil.Error) as error:
            if self._file is None:  # said once
                self._warn(f"metrics target could not be written to {folder}: {error}; Prometheus has to be told")
            self._file = self._file or ""

    def _stay_registered(self) -> None:
        while not self._closed.wait(BEAT_S):
            if self._file and not os.path.exists(self._file):
                self._register()

    # --- the end

    def linger(self) -> None:
        """Wait until all that read have read the last values, if anybody reads at all; a signal ends the wait."""
        limit, readers, began = self._options.linger_s, self._server.readers(), time.monotonic()
        settled = self._metrics.settled
        if settled > 0 and readers and all(times[-1] >= settled for times in readers.values()):
            return
        if limit is None:
            if not readers:
                return
            interval = max(times[-1] - times[0] for times in readers.values())
            limit = min(LONGEST_WAIT_S, max(FIRST_WAIT_S, 1.5 * interval))
        if limit <= 0:
            return
        self._warn(f"waiting up to {limit:.0f} s for one more scrape of the last values; Ctrl-C ends the wait")
        with _signals_set(threading.Event()) as asked:
            while time.monotonic() - began < limit and not asked.wait(0.05):
                now = self._server.readers()
                late = [r for r in readers if now.get(r, [began])[-1] < (settled if settled > 0 else began)]
                if not late and (readers or now):
                    return

    def close(self) -> None:
        self._closed.set()
        if self._file:
            with suppress(CounterpoiseError, OSError):
                storage.delete(self._file)
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event for the time of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {n: signal.signal(n, lambda *_: event.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _file_word(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)[:60]


def clean_targets(folder: str) -> list[str]:
    """Remove what processes of this machine that are dead left in a folder of targets; the names removed."""
    removed = []
    for name in storage.list_names(folder):
        place = os.path.join(folder, name)
        if name.endswith(".json") and _is_left_behind(place):
            with suppress(CounterpoiseError, OSError):
                storage.delete(place)
                removed.append(name)
    return removed


def _is_left_behind(place: str) -> bool:
    try:
        with open(place, "rb") as file:
            (group,) = json.loads(file.read(100_000))
        labels = group["labels"]
        if labels["host"] != socket.gethostname():
            return False
        pid, started = int(labels[f"{_META}pid"]), float(labels[f"{_META}started"])
    except (OSError, ValueError, KeyError, TypeError):  # not one of ours
        return False
    try:
        return abs(psutil.Process(pid).create_time() - started) > 2.0  # another process with that number
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


# --- for commands


def _say(text: str) -> None:
    print(f"counterpoise: {text}", file=sys.stderr, flush=True)


@contextmanager
def emitting(
    options: Options | None,
    root: str,
    session: str,
    *,
    publish: Callable[[Samples], None] | None = None,
    warn: Callable[[str], None] = _say,
) -> Iterator[Feed | None]:
    """Show the metrics of runs that are started in the block. At its end, wait for the last scrape.

    root: folder of runs. session: what is run, e.g. the name of the run. publish: another way out, called every few
    seconds with all samples.
    """
    if options is None:
        yield None
        return
    metrics = Metrics(root)
    try:
        endpoint = Endpoint(metrics, options, session, warn)
    except OSError as error:
        warn(f"no metrics: cannot listen at {options.address} ({error.strerror or error}); the run goes on")
        yield None
        return
    if options.address not in (LOOPBACK, "::1", "localhost"):
        warn(f"metrics at {options.address} can be read by whoever reaches this machine")
    print(f"metrics     {endpoint.url}", file=sys.stderr, flush=True)
    with feeding([metrics], warn) as feed, _published(metrics, publish, warn):
        try:
            yield feed
        finally:
            endpoint.linger()
            endpoint.close()


@contextmanager
def _published(
    metrics: Metrics, publish: Callable[[Samples], None] | None, warn: Callable[[str], None]
) -> Iterator[None]:
    if publish is None:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(PUBLISH_S):
            try:
                publish(metrics.samples())
            except Exception as error:  # as with sinks
                warn(f"metrics are not published any more: {type(error).__name__}: {error}; the run goes on")
                return

    thread = threading.Thread(target=beat, name="metrics-publish", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(CLIENT_S)
