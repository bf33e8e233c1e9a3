"""What `counterpoise methods show` prints: formula, departures from paper and released code, settings."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from counterpoise.methods.base import Method


def describe(name: str, method: type[Method[Any]]) -> str:
    """A page about a method: the docstring of its module, then what every method has to say about itself."""
    facts = {
        "Predictions of a modality": method.modality_predictions,
        "More than two modalities": method.beyond_two,
        "Released code": method.released,
    }
    lines = [inspect.getdoc(inspect.getmodule(method)) or "", ""]
    for title, text in facts.items():
        if text:
            lines += [title, textwrap.indent(textwrap.fill(text, 116), "  "), ""]
    lines.append(f"Settings, under method: {{name: {name}, ...}} or --set method.KEY=VALUE")
    for key, default, description in _settings(method.Config):
        lines += [f"  {key} = {default}", textwrap.indent(textwrap.fill(description, 112), "      ")]
    return "\n".join(lines) if method.Config.model_fields else "\n".join([*lines[:-1], "No settings."])


def _settings(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for key, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{key}.")
        else:
            default = "required" if field.is_required() else _text(field.get_default(call_default_factory=True))
            yield f"{prefix}{key}", default, field.description or ""


def _text(value: Any) -> str:
    """A default as YAML would have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
