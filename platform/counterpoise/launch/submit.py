"""Jobs on a Ray cluster that runs already: send one, follow its log, ask how it stands, stop it. See docs/jobs.md.

All of it goes through the job server of the cluster's dashboard. Ray keeps entrypoint, environment variables and
metadata of a job as they are, shows them to whoever sees the dashboard and writes them to its logs, and every node
unpacks what was sent: so nothing that looks like a secret leaves this machine (`refuse_secrets`, `pack`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from counterpoise.contracts import ConfigError, CounterpoiseError, DataError, RefusedError, ResourceError
from counterpoise.engine.run import is_path, known_secrets, redact
from counterpoise.storage import show
from counterpoise.wording import did_you_mean, duration

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"  # read by Ray where the driver runs; 3 s by default, too few for a checkpoint
GRACE_S = 120
RAY_NEEDED = ">=2.60"
MAX_PACKAGE_BYTES = 100 * 2**20  # what a dashboard takes in one request
PATIENCE_S = 300.0  # so long a cluster may be away while its job is followed
_TIMEOUT_S = (10.0, 60.0)  # to connect, and of silence
_SILENCE_S = 15.0  # of a log, until the cluster is asked whether it is still there
# Never sent, whatever .gitignore says.
_PRIVATE = (".env", ".env.*", ".netrc", ".aws/", ".ssh/", "*.pem", "auth_token")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What a job is to run.

    argv: of the command. name: of the job. place: what it writes, so that two jobs do not write the same.
    folder: what is sent, if anything. code: this package is sent too, because the folder does not hold it.
    files: {path on the nodes: local file} of what lies elsewhere.
    env: variables of driver and workers, beside those of the runtime environment.
    grace_s: between the request to stop and the end. cpus, gpus: of the driver; without, it runs on the head node.
    """

    argv: Sequence[str]
    name: str
    place: str = ""
    folder: Path | None = None
    code: bool = True
    files: Mapping[str, Path] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    grace_s: int = GRACE_S
    cpus: float = 0
    gpus: float = 0

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "counterpoise", *self.argv])

    @property
    def env_vars(self) -> dict[str, str]:
        return {**self.runtime_env.get("env_vars", {}), **self.env, GRACE: str(self.grace_s)}

    @property
    def metadata(self) -> dict[str, str]:
        return {"job_name": self.name, "place": self.place, "grace_s": str(self.grace_s)}


# ------------------------------------------------------------------------------------------------- connect


def address_of(given: str | None) -> str:
    """The URL of a dashboard: the flag's, else of RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else of this machine."""
    name, address = "--address", given
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if not address:
            name, address = variable, os.environ.get(variable)
    address = (address or DEFAULT_ADDRESS).rstrip("/")
    if re.fullmatch(r"[^:/]+:8265", address):
        address = f"http://{address}"
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(
            f"{name} is {show(address)!r}; jobs go to the dashboard of a cluster: give its URL, as in {DEFAULT_ADDRESS}"
        )
    if "@" in address.split("/")[2]:
        raise ConfigError(f"{name} holds a user or password ({show(address)}); give the token with RAY_AUTH_TOKEN_PATH")
    return address


def read_token() -> tuple[str, str]:
    """Ray's token and where it was found, where Ray looks for it itself; two empty texts without one."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        return Path(path).read_text(encoding="utf-8").strip(), path
    except FileNotFoundError:
        if "RAY_AUTH_TOKEN_PATH" in os.environ:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {path!r}, and there is no such file") from None
        return "", ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token of Ray in {path} cannot be read: {error}") from None


def connect(address: str | None = None, say: Say | None = None) -> Any:
    """A `JobSubmissionClient` of Ray for a cluster that answers, lets us in and is new enough.

    Every request has a timeout. The token is sent only to a cluster that asks for one.
    """
    try:
        import requests
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ResourceError(
            f"sending jobs needs ray[default] ({error}); install it with `uv sync --extra ray`"
        ) from None
    _quiet_ray()
    url = address_of(address)
    headers = _headers()
    if _asked(url, "/api/authentication_mode", headers).get("authentication_mode") == "token":
        token, place = read_token()
        if not token:
            raise ResourceError(
                f"the Ray cluster at {url} asks for a token, and there is none here; copy its token into a file that "
                "only you can read, and set RAY_AUTH_TOKEN_PATH to it"
            )
        headers["Authorization"] = f"Bearer {token}"
        if say and url.startswith("http://") and not re.match(r"http://(127\.|localhost\b|\[::1\])", url):
            say(f"note: the token goes to {url} unencrypted; over a network you do not trust use https or ssh -L")
    else:
        place = ""
    found = _asked(url, "/api/version", headers, place)
    check_version(url, str(found.get("ray_version", "")))
    kept = {n: os.environ.pop(n, None) for n in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}  # else they win over `url`
    verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
    try:
        with _told(url, place):
            client = JobSubmissionClient(url, headers=headers, verify=verify)
    finally:
        os.environ.update({n: v for n, v in kept.items() if v is not None})
    ask = client._do_request

    @functools.wraps(ask)
    def request(*arguments: Any, **options: Any) -> Any:
        with _told(url, place):
            answer = ask(*arguments, timeout=_TIMEOUT_S, **options)
            if answer.status_code >= 500:
                raise requests.ConnectionError(f"status {answer.status_code}: {_line(answer.text)}")
            return answer

    setattr(client, "_do_request", request)  # noqa: B010  (shadows the method)
    return client


class Unreachable(ResourceError):
    """The cluster did not answer; it may later."""


def _headers() -> dict[str, str]:
    """RAY_JOB_HEADERS as `ray job` has it, for gateways in front of a cluster."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise ConfigError('RAY_JOB_HEADERS is no JSON object; give {"NAME": "VALUE"}') from None


def _asked(url: str, path: str, headers: Mapping[str, str], place: str = "") -> dict[str, Any]:
    """The JSON object that a dashboard answers; {} where it knows no such path."""
    import requests

    with _told(url, place):
        answer = requests.get(url + path, headers=dict(headers), timeout=_TIMEOUT_S)
        if answer.status_code == 404 and path != "/api/version":
            return {}
        if answer.status_code in (401, 403):
            _raise_refused(url, answer.status_code, place)
        if answer.status_code >= 500:
            raise requests.ConnectionError(f"status {answer.status_code}")
        try:
            found = answer.json()
        except ValueError:
            found = None
    if not isinstance(found, dict) or answer.status_code != 200:
        raise ResourceError(
            f"what answers at {url} is no dashboard of Ray (status {answer.status_code}); --address takes the URL of "
            "the dashboard, usually port 8265 of the head node"
        )
    return found


@contextlib.contextmanager
def _told(url: str, place: str) -> Iterator[None]:
    """Errors of a request in one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        _raise_refused(url, 401 if "required" in str(error) else 403, place)
    except requests.exceptions.SSLError as error:
        raise ResourceError(
            f"{url}: its certificate is not accepted ({_line(error)}); set REQUESTS_CA_BUNDLE to the file of the "
            "authority that signed it"
        ) from None
    except (requests.ConnectionError, requests.Timeout, ConnectionError) as error:
        cause = str(error.args[0] if error.args else error)
        reason = re.search(r"\[Errno -?\d+\] ([\w ]+)", cause)
        raise Unreachable(
            f"no Ray cluster answers at {url} ({reason[1] if reason else _reason(error)}); give its dashboard with "
            "--address. It listens on loopback of the head: reach it with `ssh -N -L 8265:127.0.0.1:8265 HEAD`, or "
            "`kubectl port-forward service/NAME-head-svc 8265`. A head without ray[default] has none"
        ) from None


def _reason(error: Exception) -> str:
    return "no answer in time" if "timed out" in str(error).lower() else _line(error)


def _line(text: object) -> str:
    words = " ".join(str(redact(str(text))).split())
    return words if len(words) <= 200 else f"{words[:200]} ..."


def _raise_refused(url: str, status: int, place: str) -> None:
    if status == 403 or place:
        raise ResourceError(
            f"the Ray cluster at {url} does not accept the token of {place or 'RAY_JOB_HEADERS'}; it must be the one "
            "that the head node was started with"
        )
    raise ResourceError(f"the Ray cluster at {url} asks for a token; set RAY_AUTH_TOKEN_PATH to the file that holds it")


def check_version(url: str, version: str) -> None:
    """ResourceError if the cluster's Ray is older than this package needs."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        fits = SpecifierSet(RAY_NEEDED).contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise ResourceError(
            f"the cluster at {url} runs Ray {version or 'of unknown version'}, and jobs need {RAY_NEEDED} (here: "
            f"{packages.version('ray')}); start it with an image or an environment that has it"
        )


def _quiet_ray() -> None:
    """Ray tells every file it ignores and every connection it closes; what matters we say ourselves."""
    for name in ("_private.runtime_env.packaging", "_private.runtime_env.working_dir"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.ERROR)


# ---------------------------------------------------------------------------------------------------- send


def refuse_secrets(order: Order) -> None:
    """RefusedError if what Ray would keep of a job holds what looks like a secret. A path to a secret is none."""
    env = {name: value for name, value in order.env_vars.items() if not is_path(name, value)}
    others = {key: value for key, value in order.runtime_env.items() if key != "env_vars"}
    parts: dict[str, Any] = {f"variable {name} (--env, or env_vars)": {name: value} for name, value in env.items()}
    parts |= {"the command": [list(order.argv), order.entrypoint], "the runtime environment": others}
    parts |= {"the name or place": order.metadata}
    for part, content in parts.items():
        if redact(content) != content:
            raise RefusedError(
                f"{part} holds what looks like a secret. Ray keeps jobs as they were sent, and shows them; leave it "
                "out: nodes take credentials from their own environment or from files that are mounted there, see "
                "docs/jobs.md"
            )


def pack(order: Order, target: Path) -> int:
    """Write what nodes unpack to a zip file; its bytes. RefusedError if a file in it holds a known secret."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    if order.folder is not None:
        excludes = [*get_runtime_env_default_excludes(), *_PRIVATE, *map(str, order.runtime_env.get("excludes") or ())]
        create_package(str(order.folder), target, True, excludes=excludes)
    with zipfile.ZipFile(target, "a", strict_timestamps=False) as archive:
        for name, file in {**order.files, **(_own_files() if order.code else {})}.items():
            archive.write(file, name, zipfile.ZIP_DEFLATED)
        _check_contents(archive)
    size = target.stat().st_size
    if size > MAX_PACKAGE_BYTES:
        with zipfile.ZipFile(target) as archive:
            largest = sorted(archive.infolist(), key=lambda i: -i.compress_size)[:3]
        named = ", ".join(f"{i.filename} ({i.compress_size / 2**20:.0f} MiB)" for i in largest)
        raise RefusedError(
            f"{order.folder}: {size / 2**20:.0f} MiB would be sent, and a cluster takes {MAX_PACKAGE_BYTES >> 20} at "
            f"most; the largest: {named}. Name them in .rayignore or under excludes of the runtime environment; data "
            "belongs into a bucket"
        )
    return size


def _own_files() -> dict[str, Path]:
    """This package as a wheel has it."""
    package = Path(__file__).resolve().parents[1]
    places = {package.name: package}
    if (recipes := package.parents[1] / "datasets").is_dir() and not (package / "recipes").is_dir():
        places[f"{package.name}/recipes"] = recipes
    return {
        f"{name}/{file.relative_to(place).as_posix()}": file
        for name, place in places.items()
        for file in sorted(place.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }


def _check_contents(archive: zipfile.ZipFile) -> None:
    known = known_secrets()
    token, place = read_token()
    if len(token) >= 12:
        known[place] = token
    for info in archive.infolist():
        data = archive.read(info)
        for name, value in known.items():
            if value.encode() in data:
                raise RefusedError(
                    f"{info.filename} would be sent to every node and holds the value of {name}; remove it, or name "
                    "the file in .rayignore"
                )


def send(client: Any, order: Order, package: Path) -> str:
    """Start the job; its ID. RefusedError if a job that has not ended writes the same place."""
    refuse_secrets(order)
    for job in submitted(client):
        if order.place and (job.metadata or {}).get("place") == order.place and not job.status.is_terminal():
            raise RefusedError(
                f"job {job.submission_id} is writing {order.place} already; see it with "
                f"`counterpoise jobs logs -f {job.submission_id}`, or stop it first"
            )
    others = {k: v for k, v in order.runtime_env.items() if k not in ("env_vars", "excludes", "working_dir")}
    runtime_env = {**others, "working_dir": str(package), "env_vars": order.env_vars}
    try:
        return str(
            client.submit_job(
                entrypoint=order.entrypoint,
                submission_id=f"{order.name}-{secrets.token_hex(3)}",
                runtime_env=runtime_env,
                metadata=order.metadata,
                entrypoint_num_cpus=order.cpus or None,
                entrypoint_num_gpus=order.gpus or None,
            )
        )
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, CounterpoiseError):
            raise
        raise ResourceError(f"the cluster did not take the job: {_line(error)}") from None


@contextlib.contextmanager
def packed(order: Order) -> Iterator[tuple[Path, int]]:
    """What is sent, as a file for the time of the block, and its bytes."""
    with tempfile.TemporaryDirectory(prefix="counterpoise-job-") as folder:
        target = Path(folder) / "code.zip"
        yield target, pack(order, target)


# --------------------------------------------------------------------------------------------- look at jobs


def submitted(client: Any) -> list[Any]:
    """Jobs that came through the job server, the newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: -(job.start_time or 0))


def find(client: Any, asked: str) -> Any:
    """The job of an ID, or the newest of a name."""
    jobs = submitted(client)
    for job in jobs:
        if asked == job.submission_id:
            return job
    for job in jobs:
        if asked == (job.metadata or {}).get("job_name"):
            return job
    known = [text for job in jobs for text in (job.submission_id, (job.metadata or {}).get("job_name")) if text]
    raise DataError(
        f"the cluster knows no job {asked!r}{did_you_mean(asked, known)}; `counterpoise jobs list` shows all. A head "
        "that was started anew has forgotten its jobs, but runs stay: go on with --resume"
    )


def exit_code(job: Any) -> int | None:
    """Of the command that the job ran; 75 (go on with --resume) for one that was stopped, None before its end."""
    state = str(job.status)
    if state == "STOPPED":
        return 75
    if state not in ("SUCCEEDED", "FAILED"):
        return None
    code = job.driver_exit_code
    if code is None:
        return 0 if state == "SUCCEEDED" else 1
    return int(code) if code >= 0 else 128 - int(code)


def facts(job: Any) -> dict[str, Any]:
    """What is said about a job, JSON-able."""
    meta = job.metadata or {}
    end = job.end_time or (time.time() * 1000 if job.start_time else None)
    return {
        "id": job.submission_id,
        "name": meta.get("job_name", job.submission_id),
        "state": str(job.status).lower(),
        "exit_code": exit_code(job),
        "place": meta.get("place") or None,
        "command": str(redact(job.entrypoint)),
        "started": job.start_time / 1000 if job.start_time else None,
        "seconds": round((end - job.start_time) / 1000, 1) if job.start_time and end else None,
        "message": why(job),
    }


def why(job: Any) -> str | None:
    """Why a job failed that its own log cannot tell about, in one line."""
    if str(job.status) != "FAILED" or job.driver_exit_code is not None:
        return None
    return _line(f"{job.error_type or ''} {job.message or ''}".strip() or "unknown")


def lines(jobs: Sequence[Any]) -> list[str]:
    """A table of jobs."""
    head = ("ID", "STATE", "EXIT", "STARTED", "TIME", "COMMAND")
    rows = [head]
    for fact in map(facts, jobs):
        started = time.strftime("%m-%d %H:%M", time.localtime(fact["started"])) if fact["started"] else "-"
        code = "-" if fact["exit_code"] is None else str(fact["exit_code"])
        command = fact["command"].removeprefix("python -m counterpoise ")
        command = command if len(command) <= 60 else f"{command[:57]}..."
        rows.append((fact["id"], fact["state"], code, started, duration(fact["seconds"]), command))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# -------------------------------------------------------------------------------------------------- follow


class _Log:
    """Text that comes again from the start after every reconnection, written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._passed = write, 0, 0

    def again(self) -> None:
        self._passed = 0

    def __call__(self, text: str) -> None:
        new = text[max(0, self._written - self._passed) :]
        self._passed += len(text)
        self._written += len(new)
        if new:
            self._write(new)


def follow(client: Any, job_id: str, write: Callable[[str], None], say: Say, patience_s: float = PATIENCE_S) -> Any:
    """Write the log of a job until it ends; the job then. A lost connection is taken up again where it was."""
    import aiohttp

    log = _Log(write)
    lost: float | None = None
    pause = 0.5
    while True:
        log.again()
        try:
            asyncio.run(_tail(client, job_id, log))
            job = client.get_job_info(job_id)
            if job.status.is_terminal():  # Ray may end the stream of a job's log before its last lines
                log.again()
                log(client.get_job_logs(job_id))
        except (Unreachable, aiohttp.ClientError, RuntimeError, OSError) as error:
            if "status code 404" in str(error) or getattr(error, "status", None) == 404:
                raise ResourceError(
                    f"the cluster does not know job {job_id} any more: its head was started anew. Runs stay; submit "
                    "the same with --resume"
                ) from None
            now = time.monotonic()
            if lost is None:
                lost = now
                say(f"connection lost ({_line(error)}); trying again for {duration(patience_s)}, the job may go on")
            elif now - lost > patience_s:
                raise ResourceError(
                    f"the cluster was away for {duration(now - lost)}; once it is back: "
                    f"counterpoise jobs logs -f {job_id}"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
            continue
        if lost is not None:
            say(f"connected again after {duration(time.monotonic() - lost)}")
        lost, pause = None, 0.5
        if job.status.is_terminal():
            return job
        time.sleep(0.5)


async def _tail(client: Any, job_id: str, write: Callable[[str], None]) -> None:
    """One connection to the log, until its end. A server that is silent is asked whether it is still there."""
    stream = client.tail_job_logs(job_id)
    step: asyncio.Task[str] | None = None
    try:
        while True:
            step = step or asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait({step}, timeout=_SILENCE_S)
            if not done:
                await asyncio.to_thread(client.get_job_info, job_id)
                continue
            try:
                text = step.result()
            except StopAsyncIteration:
                return
            step = None
            write(text)
    finally:
        if step is not None and not step.done():
            step.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await step
        await stream.aclose()


def stop(client: Any, job: Any, say: Say, wait: bool = True) -> Any:
    """Ask a job to write a checkpoint and end; the job after that. Ray kills what has not when its grace is over."""
    grace = float((job.metadata or {}).get("grace_s", 3))
    if job.status.is_terminal() or not client.stop_job(job.submission_id):
        say(f"job {job.submission_id} has ended already ({facts(job)['state']})")
        return job
    begin = time.monotonic()
    say(f"job {job.submission_id}: asked to write a checkpoint and end; killed after {grace:.0f} s")
    while wait:
        time.sleep(0.5)
        job = client.get_job_info(job.submission_id)
        if job.status.is_terminal():
            took = time.monotonic() - begin
            killed = took >= grace
            say(f"ended after {duration(took)}" + (", by force: it goes on from an older checkpoint" if killed else ""))
            break
    return job
