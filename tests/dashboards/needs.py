"""Programs that are not Python packages: without them a test is skipped on a laptop and fails in CI."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest
from tests.dashboards import prism

from counterpoise.dashboards import preview


def need(command: str, remedy: str) -> str:
    """The path of a program."""
    if (found := shutil.which(command)) is not None:
        return found
    missing(f"{command} is not installed; {remedy}")


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_prometheus() -> str:
    need("promtool", "apt-get install prometheus")
    return need("prometheus", "apt-get install prometheus")


def need_prism() -> None:
    """Prism is fetched where there is npm; where there is none, no machine is expected to have it."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("Prism needs Node.js 18 or later: https://nodejs.org")
    if not prism.is_installed():
        missing("Prism is not installed; python tests/dashboards/prism.py")


def need_preview() -> None:
    """As Prism; and Chromium."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("the preview needs Node.js 18 or later: https://nodejs.org")
    if not preview.is_built():
        missing("the drawing code is not built; counterpoise dashboards preview --install")
    if not any(map(shutil.which, preview.BROWSERS)):
        missing("no Chromium or Chrome is installed; apt-get install chromium")
