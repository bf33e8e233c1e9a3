"""What is installed on this machine and whether it will work; each problem with the command that mends it.

Nothing at the top is imported but the standard library, so that a broken installation can still be examined. Ray
is neither imported nor started, and nothing is asked of the network. No secret is ever printed: values are shown
only of variables known to hold none, and every text passes `_clean` on its way into a finding.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GIB = 2**30
PYTHONS = ((3, 11), (3, 13))  # first and last minor version supported
DISK_PROBLEM, DISK_NOTE = GIB, 10 * GIB
SHM_NOTE = 2 * GIB  # Ray's object store spills to disk below what it was given; containers have 64 MiB by default

# Package: first version without the hole, and the hole.
HOLES = {
    "torch": ("2.10", "CVE-2026-24747, a checkpoint can run code"),
    "ray": ("2.56", "CVE-2026-41486, a Parquet file can run code"),
    "pyarrow": ("23.0.1", "CVE-2026-25087, use after free in reading Arrow files"),
    "transformers": ("5.3", "CVE-2026-4372, the config of a model can run code"),
}
# Uploads that steal credentials when they are imported.
MALICIOUS = {"lightning": ("2.6.2", "2.6.3")}

# Variables that the product, or a library on its behalf, reads: what for. Values of these are shown.
ENVIRONMENT = {
    "COUNTERPOISE_HOME": "home of prepared corpora",
    "COUNTERPOISE_RUNS": "folder of runs",
    "XDG_CACHE_HOME": "cache, if COUNTERPOISE_HOME is not set",
    "TMPDIR": "temp folder",
    "CUDA_VISIBLE_DEVICES": "GPUs that may be used",
    "CUBLAS_WORKSPACE_CONFIG": "reproducible cuBLAS",
    "OMP_NUM_THREADS": "threads of a process",
    "GLIBC_TUNABLES": "glibc; training on a CPU keeps freed memory unless it names glibc.malloc",
    "WORLD_SIZE": "processes of a group, as torchrun sets it",
    "RANK": "number of this process in its group",
    "LOCAL_RANK": "number of this process on its machine",
    "GLOO_SOCKET_IFNAME": "network interface of collectives",
    "MASTER_ADDR": "where the group meets",
    "MASTER_PORT": "where the group meets",
    "RAY_ADDRESS": "Ray cluster to use",
    "RAY_AUTH_MODE": "whether Ray asks for a token",
    "RAY_AUTH_TOKEN_PATH": "file of Ray's token",
    "RAY_TMPDIR": "folder of Ray's own files",
    "RAY_USE_TLS": "whether Ray encrypts",
    "AWS_ENDPOINT_URL": "server of the object storage",
    "AWS_ENDPOINT_URL_S3": "server of the object storage",
    "AWS_REGION": "region",
    "AWS_DEFAULT_REGION": "region",
    "AWS_PROFILE": "profile of ~/.aws",
    "AWS_CA_BUNDLE": "certificates to trust",
    "REQUESTS_CA_BUNDLE": "certificates to trust, of Grafana and Ray's dashboard",
    "AWS_CONFIG_FILE": "instead of ~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "instead of ~/.aws/credentials",
    "AWS_EC2_METADATA_DISABLED": "whether credentials of the machine are looked up",
    "GRAFANA_URL": "Grafana that dashboards are pushed to",
    "GRAFANA_TOKEN": "Grafana's token",
    "GRAFANA_TOKEN_FILE": "file of Grafana's token",
    "MLFLOW_TRACKING_URI": "server of MLflow",
    "MLFLOW_EXPERIMENT_NAME": "experiment of MLflow that runs go to",
    "MLFLOW_DISABLE_TELEMETRY": "MLflow tells its makers nothing",
    "WANDB_API_KEY": "key of Weights & Biases",
    "WANDB_PROJECT": "project of Weights & Biases that runs go to",
    "WANDB_MODE": "online, or offline",
    "HTTP_PROXY": "proxy of the object storage",
    "HTTPS_PROXY": "proxy of the object storage",
    "NO_PROXY": "hosts reached without the proxy",
    "PYTHONPATH": "where Python looks for packages first",
    "PYTHONDONTWRITEBYTECODE": "Python keeps no bytecode",
    "PYTHONPYCACHEPREFIX": "where Python keeps what it compiled",
    "CI": "no live display",
    "NO_COLOR": "no colours",
    "FORCE_COLOR": "colours in a pipe too",
    "COLUMNS": "width of the output",
    "TERM": "kind of terminal",
}
# Every set variable with one of these beginnings is listed too; only simple values (a number, true) are shown.
PREFIXES = ("COUNTERPOISE_", "AWS_", "RAY_", "MALLOC_")

# Plain `uv sync` removes what no named extra needs, so that installing one would drop another.
_SYNC = "uv sync --inexact"
# Ray's switches that let data files run code, and what each lets in.
SWITCHES = {
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA": "it lets Parquet files run code (CVE-2026-41486)",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR": "it lets Parquet files run code",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE": "it lets Arrow files run code (CVE-2023-47248)",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION": "it lets members of tar files run code",
}
_SECRET_NAME = re.compile(r"secret|token|passw|passphrase|credential|key|authorization|cookie", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(PATH|FILE|DIR)$")
_SIMPLE = re.compile(r"[\d.]{1,9}|true|false|yes|no|on|off|disabled|token", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    level: ok, note or problem. remedy: a command to type. refusal: not to be worked around, for safety.
    """

    group: str
    what: str
    level: str
    detail: str
    remedy: str | None = None
    refusal: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Everything that is checked, in the order of the groups. A check that fails is a problem, never an exception."""
    found: list[Finding] = []
    for group, check in _GROUPS:
        found += _guarded(group, check)
    return found


def _guarded(group: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for finding in check():
                found.append(finding)
    except Exception as error:
        what = check.__name__.strip("_").replace("_", " ")
        remedy = _SYNC if isinstance(error, ImportError) else None
        found.append(Finding(group, what, "problem", f"the check failed: {_text(error)}", remedy))
    return [replace(f, group=group, detail=_clean(f.detail), remedy=f.remedy and _clean(f.remedy)) for f in found]


def render(findings: Sequence[Finding], width: int | None = None) -> str:
    """Findings as lines for people: groups, then problems with their remedies, then how many there are."""
    width = max(60, width or shutil.get_terminal_size((110, 24)).columns)
    problems = [f for f in findings if f.level == "problem"]
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.level != "problem":
            groups.setdefault(finding.group, []).append(finding)
    if problems:
        groups["problems"] = problems
    lines: list[str] = []
    for group, members in groups.items():
        column = min(28, max(10, *(len(member.what) for member in members)))
        lines += [group, *(line for member in members for line in _lines(member, column, width)), ""]
    counts = [(len(problems), "problem"), (sum(f.level == "note" for f in findings), "note")]
    closing = ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts if n) or "everything is in order"
    if refused := sum(f.refusal for f in problems):
        closing += f"; {refused} of them refused for safety"
    return "\n".join([*lines, closing])


def _lines(finding: Finding, column: int, width: int) -> list[str]:
    head = f"  {finding.level:7}  {finding.what:{column}}  "
    room = max(width - len(head), 30)
    detail = textwrap.wrap(finding.detail, room, break_long_words=False, break_on_hyphens=False) or [""]
    # A remedy is never broken: it is there to be copied.
    rest = [*detail[1:], *([f"→ {finding.remedy}"] if finding.remedy else [])]
    return [(head + detail[0]).rstrip(), *(" " * len(head) + text for text in rest)]


def _ok(what: str, detail: str) -> Finding:
    return Finding("", what, "ok", detail)


def _note(what: str, detail: str, remedy: str | None = None) -> Finding:
    return Finding("", what, "note", detail, remedy)


def _problem(what: str, detail: str, remedy: str | None = None, refusal: bool = False) -> Finding:
    return Finding("", what, "problem", detail, remedy, refusal)


def _text(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _clean(text: str) -> str:
    """Without values of secret variables and without user, password and query of URLs.

    Not `engine.run.redact`: this module must work where that one cannot be imported.
    """
    secret = [v for k, v in os.environ.items() if _SECRET_NAME.search(k) and not _PLACE_NAME.search(k)]
    for value in sorted(secret, key=len, reverse=True):
        if len(value) >= 6:
            text = text.replace(value, "[hidden]")
    text = re.sub(r"(://)[^\s\"']*@", r"\1", text)
    text = re.sub(r"[^\s/:@]+:[^\s@]+@", "", text)  # user:password@host, without a scheme
    return re.sub(r"(://[^\s?]+)\?\S+", r"\1", text)


# ------------------------------------------------------------------------------------------------ python


def _python() -> Iterator[Finding]:
    version, (first, last) = sys.version_info[:2], PYTHONS
    supported = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    detail = f"{platform.python_version()}, {sys.executable}"
    if first <= version <= last:
        yield _ok("Python", detail)
    else:
        wish = f"{last[0]}.{last[1]}"
        yield _problem("Python", f"{detail}; {supported} will do", f"uv python pin {wish} && {_SYNC}")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform == "linux":
        yield _ok("system", system)
    else:
        yield _note("system", f"{system}; only Linux is tested")
    yield from _bytecode()


def _bytecode() -> Iterator[Finding]:
    off = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    missing = _uncompiled("torch")
    if missing and off:
        yield _problem(
            "bytecode",
            f"{missing} files of torch are not compiled and PYTHONDONTWRITEBYTECODE is set: every process compiles "
            "them again, some ten seconds each",
            f"unset PYTHONDONTWRITEBYTECODE && {_SYNC} --compile-bytecode",
        )
    elif missing:
        detail = f"{missing} files of torch are not compiled yet: the first run, or every one, starts slowly"
        yield _note("bytecode", detail, f"{_SYNC} --compile-bytecode")
    elif off:
        detail = "PYTHONDONTWRITEBYTECODE is set: what is not compiled yet is compiled again in every process"
        yield _note("bytecode", detail, "unset PYTHONDONTWRITEBYTECODE")
    else:
        yield _ok("bytecode", "torch is compiled" if importlib.util.find_spec("torch") else "may be written")


def _uncompiled(package: str) -> int:
    """How many source files of a package have no bytecode, among those that importing it needs."""
    spec = importlib.util.find_spec(package)  # finds, does not import
    if spec is None or not spec.origin:
        return 0
    root = Path(spec.origin).parent
    files = [
        path for part in (".", "nn/modules", "autograd", "utils", "distributed") for path in root.glob(f"{part}/*.py")
    ]
    return sum(not os.path.exists(importlib.util.cache_from_source(str(path))) for path in files)


# ---------------------------------------------------------------------------------------------- packages


def installed(name: str) -> str | None:
    """Version of an installed package, from its metadata; None without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_version(name: str, version: str, specifier: str = "", remedy: str | None = None) -> Finding:
    """Whether an installed version is free of known holes and what the package needs (`specifier`, e.g. '>=2.0')."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        have = Version(version)
    except (InvalidVersion, TypeError):
        return _problem(name, f"its version, {version!r}, cannot be read", f"{_SYNC} --reinstall-package {name}")
    if any(have.public == Version(bad).public for bad in MALICIOUS.get(name, ())):
        return _problem(
            name,
            f"{version} is a malicious upload that steals credentials when imported; after removing it, "
            "replace every credential this machine has held",
            f"uv pip uninstall {name}",
            refusal=True,
        )
    mend = remedy or f"{_SYNC} --upgrade-package {name}"
    if name in HOLES and have < Version(HOLES[name][0]):
        floor, hole = HOLES[name]
        return _problem(name, f"{version} has a known hole ({hole}); {floor} or later has not", mend)
    if not SpecifierSet(specifier).contains(have, prereleases=True):
        return _problem(name, f"{version} does not fit, {specifier} is needed", mend)
    return _ok(name, version)


def _needed() -> list[tuple[Any, str]]:
    """What this installation says it needs on this platform, each with the extra that alone needs it, or none."""
    from packaging.requirements import Requirement

    if installed("counterpoise") is None:
        return []
    extras = importlib.metadata.metadata("counterpoise").get_all("Provides-Extra") or []
    found = []
    for text in importlib.metadata.requires("counterpoise") or []:
        needed = Requirement(text)
        if _applies(needed, ""):
            found.append((needed, ""))
        elif extra := next((e for e in extras if _applies(needed, e)), ""):
            found.append((needed, extra))
    return found


def _installing(package: str) -> str:
    """The command that installs a package, with the extra that it belongs to."""
    extra = next((extra for needed, extra in _needed() if needed.name == package), "")
    return f"{_SYNC} --extra {extra}" if extra else _SYNC


def _packages() -> Iterator[Finding]:
    own = installed("counterpoise")
    if own is None:
        yield _note("counterpoise", "runs from its source folder, not installed: versions needed are unknown", _SYNC)
    else:
        yield _ok("counterpoise", own)
    fine: list[str] = []
    seen = set()
    for needed, extra in _needed():
        seen.add(needed.name)
        command = f"{_SYNC} --extra {extra}" if extra else _SYNC
        version = installed(needed.name)
        if version is None and extra:
            yield _note(needed.name, f"not installed; only the extra '{extra}' needs it", command)
        elif version is None:
            yield _problem(needed.name, "not installed", command)
        else:
            remedy = f"{command} --upgrade-package {needed.name}"
            finding = check_version(needed.name, version, str(needed.specifier), remedy)
            if finding.level == "ok" and needed.name not in HOLES:
                fine.append(f"{needed.name} {version}")
            else:
                yield finding
    for name in [*HOLES, *MALICIOUS]:
        version = installed(name)
        if name not in seen and version is not None:
            yield check_version(name, version, remedy=f"uv pip install --upgrade {name}")
    if fine:
        yield _ok("others", ", ".join(fine))


def _applies(requirement: Any, extra: str) -> bool:
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": extra}))


# --------------------------------------------------------------------------------------- torch and devices


def _torch() -> Iterator[Finding]:
    reinstall = f"{_SYNC} --reinstall-package torch --reinstall-package torchvision"
    try:
        import torch
    except Exception as error:
        yield _problem("torch", f"cannot be imported: {_text(error)}", reinstall)
        return
    yield _ok("torch", f"{torch.__version__} imports, {_built_for(torch)}")
    try:
        import torchvision
    except Exception as error:
        yield _problem("torchvision", f"does not match torch {torch.__version__}: {_text(error)}", reinstall)
    else:
        yield _matching(torchvision.__version__, torch.__version__, _requirements("torchvision"), reinstall)
    yield from _cuda(torch)
    yield from _cpu(torch.get_num_threads())


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if getattr(torch.version, "hip", None) else "built for CPUs only"


def _requirements(name: str) -> list[str]:
    return importlib.metadata.requires(name) or [] if installed(name) else []


def _matching(torchvision: str, torch: str, requirements: Iterable[str], remedy: str) -> Finding:
    """Whether torchvision was made for this torch, by its own metadata."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.name == "torch" and not requirement.specifier.contains(torch, prereleases=True):
            return _problem("torchvision", f"{torchvision} needs torch {requirement.specifier}, not {torch}", remedy)
    return _ok("torchvision", f"{torchvision} imports, matches torch")


def _cuda(torch: Any) -> Iterator[Finding]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    for i, device in enumerate(devices):
        version = f"compute {device.major}.{device.minor}"
        yield _ok(f"cuda:{i}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {version}")
    said = str(caught[0].message).strip().splitlines()[0] if caught else ""
    if devices:
        if said:
            yield _note("CUDA", said)
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if workspace not in (":4096:8", ":16:8"):
            detail = f"CUBLAS_WORKSPACE_CONFIG={workspace}: results differ from run to run"
            yield _note("cuBLAS", detail, "export CUBLAS_WORKSPACE_CONFIG=:4096:8")
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not _gpu_there():
        yield _ok("CUDA", "no GPU; training runs on the CPU")
    elif hidden is not None and hidden.strip() in ("", "-1"):
        yield _note("CUDA", f"GPUs are hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES")
    elif torch.version.cuda is None:
        yield _problem(
            "CUDA", "a GPU is there, but this torch is built without CUDA", f"{_SYNC} --reinstall-package torch"
        )
    else:
        yield _problem("CUDA", f"a GPU is there, but torch cannot use it{': ' + said if said else ''}", "nvidia-smi")


def _gpu_there() -> bool:
    return os.path.exists("/dev/nvidia0") or os.path.isdir("/proc/driver/nvidia/gpus")


def _cpu(threads: int) -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = _cpu_quota()
    usable = max(1, int(min(allowed, quota or allowed)))
    limits = [f"{allowed} allowed by affinity"] if allowed < cores else []
    limits += [f"{quota:g} by the cgroup"] if quota and quota < allowed else []
    detail = ", ".join([_number(cores, "core"), *limits, f"torch uses {_number(threads, 'thread')}"])
    if threads > usable:
        yield _note("CPU", f"{detail}: more threads than cores slow one another", f"export OMP_NUM_THREADS={usable}")
    else:
        yield _ok("CPU", detail)
    memory = _meminfo()
    if "MemTotal" in memory:
        limit = _memory_limit()
        total = min(memory["MemTotal"], limit or memory["MemTotal"])
        free = min(memory.get("MemAvailable", total), total)
        capped = ", capped by the cgroup" if limit and limit < memory["MemTotal"] else ""
        level = _note if free < 2 * GIB else _ok
        yield level("memory", f"{_size(total)}{capped}, {_size(free)} available")
    if os.path.isdir("/dev/shm"):
        shm = shutil.disk_usage("/dev/shm")
        detail = f"{_size(shm.total)}, {_size(shm.free)} free"
        if shm.free < SHM_NOTE:
            detail += ": little for Ray's object store, which then goes to disk and is slow"
            yield _note(
                "/dev/shm", detail, "mount -o remount,size=8G /dev/shm    (a container: docker run --shm-size=8g)"
            )
        else:
            yield _ok("/dev/shm", detail)


def _number(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _size(n: float) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB else f"{n / 2**20:.0f} MiB"


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}  # not Linux
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def _cpu_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float | None:
    """Cores that the cgroup, or one above it, grants; None without a limit."""
    found = []
    for folder in _cgroups("cpu", root, own):
        limit = _words(folder / "cpu.max")
        if not limit:  # version 1
            limit = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(limit) == 2 and limit[0].isdigit() and int(limit[1]) > 0:
            found.append(int(limit[0]) / int(limit[1]))
    return min(found, default=None)


def _memory_limit(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """Bytes that the cgroup, or one above it, grants; None without a limit."""
    found = []
    for folder in _cgroups("memory", root, own):
        limit = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
        if limit and limit[0].isdigit() and int(limit[0]) < 2**60:  # version 1 writes a huge number for none
            found.append(int(limit[0]))
    return min(found, default=None)


def _cgroups(controller: str, root: str, own: str) -> Iterator[Path]:
    """Folders of the cgroup of this process and of those above it, in version 2 and version 1."""
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = Path(root, controllers) if controllers else Path(root)
        inner = Path(path.lstrip("/"))
        yield from (top / part for part in dict.fromkeys([inner, *inner.parents]))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


# --------------------------------------------------------------------------------------------------- ray


def _ray() -> Iterator[Finding]:
    version = installed("ray")
    if version is None:
        yield _note("ray", "not installed; --engine local works without it", f"{_SYNC} --extra ray")
    elif importlib.util.find_spec("ray") is None:
        yield _problem(
            "ray", f"{version} is installed, but cannot be found", f"{_SYNC} --extra ray --reinstall-package ray"
        )
    else:
        yield _ok("ray", f"{version} (not started, not imported)")
    for name, hole in SWITCHES.items():
        if os.environ.get(name) is not None:
            yield _problem("data that runs code", f"{name} is set: {hole}", f"unset {name}", refusal=True)
    mode = os.environ.get("RAY_AUTH_MODE", "").strip().lower()
    if mode not in ("", "token", "disabled"):
        yield _problem("RAY_AUTH_MODE", f"is {mode!r}; Ray knows token and disabled", "export RAY_AUTH_MODE=token")
    yield from _ray_address(os.environ.get("RAY_ADDRESS", "").strip(), mode)
    yield from _ray_token(mode)


def _ray_address(address: str, mode: str) -> Iterator[Finding]:
    if address in ("", "local"):
        yield _ok("cluster", "RAY_ADDRESS is not set: each command starts its own on loopback")
        return
    where = address
    if address == "auto":
        known = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        where = known.read_text().strip() if known.exists() else ""
        if not where:
            yield _problem("cluster", "RAY_ADDRESS is auto, but no Ray runs on this machine", "unset RAY_ADDRESS")
            return
    if is_loopback(where):
        yield _ok("cluster", f"{where}, on this machine")
    elif mode != "token":
        yield _problem(
            "cluster",
            f"{where} is reached over the network without a token: whoever reaches it runs code there (CVE-2023-48022)",
            "export RAY_AUTH_MODE=token    (and start the cluster with it)",
            refusal=True,
        )
    elif os.environ.get("RAY_USE_TLS") != "1":
        yield _note("cluster", f"{where}, with a token but without TLS: use it in a private network only")
    else:
        yield _ok("cluster", f"{where}, with token and TLS")


def is_loopback(address: str) -> bool:
    """Whether an address (host:port, ray://host:port, http://host:port) can only mean this machine."""
    host = re.split(r"[/?#\\]", address.split("://", 1)[-1], maxsplit=1)[0].rsplit("@", 1)[-1]
    if host.startswith("["):
        host = host[1:].split("]", 1)[0]
    elif host.count(":") == 1:
        host = host.split(":", 1)[0]
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _ray_token(mode: str) -> Iterator[Finding]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield _ok("token", "from RAY_AUTH_TOKEN, value not shown")
    elif path.is_file():
        open_to = stat.S_IMODE(path.stat().st_mode) & 0o077
        if open_to:
            yield _note("token", f"from {path}, which others on this machine may read", f"chmod 600 {path}")
        else:
            yield _ok("token", f"from {path}")
    elif mode == "token":
        detail = f"RAY_AUTH_MODE is token, but there is none in RAY_AUTH_TOKEN or {path}"
        yield _problem("token", detail, "ray get-auth-token --generate    (or copy the cluster's)")


# -------------------------------------------------------------------------------------------------- disk


def _disk() -> Iterator[Finding]:
    runs = os.environ.get("COUNTERPOISE_RUNS") or "runs"
    yield from _place("runs", runs, "export COUNTERPOISE_RUNS=/other/disk/runs")
    yield from _place("temp", tempfile.gettempdir(), "export TMPDIR=/other/disk/tmp")
    from counterpoise.data.card import corpora_home

    yield from _place("corpora", corpora_home(), "export COUNTERPOISE_HOME=/other/disk/counterpoise")


def _place(what: str, place: str, remedy: str) -> Iterator[Finding]:
    if "://" in place and not place.startswith("file://"):
        yield _ok(what, f"{place} (remote; the network is not asked)")
        return
    path = Path(place.removeprefix("file://")).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    new = "" if there == path else ", not there yet"
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
    except OSError as error:
        yield _problem(what, f"{path} cannot be written: {error.strerror or error}", remedy)
        return
    free = shutil.disk_usage(there).free
    detail = f"{path}{new}, {_size(free)} free"
    if free < DISK_PROBLEM:
        yield _problem(what, f"{detail}; a run needs 1 GiB or more", remedy)
    elif free < DISK_NOTE:
        yield _note(what, f"{detail}; that fills soon", remedy)
    else:
        yield _ok(what, detail)


# ---------------------------------------------------------------------------------------- object storage


def _storage() -> Iterator[Finding]:
    version = installed("s3fs")
    if version is None:
        yield _problem("s3fs", "not installed: s3:// places cannot be used", _SYNC)
    else:
        yield _ok("s3fs", version)
    key, secret = (bool(os.environ.get(f"AWS_{name}")) for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or Path.home() / ".aws" / "credentials").expanduser()
    if key != secret:
        has, lacks = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")[:: 1 if key else -1]
        yield _problem("credentials", f"{has} is set without {lacks}", f"export {lacks}=...")
    elif key:
        kind = "temporary keys" if os.environ.get("AWS_SESSION_TOKEN") else "keys"
        yield _ok("credentials", f"{kind} from the environment, values not shown")
    elif file.is_file():
        yield _ok("credentials", f"from {file}")
    else:
        yield _ok("credentials", "none in the environment or in ~/.aws; needed for s3:// only")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        if "://" not in endpoint:
            yield _problem("endpoint", f"{endpoint} is no URL", f"export AWS_ENDPOINT_URL_S3=https://{endpoint}")
        elif endpoint.startswith("http://") and not is_loopback(endpoint):
            yield _note("endpoint", f"{endpoint} is not encrypted: data can be read on the way")
        else:
            yield _ok("endpoint", endpoint)
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not os.path.exists(bundle):
        yield _problem("certificates", f"AWS_CA_BUNDLE names {bundle}, which is not there", "unset AWS_CA_BUNDLE")


# ---------------------------------------------------------------------------------------- decoders, tools


def _decoders() -> Iterator[Finding]:
    for what, package, check, purpose in (
        ("soundfile", "soundfile", _soundfile, "sound cannot be read"),
        ("Pillow", "pillow", _pillow, "pictures cannot be read"),
        ("PyAV", "av", _pyav, "videos of downloads cannot be read"),
        ("OpenCV", "opencv-python-headless", _opencv, "optical flow cannot be computed"),
        ("pebble", "pebble", _pebble, "downloads cannot be made into corpora"),
        ("espeak-ng", "espeakng-loader", _espeak, "the corpus av_digits cannot be made"),
    ):
        try:
            yield _ok(what, check())
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and installed(package) is None:
                yield _problem(what, f"{package} is not installed: {purpose}", _installing(package))
            else:
                yield _problem(what, f"{_text(error)}: {purpose}", f"{_SYNC} --reinstall-package {package}")
    yield from _git()


def _soundfile() -> str:
    import soundfile

    missing = {"WAV", "FLAC", "OGG"} - set(soundfile.available_formats())
    if missing:
        raise RuntimeError(f"libsndfile {soundfile.__libsndfile_version__} cannot read {', '.join(sorted(missing))}")
    return f"{soundfile.__version__} with libsndfile {soundfile.__libsndfile_version__}: WAV, FLAC, OGG"


def _pillow() -> str:
    from PIL import __version__, features

    missing = [name for name, codec in (("JPEG", "jpg"), ("PNG", "zlib")) if not features.check(codec)]
    if missing:
        raise RuntimeError(f"{__version__} cannot read {', '.join(missing)}")
    return f"{__version__}: JPEG, PNG"


def _pyav() -> str:
    """Of FFmpeg, which comes with PyAV, what the videos of the corpora are coded in."""
    import av

    codecs = {
        "h264": "H.264",
        "vp9": "VP9",
        "mpeg4": "MPEG-4",
        "flv": "FLV",
        "aac": "AAC",
        "mp3": "MP3",
        "opus": "Opus",
    }
    missing = [shown for name, shown in codecs.items() if name not in av.codecs_available]
    if missing:
        raise RuntimeError(f"{av.__version__} cannot read {', '.join(missing)}")
    major, minor, _ = av.library_versions["libavcodec"]
    return f"{av.__version__} with libavcodec {major}.{minor}: {', '.join(codecs.values())}"


def _opencv() -> str:
    import cv2 as opencv

    cv2: Any = opencv  # its type stubs lack the class for flow
    cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return f"{cv2.__version__}: DIS optical flow"


def _pebble() -> str:
    importlib.import_module("pebble")
    return f"{installed('pebble')}: processes that may crash or hang"


def _espeak() -> str:
    """Version of the speech synthesizer that the av_digits corpus is spoken with."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Info.restype = ctypes.c_char_p
    version = library.espeak_Info(None).decode()
    espeakng_loader.get_data_path()  # raises if the voices are not there
    return f"{version.split()[0]} loads, voices are there"


def _git() -> Iterator[Finding]:
    command = shutil.which("git")
    if command is None:
        yield _note("git", "not found: runs cannot record the commit they came from", "apt-get install git")
        return
    said = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=5, check=True).stdout
    yield _ok("git", said.strip().removeprefix("git version "))


# ------------------------------------------------------------------------------------------- environment


def _environment() -> Iterator[Finding]:
    listed = [name for name in os.environ if name.startswith(PREFIXES)]
    names = [name for name in ENVIRONMENT if name in os.environ]
    for name in [*names, *sorted(set(listed) - set(names))]:
        yield _ok(name, "  ".join(part for part in (shown(name, os.environ[name]), _purpose(name)) if part))
    if absent := [name for name in ENVIRONMENT if name not in os.environ]:
        yield _ok("not set", ", ".join(absent))


def _purpose(name: str) -> str:
    return f"({ENVIRONMENT[name]})" if name in ENVIRONMENT else ""


def shown(name: str, value: str) -> str:
    """The value of a variable as it may be printed."""
    if name in ENVIRONMENT or (_SIMPLE.fullmatch(value) and not _SECRET_NAME.search(name)):
        return _clean(value) if value else "(empty)"
    return "set, value not shown"


_GROUPS: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
    ("python", _python),
    ("packages", _packages),
    ("torch and devices", _torch),
    ("ray", _ray),
    ("disk", _disk),
    ("object storage", _storage),
    ("decoders and tools", _decoders),
    ("environment", _environment),
)
