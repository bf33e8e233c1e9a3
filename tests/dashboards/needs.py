"""Programs that are not Python packages: without them a test is skipped on a laptop and fails in CI."""

from __future__ import annotations

import os
import shutil

import pytest


def need(command: str, remedy: str) -> str:
    """The path of a program."""
    if (found := shutil.which(command)) is not None:
        return found
    reason = f"{command} is not installed; {remedy}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_prometheus() -> str:
    need("promtool", "apt-get install prometheus")
    return need("prometheus", "apt-get install prometheus")
