"""Corpora that this distribution can prepare: the folders of `datasets/`, each with a card and a prepare.py."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import counterpoise
from counterpoise import storage
from counterpoise.contracts import ConfigError
from counterpoise.data.card import CARD, Card, corpora_home, load_card, parse_card
from counterpoise.wording import did_you_mean

if TYPE_CHECKING:
    from counterpoise.data.ingest import RunParts

# how much is done, of how much, and of what
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """A corpus that can be prepared, and whether it is, at its usual place."""

    name: str
    card: Card
    folder: Path
    prepared: bool


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


def recipes() -> list[Recipe]:
    """Every corpus that can be prepared, by name."""
    root = recipes_root()
    return [
        Recipe(
            name,
            load_card(str(root / name / CARD)),
            root / name,
            storage.exists(storage.join(corpora_home(), name, CARD)),
        )
        for name in recipe_names()
    ]


def card_of(place: str) -> Card:
    """The card of a prepared corpus, of one that can be prepared, or at a path or URI.

    One that was prepared before cards named the weak modality has it from its recipe.
    """
    names = recipe_names()
    prepared = storage.exists(storage.join(corpora_home(), place, CARD))
    card = load_card(str(recipes_root() / place / CARD) if place in names and not prepared else place)
    if card.weak is None and card.name in names:
        weak = load_card(str(recipes_root() / card.name / CARD)).weak
        return card.model_copy(update={"weak": weak if weak in card.modalities else None})
    return card


def _module(name: str) -> Any:
    names = recipe_names()
    if name not in names:
        raise ConfigError(
            f"no corpus is called '{name}'{did_you_mean(name, names)}; corpora that can be prepared: "
            f"{', '.join(names) or 'none'}"
        )
    place = recipes_root() / name / "prepare.py"
    key = f"counterpoise_recipe_{name}"
    spec = importlib.util.spec_from_file_location(key, place)
    assert spec is not None and spec.loader is not None, place
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    spec.loader.exec_module(module)
    return module


def recipe_options(name: str) -> dict[str, Any]:
    """The options of a recipe with their defaults."""
    module = _module(name)
    function = getattr(module, "listing", None) or module.prepare
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("out", "progress", "raw")}


def needs_raw(name: str) -> bool:
    """Whether a corpus is made from the original download."""
    return hasattr(_module(name), "listing")


def prepare(
    name: str,
    out: str | None = None,
    progress: Progress | None = None,
    *,
    raw: str | None = None,
    workers: int = 1,
    again: bool = False,
    run_parts: RunParts | None = None,
    stop: Callable[[], str | None] | None = None,
    **options: Any,
) -> str:
    """Make the shards and the card of a corpus; returns the folder (path or s3:// URI).

    Nothing is done if `out` already holds the corpus made with the same options. A corpus that is made on the spot
    appears whole or not at all: its folder is made beside its place and renamed (local), or its card is put last
    (s3://). One that is made from a download (raw: its folder) grows in `out` part by part and gets its card last;
    a stopped preparation goes on where it was.

    workers: processes that read the download. again: look at a finished corpus's download once more and make the
    parts whose files have changed. run_parts: who makes the parts; by default this process. stop: asked for a reason
    to stop.
    """
    from counterpoise.data.shards import MANIFEST, read_manifest, write_manifest

    module = _module(name)
    defaults = recipe_options(name)
    for key in options:
        if key not in defaults:
            raise ConfigError(
                f"corpus {name} has no option '{key}'{did_you_mean(key, defaults)}; options: {', '.join(defaults)}"
            )
        default = defaults[key]
        if isinstance(default, int | str) and (type(options[key]) is not type(default)):
            kind = "text" if isinstance(default, str) else f"an {type(default).__name__}"
            raise ConfigError(f"option {key} of corpus {name} is {options[key]!r}; give {kind}")
    chosen = {**defaults, **options}
    chosen = {k: os.path.abspath(v) if k.endswith("_dir") and v else v for k, v in chosen.items()}
    target = out or storage.join(corpora_home(), name)
    if raw is not None and not needs_raw(name):
        raise ConfigError(f"corpus {name} is made without a download; leave --raw out")
    if raw is not None and storage.is_local(raw):
        raw = storage.local_path(raw).rstrip("/")
    if storage.exists(storage.join(target, CARD)):
        manifest = read_manifest(target)
        same = manifest is not None and manifest.get("name") == name and manifest.get("options") == chosen
        if same and raw is not None:
            same = manifest is not None and manifest.get("raw") == storage.show(raw.rstrip("/"))
        if not same:
            raise ConfigError(
                f"{target} already holds a corpus made in another way "
                f"({_options(manifest)}); remove it, or give another folder"
            )
        if not again:
            if progress:
                progress(1, 1, f"already prepared in {target}")
            return target
    if needs_raw(name):
        if raw is None:
            raise ConfigError(
                f"corpus {name} is made from its original download: give its folder with --raw DIR or "
                f"--raw s3://bucket/prefix; {recipes_root() / name / 'README.md'} says where to get it"
            )
        _prepare_from_raw(
            name, module, raw, target, chosen, workers=workers, run_parts=run_parts, progress=progress, stop=stop
        )
        return target
    if again:
        raise ConfigError(f"corpus {name} is made without a download, so there is nothing to look at again")
    if storage.is_local(target):
        place = Path(target.removeprefix("file://")).absolute()
        if place.exists() and any(place.iterdir()):
            raise ConfigError(f"{target} is not empty and holds no {CARD}; remove it, or give another folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        work = place.with_name(f".{place.name}.tmp-{uuid.uuid4().hex[:8]}")
    else:
        place = None
        work = Path(tempfile.mkdtemp(prefix="counterpoise-")) / name
    work.mkdir()
    try:
        shards = module.prepare(str(work), progress=progress, **chosen)
        write_manifest(str(work), shards, name=name, options=chosen)
        if place is not None:
            if (place / CARD).is_file():  # another process was faster
                return target
            work.rename(place)  # an empty folder gives way
            return target
        names = sorted(p.name for p in work.iterdir() if p.name not in (MANIFEST, CARD))
        for number, file in enumerate([*names, MANIFEST, CARD]):
            storage.write_bytes(storage.join(target, file), (work / file).read_bytes())
            if progress:
                progress(number + 1, len(names) + 2, f"sent {file}")
        return target
    finally:
        shutil.rmtree(work if place is not None else work.parent, ignore_errors=True)


def _prepare_from_raw(
    name: str,
    module: Any,
    raw: str,
    target: str,
    options: dict[str, Any],
    *,
    run_parts: RunParts | None,
    **how: Any,
) -> None:
    import yaml

    from counterpoise.data.ingest import local_parts, prepare_raw
    from counterpoise.data.raw import open_raw

    place = recipes_root() / name / CARD
    content = yaml.safe_load(place.read_text(encoding="utf-8"))
    source = open_raw(raw)
    listing = module.listing(source, **options)
    if hasattr(module, "adapt_card"):  # a card that depends on options
        content = module.adapt_card(content, **options)
    card = parse_card(yaml.safe_dump(content).encode(), str(place))
    if storage.is_local(target):
        target = storage.local_path(target)  # other processes may have another working folder
    prepare_raw(
        name, listing, source, card, content, target, options=options, run_parts=run_parts or local_parts, **how
    )


def _options(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return "it has no manifest"
    return ", ".join(f"{k} {v}" for k, v in (manifest.get("options") or {}).items())
