"""Dashboards and decisions into a Grafana server, through grafana-api.

What is there already is left alone, so that pushing twice changes nothing. The token comes from the environment or a
private file, goes to GRAFANA_URL and nowhere else, and is in no message.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from counterpoise.contracts import ConfigError, RefusedError, ResourceError
from counterpoise.dashboards import files
from counterpoise.reports.records import read_run
from counterpoise.telemetry.display import decision_line

FOLDER, FOLDER_TITLE = "counterpoise", "Counterpoise"
ANNOTATED = "counterpoise-imbalance"  # the dashboard that decisions are shown in
TIMEOUT_S = 20.0
MOST_ANNOTATIONS = 5000
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_UID = re.compile(r"[a-zA-Z0-9_-]{1,40}")
_TOKEN = re.compile(r"[\x21-\x7e]+")


class GrafanaError(ResourceError):
    """A Grafana server that does not do what it is asked."""


class Absent(GrafanaError):
    """404."""


class Conflict(GrafanaError):
    """409 or 412: it is there already, or somebody changed it meanwhile."""


@dataclass
class Pushed:
    """What a push has done, or would do."""

    created: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    annotations: int = 0
    annotations_there: int = 0


# --- where, and with which token


def address() -> str:
    """GRAFANA_URL, checked. Raises ConfigError."""
    url = os.environ.get("GRAFANA_URL", "").strip().rstrip("/")
    if not url:
        raise ConfigError("GRAFANA_URL is not set; give Grafana's address, e.g. http://127.0.0.1:3000")
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError("GRAFANA_URL is no address; give one like https://grafana.example.org") from None
    if parts.username or parts.password:
        raise RefusedError("GRAFANA_URL holds a name or password; leave it out and set GRAFANA_TOKEN")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or parts.query or parts.fragment:
        raise ConfigError(f"GRAFANA_URL is {url!r}; give an address like https://grafana.example.org/path")
    return url


def token() -> str | None:
    """From GRAFANA_TOKEN, or the file that GRAFANA_TOKEN_FILE names; None if neither is set."""
    value, source = os.environ.get("GRAFANA_TOKEN"), "GRAFANA_TOKEN"
    if not value and (path := os.environ.get("GRAFANA_TOKEN_FILE")):
        value, source = _read_private(path), f"the file {path}"
    if not value or not value.strip():
        return None
    if not _TOKEN.fullmatch(value.strip()):
        raise ConfigError(f"{source} holds no token: it has spaces, line breaks or characters beyond ASCII")
    return value.strip()


def _read_private(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise RefusedError(f"others may read {path} (mode {mode:04o}); chmod 600 {path}")
            return file.read(10_000)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"GRAFANA_TOKEN_FILE is {path}: {reason}") from None


# --- the server


class Grafana:
    """The few calls that are needed. Every failure is a GrafanaError that says what was being done."""

    def __init__(self, url: str, secret: str, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        host = str(parts.hostname)
        if parts.scheme == "http" and host not in LOOPBACK:
            raise RefusedError(
                f"GRAFANA_URL is {url}: a token over plain http could be read on the way; use https, or a tunnel to "
                "127.0.0.1"
            )
        try:
            from grafana_api.grafana_face import GrafanaFace
        except ImportError as error:
            raise ResourceError(f"pushing needs the extra `monitor` ({error}); uv sync --extra monitor") from None
        path = parts.path.strip("/")
        self._face = GrafanaFace(
            auth=secret,
            protocol=parts.scheme,
            host=f"[{host}]" if ":" in host else host,
            port=parts.port,
            url_path_prefix=f"{path}/" if path else "",
            timeout=timeout_s,
        )
        self.url = url
        session = self._face.api.s
        session.max_redirects = 0  # to a login page, or to somebody else
        if host in LOOPBACK:
            session.trust_env = False  # no proxy gets to see the token

    def version(self) -> str:
        answer = self._call("ask how it is", self._face.api.GET, "/health")
        if not isinstance(answer, dict) or "database" not in answer:
            raise GrafanaError(f"what answers at {self.url} is no Grafana; check GRAFANA_URL")
        if answer["database"] != "ok":
            raise GrafanaError(f"Grafana at {self.url} has trouble with its database: {answer['database']}")
        return str(answer.get("version", "of unknown version"))

    def make_folder(self, uid: str, title: str) -> bool:
        """Whether it had to be made."""
        try:
            self._call(f"read the folder {title}", self._face.folder.get_folder, uid)
            return False
        except Absent:
            pass
        try:
            self._call(f"create the folder {title}", self._face.folder.create_folder, title, uid)
        except Conflict:  # somebody was quicker
            return False
        return True

    def dashboard(self, uid: str) -> dict[str, Any] | None:
        """The dashboard as the server has it, or None."""
        try:
            answer = self._call(f"read the dashboard {uid}", self._face.dashboard.get_dashboard, uid)
        except Absent:
            return None
        found = answer.get("dashboard") if isinstance(answer, dict) else None
        if not isinstance(found, dict):
            raise GrafanaError(f"Grafana at {self.url} answered without the dashboard {uid}")
        return found

    def save(self, dashboard: Mapping[str, Any], folder: str, message: str) -> None:
        body = {"dashboard": {**dashboard, "id": None}, "folderUid": folder, "overwrite": True, "message": message}
        self._call(f"save the dashboard {dashboard['title']}", self._face.dashboard.update_dashboard, body)

    def annotations(self, dashboard: str, tags: Sequence[str]) -> list[dict[str, Any]]:
        query = urlencode(
            {"dashboardUID": dashboard, "tags": tags, "limit": MOST_ANNOTATIONS, "type": "annotation"}, doseq=True
        )
        answer = self._call("read annotations", self._face.api.GET, f"/annotations?{query}")
        if not isinstance(answer, list):
            raise GrafanaError(f"Grafana at {self.url} answered without a list of annotations")
        return [one for one in answer if isinstance(one, dict)]

    def annotate(self, dashboard: str, time_ms: int, tags: Sequence[str], text: str) -> None:
        # Not add_annotation(): it sends nulls that the API's description does not allow.
        body = {"dashboardUID": dashboard, "time": time_ms, "tags": list(tags), "text": text}
        self._call("add an annotation", lambda: self._face.api.POST("/annotations", json=body))

    def _call(self, deed: str, call: Callable[..., Any], *arguments: Any) -> Any:
        import requests
        from grafana_api.grafana_api import GrafanaClientError, GrafanaServerError

        start = f"Grafana at {self.url} could not be asked to {deed}"
        try:
            return call(*arguments)
        except GrafanaClientError as error:
            raise _client_error(error.status_code, _said(error.response), deed, self.url) from None
        except GrafanaServerError as error:
            raise GrafanaError(
                f"Grafana at {self.url} failed with {error.status_code} when asked to {deed}: {_said(error.response)}; "
                "its log says more"
            ) from None
        except requests.TooManyRedirects:
            raise GrafanaError(f"{start}: it redirects elsewhere; give the final address in GRAFANA_URL") from None
        except requests.Timeout:
            raise GrafanaError(f"{start}: no answer in time; try again, pushing goes on where it was") from None
        except requests.exceptions.SSLError:
            raise GrafanaError(
                f"{start}: its certificate is not trusted; name your authority's with REQUESTS_CA_BUNDLE"
            ) from None
        except requests.exceptions.JSONDecodeError:
            raise GrafanaError(
                f"{start}: the answer is no JSON; is GRAFANA_URL the whole address, or is a login page before it?"
            ) from None
        except requests.ConnectionError:
            raise GrafanaError(f"{start}: nobody answers there; check GRAFANA_URL and that Grafana runs") from None
        except requests.RequestException as error:
            raise GrafanaError(f"{start}: {type(error).__name__}") from None
        except (ValueError, TypeError):  # an error whose body is empty, or no JSON object
            raise GrafanaError(
                f"Grafana at {self.url} answered nonsense when asked to {deed}; its log says more"
            ) from None


def _said(response: Any) -> str:
    text = response.get("message", "") if isinstance(response, dict) else str(response)
    return " ".join(str(text).split())[:200] or "it did not say why"


def _client_error(status: int, said: str, deed: str, url: str) -> GrafanaError:
    start = f"Grafana at {url} refused to {deed} with {status} ({said})"
    if status == 401:
        return GrafanaError(f"{start}; the token in GRAFANA_TOKEN is wrong or has expired")
    if status == 403:
        return GrafanaError(f"{start}; the token needs the role Editor")
    if status == 404:
        return Absent(f"{start}; is GRAFANA_URL the whole address?")
    if status in (409, 412):
        return Conflict(f"{start}; it is provisioned from files, or somebody changes it at the same time")
    return GrafanaError(start)


# --- pushing


def push(grafana: Grafana, dashboards: Mapping[str, Mapping[str, Any]]) -> Pushed:
    """Bring every dashboard to the server, in a folder of ours."""
    done = Pushed()
    if grafana.make_folder(FOLDER, FOLDER_TITLE):
        done.created.append(f"folder {FOLDER_TITLE}")
    for dashboard in dashboards.values():
        uid = str(dashboard["uid"])
        assert _UID.fullmatch(uid), f"uid {uid!r} is not what Grafana takes"
        there = grafana.dashboard(uid)
        if there is not None and _content(there) == _content(dashboard):
            done.unchanged.append(str(dashboard["title"]))
            continue
        grafana.save(dashboard, FOLDER, "counterpoise dashboards push")
        (done.created if there is None else done.changed).append(str(dashboard["title"]))
    return done


def _content(dashboard: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the server counts."""
    return {key: value for key, value in dashboard.items() if key not in ("id", "version")}


def push_decisions(grafana: Grafana, run: str, done: Pushed) -> None:
    """A run's decisions that added classifiers, as annotations of the Imbalance dashboard."""
    made = decisions(run)
    there = {(a.get("time"), a.get("text")) for a in grafana.annotations(ANNOTATED, made[0][1][:2])} if made else set()
    for time_ms, tags, text in made:
        if (time_ms, text) in there:
            done.annotations_there += 1
            continue
        grafana.annotate(ANNOTATED, time_ms, tags, text)
        done.annotations += 1


def decisions(uri: str) -> list[tuple[int, list[str], str]]:
    """Time in milliseconds, tags and text of a run's decisions that added classifiers."""
    run = read_run(uri)
    tags = ["counterpoise", f"run:{run.name}", f"method:{run.method}"]
    return [
        (round(float(record["time"]) * 1000), tags, f"{run.name}: {decision_line(record)}")
        for record in run.decisions
        if record.get("add")
    ]


def plan(dashboards: Mapping[str, Mapping[str, Any]], url: str | None, runs: Sequence[str]) -> list[str]:
    """What a push would do, in words, without asking the server."""
    lines = [f"folder      {FOLDER_TITLE}"]
    lines += [
        f"dashboard   {one['title']}: {url or 'GRAFANA_URL'}/d/{quote(str(one['uid']))}" for one in dashboards.values()
    ]
    for run in runs:
        lines.append(f"annotations {len(decisions(run))} decisions of {run}")
    return lines


def lines_of(done: Pushed) -> list[str]:
    found = [f"created     {name}" for name in done.created]
    found += [f"changed     {name}" for name in done.changed]
    found += [f"unchanged   {name}" for name in done.unchanged]
    if done.annotations or done.annotations_there:
        found.append(f"annotations {done.annotations} added, {done.annotations_there} there already")
    return found


def start(runs: Sequence[str], dry_run: bool, say: Callable[[str], None]) -> None:
    """`counterpoise dashboards push`."""
    dashboards = files.committed()
    secret = None if dry_run else token()
    if secret is None:
        url = address() if os.environ.get("GRAFANA_URL") else None
        for line in plan(dashboards, url, runs):
            say(line)
        why = "" if dry_run else ": GRAFANA_TOKEN and GRAFANA_TOKEN_FILE are not set"
        say(f"dry run{why}; nothing was sent")
        return
    grafana = Grafana(address(), secret)
    say(f"grafana     {grafana.url}, version {grafana.version()}")
    done = push(grafana, dashboards)
    for run in runs:
        push_decisions(grafana, run, done)
    for line in lines_of(done):
        say(line)
    say(f"open        {grafana.url}/d/{ANNOTATED}")
