"""Words that several parts say to people in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """ ", did you mean 'x'?" for the known word that is nearest, or nothing."""
    if len(str(word)) > 200:  # nobody meant that, and comparing takes long
        return ""
    close = get_close_matches(str(word), [str(k) for k in known], n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def shortened(text: str, most: int = 200) -> str:
    """A text that fits into a message."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf, as settings are named to people; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def pretty_json(content: Any) -> bytes:
    """JSON as it stands in files that people may read."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def duration(seconds: float | None) -> str:
    """A time span in two units at most: 8.2s, 3m02s, 1h04m, 2d03h; "-" for none, NaN and what lies in the past."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "-"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(min(seconds, 1e9))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
