"""Corpora that this distribution can prepare: the folders of `datasets/`, each with a card and a prepare.py."""

from __future__ import annotations

from pathlib import Path

import counterpoise
from counterpoise.data.card import CARD


def recipes_root() -> Path:
    """The `datasets/` folder of a checkout, or its copy inside an installed package."""
    package = Path(counterpoise.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "datasets"


def recipe_names() -> list[str]:
    root = recipes_root()
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if (p / CARD).is_file() and (p / "prepare.py").is_file())
