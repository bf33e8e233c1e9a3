"""Counterpoise: balanced multimodal learning, from a laptop to a Ray cluster.

From Python: train, load_run, load_runs, load_records, load_model, experiment, formulas, list_methods; see
docs/python-api.md. They are imported when they are first used: `import counterpoise` alone is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = {
    "CounterpoiseError": "contracts",
    "Experiment": "config",
    "Interrupted": "contracts",
    "Run": "api",
    "experiment": "api",
    "formulas": "api",
    "list_methods": "api",
    "load_model": "api",
    "load_records": "api",
    "load_run": "api",
    "load_runs": "api",
    "train": "api",
}

if TYPE_CHECKING:
    from counterpoise.api import (
        Run,
        experiment,
        formulas,
        list_methods,
        load_model,
        load_records,
        load_run,
        load_runs,
        train,
    )
    from counterpoise.config import Experiment
    from counterpoise.contracts import CounterpoiseError, Interrupted

__all__ = [
    "CounterpoiseError",
    "Experiment",
    "Interrupted",
    "Run",
    "__version__",
    "experiment",
    "formulas",
    "list_methods",
    "load_model",
    "load_records",
    "load_run",
    "load_runs",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'counterpoise' has no attribute {name!r}")
    return getattr(import_module(f"counterpoise.{_API[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
