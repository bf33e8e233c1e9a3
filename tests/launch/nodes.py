"""A Ray cluster of several nodes on this machine, for tests of what happens when nodes come and go.

Every node is a `ray start` of its own, with its own processes, resources, address (127.0.0.N) and folder; it can be
killed, drained and added like a machine. Ray listens on all interfaces as soon as an address is not 127.0.0.1, so the
cluster wants a token. With `namespaces=True` every worker node has a network, processes and a host name of its own,
joined by a bridge: as on real machines, nothing on one node is reached through the loopback of another. That needs
root and is skipped without.

    with Nodes(tmp_path, workers=(2, 2)) as nodes:       # CPUs of each worker node; the head has `head` CPUs
        subprocess.run([..., "--address", nodes.address], env=nodes.environment)
        nodes.workers[0].kill()
        nodes.add(2)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

MARK = "COUNTERPOISE_TEST_NODE"  # in the environment of every process of a node
START_S = 240.0  # many processes on a busy machine
PACKAGE = Path(__file__).resolve().parents[2] / "platform"
# A node whose raylet is gone is dead after some seconds instead of a quarter of a minute; one that is slow is not.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "5",
}


def wait_for(condition: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:.0f} s in vain {what}".rstrip())


def processes(mark: str) -> list[psutil.Process]:
    """Processes of this machine, zombies left out, whose environment carries a mark, and all below them."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK, "").startswith(mark):
                found[process.pid] = process
                found |= {child.pid: child for child in process.children(recursive=True)}
    found.pop(os.getpid(), None)
    return list(found.values())


def end(found: Callable[[], Sequence[psutil.Process]]) -> None:
    """SIGKILL, again until nothing is found: what is killed may just have started something."""
    while alive := found():
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


@dataclass
class Node:
    """One `ray start`."""

    name: str
    ip: str
    node_id: str  # hex, as Ray has it
    cpus: float
    mark: str
    process: subprocess.Popen[bytes]
    log: Path
    nodes: Nodes = field(repr=False)
    argv: list[str] = field(repr=False)

    def processes(self) -> list[psutil.Process]:
        """All that runs on the node: of Ray, workers, and drivers of jobs."""
        return processes(self.mark)

    def kill(self) -> None:
        """As if the machine had lost its power: SIGKILL to everything at once."""
        end(self.processes)
        self.process.wait()

    def drain(self, seconds: int) -> None:
        """A notice that the node will be taken away in so many seconds. Ray ends it then."""
        asked = ["drain-node", "--address", self.nodes.address, "--node-id", self.node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away by a test"]
        argv = [*self.nodes.ray, *asked, *reason, "--deadline-remaining-seconds", str(seconds)]
        done = subprocess.run(argv, env=self.nodes.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


class Nodes:
    """The cluster. address: host:port of the head; dashboard: URL of its dashboard and job server.

    environment: what a client needs to be let in (the path of the token, not the token), and to find this package.
    head: CPUs of the head. quick: notice dead nodes sooner than Ray does by default.
    """

    ray = (str(Path(sys.executable).with_name("ray")),)

    def __init__(
        self,
        folder: Path | None = None,
        *,
        head: float = 1,
        workers: Sequence[float] = (2, 2),
        quick: bool = True,
        namespaces: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if namespaces and not can_make_namespaces():
            pytest.skip("network namespaces need root and iproute2")
        self._own_folder = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="cp-nodes-", dir="/tmp")) if folder is None else folder
        self._root = Path(tempfile.mkdtemp(prefix="cp-", dir="/tmp"))  # names of sockets have 107 bytes
        self.mark = uuid.uuid4().hex
        self._number = 0
        self._network = _Network(self.mark[:4]) if namespaces else None
        host = self._network.address(1) if self._network else "127.0.0.2"
        self.head_ip = host
        port, board = free_ports(2)
        self.address = f"{host}:{port}"
        self.dashboard = f"http://127.0.0.1:{board}"
        token = self._root / "token"
        with open(os.open(token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONDONTWRITEBYTECODE"}
        self.environment = {
            **kept,
            "PYTHONPATH": str(PACKAGE),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_worker_niceness": "0",
            "RAY_enable_metrics_collection": "0",
            "OMP_NUM_THREADS": "1",
            **(HEALTH if quick else {}),
            **(environment or {}),
        }
        self.workers: list[Node] = []
        try:
            head_flags = ["--head", "--port", str(port), "--dashboard-host", "127.0.0.1"]
            head_flags += ["--dashboard-port", str(board), "--ray-client-server-port", str(free_ports(1)[0])]
            self.head = self._start(head, head_flags)
            self._wait([self.head])
            self.workers += [self._start(cpus, ["--address", self.address]) for cpus in workers]
            self._wait(self.workers)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, cpus: float) -> Node:
        """One more worker node, when it has joined."""
        node = self._start(cpus, ["--address", self.address])
        self.workers.append(node)
        self._wait([node])
        return node

    def close(self) -> None:
        """End everything of the cluster; nothing of it is left on the machine."""
        end(lambda: processes(self.mark))
        for node in [getattr(self, "head", None), *self.workers]:
            if node is not None:
                node.process.wait()
        if self._network:
            self._network.close()
        shutil.rmtree(self._root, ignore_errors=True)
        if self._own_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def logs(self) -> str:
        """The end of every file that Ray has written something to, for a message."""
        files = [f for f in self._root.glob("*/session_2*/logs/*.*") if f.is_file() and f.stat().st_size]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _start(self, cpus: float, flags: Sequence[str]) -> Node:
        self._number += 1
        name = "head" if self._number == 1 else f"node-{self._number}"
        inside: list[str] = []
        if self._network is None:
            ip = f"127.0.0.{self._number + 1}"
        elif self._number == 1:
            ip = self._network.address(1)
        else:
            ip, inside = self._network.join(self._number, name)
        node_id = uuid.uuid4().hex + uuid.uuid4().hex[:24]
        mark = f"{self.mark}-{self._number}."
        argv = [*inside, *self.ray, "start", "--block", "--node-ip-address", ip, "--num-cpus", f"{cpus:g}", *flags]
        argv += ["--temp-dir", str(self._root / name), "--object-store-memory", str(100 * 2**20)]
        argv += ["--min-worker-port", "0", "--max-worker-port", "0"]
        for kind in ("agent-listen", "agent-grpc"):
            argv += [f"--dashboard-{kind}-port", "0"]
        argv += ["--runtime-env-agent-port", "0", "--metrics-export-port", "0"]
        log = self.folder / f"{name}.log"
        return Node(name, ip, node_id, cpus, mark, self._launch(argv, mark, node_id, log), log, self, argv)

    def _launch(self, argv: Sequence[str], mark: str, node_id: str, log: Path) -> subprocess.Popen[bytes]:
        more = {MARK: mark, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id}
        output: Any = subprocess.STDOUT
        with open(log, "wb") as file:
            return subprocess.Popen(
                argv, env={**self.environment, **more}, stdout=file, stderr=output, start_new_session=True
            )

    def _wait(self, nodes: Sequence[Node]) -> None:
        """Until they have joined. On a busy machine Ray may give up asking the head; then it is started again."""

        def ready(node: Node) -> bool:
            text = node.log.read_text(errors="replace")
            if node.process.poll() is not None:
                assert "Deadline Exceeded" in text or "timed out" in text, text
                node.kill()
                node.node_id = uuid.uuid4().hex + uuid.uuid4().hex[:24]
                node.process = self._launch(node.argv, node.mark, node.node_id, node.log)
                return False
            return "will now block forever" in text

        for node in nodes:
            wait_for(lambda node=node: ready(node), START_S, f"for {node.name} to start: see {node.log}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def can_make_namespaces() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"cp{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


class _Network:
    """A bridge, and a network namespace per node with one leg on it. Address 1 is this machine."""

    def __init__(self, tag: str) -> None:
        self.tag, self.bridge = tag, f"cp{tag}br"
        self._subnet = f"10.{180 + int(tag[:2], 16) % 60}.{int(tag[2:4], 16)}"
        self._names: list[str] = []
        self._ip("link", "add", self.bridge, "type", "bridge")
        self._ip("address", "add", f"{self.address(1)}/24", "dev", self.bridge)
        self._ip("link", "set", self.bridge, "up")

    def address(self, number: int) -> str:
        return f"{self._subnet}.{number}"

    def join(self, number: int, host: str) -> tuple[str, list[str]]:
        """The address of a new namespace, and the beginning of a command that runs in it under a host name.

        As Debian has it, the name of a host is an address of its loopback in its own /etc/hosts.
        """
        name, ip = f"cp{self.tag}n{number}", self.address(number)
        outside, leg = f"cp{self.tag}o{number}", f"cp{self.tag}i{number}"
        self._ip("netns", "add", name)
        self._names.append(name)
        self._ip("link", "add", outside, "type", "veth", "peer", "name", leg)
        self._ip("link", "set", leg, "netns", name)
        self._ip("link", "set", outside, "master", self.bridge, "up")
        self._ip("-n", name, "address", "add", f"{ip}/24", "dev", leg)
        for device in (leg, "lo"):
            self._ip("-n", name, "link", "set", device, "up")
        self._ip("-n", name, "route", "add", "default", "via", self.address(1))
        etc = Path("/etc/netns", name)
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n")
        # Processes too: where Ray sees those of a head it takes its own node for the head's. The shell stays, to reap.
        renamed = f'hostname "{host}" && "$@"; exit $?'
        apart = ["unshare", "--uts", "--pid", "--fork", "--mount-proc"]
        return ip, ["ip", "netns", "exec", name, *apart, "sh", "-c", renamed, "sh"]

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)

    @staticmethod
    def _ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextlib.contextmanager
def as_client(nodes: Nodes) -> Iterator[None]:
    """This process as a client of the cluster, for the time of the block."""
    wanted = {k: v for k, v in nodes.environment.items() if k.startswith("RAY_")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            patch.setenv(name, value)
        yield


def stop(process: subprocess.Popen[Any], number: signal.Signals = signal.SIGKILL) -> None:
    """A signal to one process of ours, and its end."""
    process.send_signal(number)
    process.wait(timeout=60)
