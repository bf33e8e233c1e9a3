"""Text from outside as plain data: mappings, lists, texts and numbers.

What would run code, grow without bound or nest without end is no plain data; the error says which.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

MAX_YAML_BYTES = 200_000  # PyYAML needs seconds for more; the largest card has nine thousand


class NotPlain(ValueError):
    """The text is no plain data; one line that says why."""


class _Loader(yaml.SafeLoader):
    """safe_load without aliases, of which a few lines can stand for gigabytes, and without silently repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key.value, str):
                if key.value in seen:
                    message = f"key '{key.value}' is given twice"
                    raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """What YAML text holds."""
    if len(text) > MAX_YAML_BYTES:
        raise NotPlain(f"longer than {MAX_YAML_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise NotPlain("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2020-13-45
        raise NotPlain(" ".join(str(error).split())) from None


def read_json(text: str | bytes) -> Any:
    """What JSON text holds."""
    try:
        return json.loads(text)
    except RecursionError:
        raise NotPlain("nested too deeply") from None
    except ValueError as error:
        raise NotPlain(" ".join(str(error).split())) from None
