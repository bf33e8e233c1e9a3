"""Prism, an HTTP server from npm that checks requests and answers against an OpenAPI description.

python tests/dashboards/prism.py        fetches it once: 185 packages, 90 MB in the user's cache
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # as a script it needs nothing but Python
    from counterpoise.dashboards.stack import Server

CONTRACT = Path(__file__).with_name("contract")
DESCRIPTION = CONTRACT / "grafana.yaml"
SOURCES = ("package.json", "package-lock.json")
PROGRAM = Path("node_modules", "@stoplight", "prism-cli", "dist", "index.js")
INSTALL_S = 180


def place() -> Path:
    """Where Prism is, or will be: in the user's cache, as the preview of dashboards, one folder per pinned version."""
    digest = hashlib.sha256(b"".join((CONTRACT / name).read_bytes() for name in SOURCES)).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(cache) / "counterpoise" / f"prism-{digest[:16]}"


def is_installed() -> bool:
    return (place() / PROGRAM).is_file()


def install() -> None:
    """Fetch what package-lock.json pins, unless it is there."""
    if is_installed():
        return
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is not installed; Prism needs Node.js 18 or later: https://nodejs.org")
    work = place().with_suffix(f".unfinished-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        for name in SOURCES:
            shutil.copy(CONTRACT / name, work / name)
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        subprocess.run([npm, "ci", *quiet], cwd=work, timeout=INSTALL_S, check=True)
        os.replace(work, place())
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def serving(folder: Path, *, upstream: str | None = None) -> Iterator[Server]:
    """Prism on loopback for the time of the block: makes answers up, or asks `upstream` and checks its answers.

    What does not fit the description is answered with an error; folder: for its log.
    """
    from counterpoise.dashboards.stack import Server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    what = ["mock", str(DESCRIPTION)] if upstream is None else ["proxy", str(DESCRIPTION), upstream]
    command = ["node", str(place() / PROGRAM), *what, "--errors", "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "prism.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    server = Server("prism", process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until("/api/health")
        yield server
    finally:
        server.stop()


if __name__ == "__main__":
    install()
    print(f"Prism is in {place()}")
