"""Raw folders with lists in them, and the recipes that read those."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from counterpoise.data.card import Card, load_card
from counterpoise.data.raw import Listing, Raw
from counterpoise.data.recipes import recipes_root


def recipe(name: str) -> Any:
    """The module `prepare.py` of a corpus."""
    spec = importlib.util.spec_from_file_location(f"listed_{name}", recipes_root() / name / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def card(name: str) -> Card:
    return load_card(str(recipes_root() / name / "corpus.yaml"))


def make_raw(folder: Path, texts: dict[str, str | bytes], media: tuple[str, ...] = ()) -> Raw:
    """A raw folder with these lists, and media that are listed with their sizes but that no recipe may open."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Raw(str(folder), {**{name: len(text) for name, text in texts.items()}, **dict.fromkeys(media, 1000)})


def by_split(listing: Listing) -> dict[str, list[str]]:
    """Sample ids of the kept rows."""
    return {s: [r.sample_id for r in listing.rows if r.split == s] for s in ("train", "valid", "test")}


def reasons(listing: Listing) -> dict[str, tuple[str, str, str]]:
    """Split, reason and detail of the rows left out."""
    return {row.sample_id: (row.split, row.reason, row.detail) for row in listing.left}


def check_sound(listing: Listing, of: Card) -> None:
    """What holds for every listing: ids unique in a split, labels known, columns and media as the card reads them."""
    assert not [i for i, n in Counter((r.split, r.sample_id) for r in [*listing.rows, *listing.left]).items() if n > 1]
    for row in listing.rows:
        assert row.label in of.class_names, row
        assert row.split in of.splits, row
        there = {"sample_id", "label", *row.media, *row.columns}
        assert len(there) == 2 + len(row.media) + len(row.columns), "a name is used twice"
        for modality in of.modalities.values():
            assert modality.column in there, row
        for split in of.splits.values():
            if split.carve and split.carve.group:
                assert split.carve.group in row.columns, row
