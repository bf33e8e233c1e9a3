"""The Ray cluster a command uses: one that is running already, or a small one of its own that goes when it ends.

Start-up is import cost times processes, so a cluster of our own runs no process it can do without. It listens on
loopback, keeps its files in a folder of its own, and its processes neither see a Ctrl-C typed at the terminal nor
outlive this one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterpoise.contracts import ResourceError
from counterpoise.launch.pipelines import end_pipelines

# What Ray reads from the environment; what the user has set stays.
_ALWAYS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon the end of the workers is noticed (2 s by default)
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # ours come from the run folder
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` would have nodes install everything again for every job
}
_OWN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what Ray does on those: all servers on loopback
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "RAY_AUTH_MODE": "token",  # other users of this machine reach loopback too
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # 15 by default: training would come to a halt beside any other program
    "OMP_NUM_THREADS": "1",
}
_PREFIX = "counterpoise-ray-"


@dataclass(frozen=True)
class Cluster:
    """own: it was started for this command and may be trimmed. folder: where Ray keeps its own files."""

    own: bool
    folder: str
    cpus: float
    gpus: float


_open: list[Cluster] = []
_REAP_S = 5.0


@contextlib.contextmanager
def cluster(workers: int, tasks: int = 2, *, address: str | None = None, verbose: bool = False) -> Iterator[Cluster]:
    """A connection to Ray for the time of the block. Inside another such block it is the same one.

    tasks: CPUs beside those of the workers, in a cluster of our own. They are scheduling counts, not cores.
    """
    if _open:
        yield _open[-1]
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address:
        _check_answers(address)
    folder = None if address else _new_folder()
    quiet = contextlib.nullcontext() if verbose else _quiet()
    with _environment(folder), quiet:
        import ray

        if ray.is_initialized():  # by whoever calls this as a library
            yield _facts(ray, own=False, folder=tempfile.gettempdir())
            return
        _read_environment()
        level = logging.INFO if verbose else logging.CRITICAL
        options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
        if address:
            options |= {"address": address, "runtime_env": _code()}
        else:
            options |= {
                "address": "local",
                "num_cpus": workers + tasks,
                "include_dashboard": False,
                "dashboard_host": "127.0.0.1",
                "object_store_memory": _object_store_bytes(),
                "_temp_dir": folder,
            }
        try:
            with _signals_kept(), _own_process_groups():
                ray.init(**options)
        except Exception as error:  # Ray raises many kinds here
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            wish = f"connect to the Ray cluster at {address}" if address else "start Ray on this machine"
            raise ResourceError(f"cannot {wish}: {text}") from None
        try:
            _open.append(_facts(ray, own=address is None, folder=folder or tempfile.gettempdir()))
            yield _open[-1]
        finally:
            _open.clear()
            with _ignored_errors():
                end_pipelines()
            children = _children(ray) if address is None else []
            with _ignored_errors():
                ray.shutdown()
            _reap(children)
            if folder and not verbose:  # Ray's logs; the next start removes what is left
                shutil.rmtree(folder, ignore_errors=True)


def _read_environment() -> None:
    """Have Ray read its settings and its token again: `import ray`, by whoever came first, reads and keeps them."""
    from ray import _raylet
    from ray._private import ray_constants

    native: Any = _raylet
    constants: Any = ray_constants
    constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = constants.env_bool("RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    several = sys.platform not in ("win32", "darwin")  # without it, Ray's servers listen on loopback
    constants.ENABLE_RAY_CLUSTER = constants.env_bool("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", several)
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


def _children(ray: Any) -> list[subprocess.Popen[bytes]]:
    """The processes of the cluster that this one has started."""
    node = getattr(ray._private.worker, "_global_node", None)
    return [info.process for infos in getattr(node, "all_processes", {}).values() for info in infos]


def _reap(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that have been told to end, and end those that Ray has left behind."""
    for child in children:
        try:
            child.wait(timeout=_REAP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def adopt(cluster: Cluster) -> None:
    """In a process that Ray started: `cluster()` gives this one for as long as the process lives.

    cpus and gpus: what the process may use of it.
    """
    _open[:] = [cluster]


def _check_answers(address: str) -> None:
    """Raise at once if nobody listens at host:port; Ray itself tries for two minutes and writes to the terminal."""
    match = re.fullmatch(r"\[?([^/\[\]]+)\]?:(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise ResourceError(
                f"no Ray cluster answers at {address} ({error.strerror or error}); start one with `ray start --head`, "
                "or leave --address (RAY_ADDRESS) out to use one on this machine for the time of the run"
            ) from None


def _facts(ray: Any, own: bool, folder: str) -> Cluster:
    resources = ray.cluster_resources()
    return Cluster(own, folder, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _object_store_bytes() -> int:
    """A quarter of the memory, 256 MiB to 4 GiB, and not more than /dev/shm has left."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError):
        total = min(total, 4 * int(shutil.disk_usage("/dev/shm").free * 0.9))
    return max(256 * 2**20, min(4 * 2**30, total // 4))


def _code() -> dict[str, Any] | None:
    """How workers of a running cluster come by this package: as a job's environment, an image, or sent from here."""
    package = Path(__file__).resolve().parents[1]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "site-packages" in package.parts:
        return None
    return {"py_modules": [str(package)]}


def _new_folder() -> str:
    """A folder for Ray's logs and sockets. Those of processes that were killed are removed on the way."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > 30:  # socket names have 107 bytes
        root = Path("/tmp")
    for old in root.glob(f"{_PREFIX}*"):
        match = re.match(rf"{_PREFIX}(\d+)-", old.name)
        if match and not Path(f"/proc/{match[1]}").exists() and os.path.isdir("/proc/self"):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root)


@contextlib.contextmanager
def _environment(folder: str | None) -> Iterator[None]:
    """Ray's settings in the environment while it runs. Credentials (AWS_*) reach its processes by inheritance.

    folder: of a cluster of our own, which gets a token of its own there.
    """
    wanted = {**_ALWAYS, **(_OWN if folder else {})}
    if folder and not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        wanted["RAY_AUTH_TOKEN_PATH"] = os.path.join(folder, "token")
        with open(os.open(wanted["RAY_AUTH_TOKEN_PATH"], os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    before = {name: os.environ.get(name) for name in (*wanted, "PYTHONDONTWRITEBYTECODE")}
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ})
    if folder:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles everything
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray puts its own handler on SIGTERM, which would end the process without a checkpoint; put back the old."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _own_process_groups() -> Iterator[None]:
    """What a terminal, `timeout` or a scheduler sends to our process group reaches us alone.

    Ray's processes must live until the checkpoint is written; they end when we do, whatever happens to us.
    """
    from ray._private import services as ray_services

    services: Any = ray_services

    start = getattr(services, "ConsolePopen", None)
    if start is None or os.name != "posix":
        yield
        return
    services.ConsolePopen = functools.partial(start, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = start


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log lines of libraries on the terminal."""
    import ray._private.worker as ray_driver

    driver: Any = ray_driver  # it prints what a raylet reports, whatever log_to_driver says

    loggers = [logging.getLogger(name) for name in ("ray", "ray.train", "ray.data", "ray.tune", "torch")]
    levels = [logger.level for logger in loggers]
    printing = getattr(driver, "print_to_stdstream", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver.print_to_stdstream = lambda *args, **kwargs: None
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            driver.print_to_stdstream = printing


@contextlib.contextmanager
def _ignored_errors() -> Iterator[None]:
    """Errors while the cluster is taken down are of no use to anybody."""
    try:
        yield
    except Exception:
        logging.getLogger(__name__).debug("while leaving Ray", exc_info=True)
