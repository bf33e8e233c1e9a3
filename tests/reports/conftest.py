from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`make_run` of make_run.py, which is a program too and so no package."""
    spec = importlib.util.spec_from_file_location("make_run", Path(__file__).with_name("make_run.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_run
