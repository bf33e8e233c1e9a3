"""Pictures of the dashboards from a Prometheus server, without Grafana: its UI components in a headless browser."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, ResourceError
from counterpoise.dashboards import files
from counterpoise.wording import did_you_mean

SOURCES = ("package.json", "package-lock.json", "app.tsx", "build.mjs", "index.html", "shoot.mjs")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL_S, DRAW_S = 900, 400
WIDTH = 1600  # pixels


@dataclass(frozen=True)
class Picture:
    """A dashboard as it was drawn. problems: panels without data, with an error, and errors of the page."""

    file: str
    panels: int
    problems: list[dict[str, str]]

    @property
    def errors(self) -> list[str]:
        return [f"{p['panel'] or 'page'}: {p['text']}" for p in self.problems if p["kind"] in ("error", "page")]

    @property
    def empty(self) -> list[str]:
        return [p["panel"] for p in self.problems if p["kind"] == "empty"]


def place() -> Path:
    """Where the drawing code is, or will be, built: in the user's cache, one folder per version of its sources."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((files.root() / "preview" / name).read_bytes())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
    return Path(cache) / "counterpoise" / f"preview-{digest.hexdigest()[:16]}"


def is_built() -> bool:
    return (place() / "built" / "app.js").is_file()


def install(say: Callable[[str], None]) -> None:
    """Fetch Grafana's components from the npm registry, as package-lock.json pins them, and bundle them."""
    if is_built():
        say(f"the drawing code is already in {place()}")
        return
    npm, node = _needed("npm"), _needed("node")
    work = place().with_suffix(f".unfinished-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        for name in SOURCES:
            shutil.copy(files.root() / "preview" / name, work / name)
        say("fetching Grafana's components from the npm registry: 350 packages, 500 MB for the time of the build")
        quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--legacy-peer-deps", "--loglevel=error"]
        _run([npm, "ci", *quiet], work)
        say("bundling")
        _run([node, "build.mjs"], work)
        _run([npm, "prune", "--omit=dev", *quiet], work)
        os.replace(work, place())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"the drawing code is in {place()}")


def preview(
    prometheus: str,
    out: str,
    *,
    boards: Sequence[str] = (),
    variables: Mapping[str, Sequence[str]] | None = None,
    range_s: int = 900,
    until: float | None = None,
    theme: str = "dark",
    width: int = WIDTH,
) -> list[Picture]:
    """Draw dashboards over `range_s` seconds, out/NAME.png each.

    until: the end of that time in Unix seconds, None for now. boards: names, all if empty. variables: values of the
    dashboards' variables, all if not given.
    """
    known = files.committed()
    for name in boards:
        if name not in known:
            raise ConfigError(
                f"no dashboard is called {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
    if not is_built():
        raise ResourceError(
            "the preview draws with Grafana's own components, which have to be built once: "
            "counterpoise dashboards preview --install (needs npm and its registry, and a few minutes)"
        )
    _check_answers(prometheus)
    node, browser = _needed("node"), _browser()
    folder = Path(storage.local_path(out))
    storage.make_folder(str(folder))
    asked = {
        "chromium": browser,
        "flags": ["--no-sandbox"] if os.geteuid() == 0 else [],  # Chromium's sandbox refuses root
        "prometheus": prometheus.rstrip("/"),
        "width": width,
        "range": range_s,
        "to": int(time.time() if until is None else until),
        "theme": theme,
        "jobs": [
            {"dashboard": known[name], "out": str(folder / f"{name}.png"), "variables": dict(variables or {})}
            for name in (boards or known)
        ],
    }
    done = _run([node, "shoot.mjs"], place(), json.dumps(asked), DRAW_S)
    return [Picture(line["out"], line["panels"], line["problems"]) for line in map(json.loads, done.splitlines())]


def _check_answers(prometheus: str) -> None:
    if not prometheus.startswith(("http://", "https://")):
        raise ConfigError(f"--prometheus is {prometheus!r}; give an address, e.g. http://127.0.0.1:9090")
    try:
        with urllib.request.urlopen(f"{prometheus.rstrip('/')}/api/v1/status/buildinfo", timeout=10) as answer:
            status: Any = json.load(answer).get("status")
    except (OSError, ValueError, AttributeError) as error:
        raise ResourceError(
            f"no Prometheus answers at {prometheus} ({error}); `counterpoise monitor` starts one"
        ) from None
    if status != "success":
        raise ResourceError(f"what answers at {prometheus} is no Prometheus")


def _needed(command: str) -> str:
    found = shutil.which(command)
    if found is None:
        raise ResourceError(f"{command} is not installed; the preview needs Node.js 18 or later: https://nodejs.org")
    return found


def _browser() -> str:
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    raise ResourceError("no Chromium or Chrome is installed; apt-get install chromium")


def _run(command: Sequence[str], folder: Path, given: str = "", limit_s: float = INSTALL_S) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, input=given, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{Path(command[0]).name} {command[1]} took longer than {limit_s:.0f} s") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip()
        raise ResourceError(f"{Path(command[0]).name} {command[1]} failed with {done.returncode}: {words[-800:]}")
    return done.stdout
