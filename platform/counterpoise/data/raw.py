"""Raw downloads before they are shards: what a recipe lists, and what is to be read of every row.

A recipe (`datasets/<name>/prepare.py`) has a function

    listing(raw: Raw, **options) -> Listing

that reads lists and names only, never media, and says for every row of the corpus where its media lie and what to
take of them. Reading, limits, shards, ledger and restart are the same for all corpora and not the recipe's business.
Everything here is plain data that can travel to another process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError

# Why a row is not in the shards: the words of the ledger. Details follow in a field of their own.
MISSING = "missing file"
LFS_POINTER = "git-LFS pointer"
ZERO_BYTES = "zero bytes"
HTML = "HTML page"
UNDECODABLE = "undecodable"
CUT_SHORT = "cut short"
TOO_SHORT = "too short"
TOO_LARGE = "too large"
NO_STREAM = "no such stream"
TIMED_OUT = "timed out"
CRASHED = "decoder crashed"
DUPLICATE = "duplicate"
NOT_IN_SPLIT = "not in split"
BAD_PATH = "path outside the raw folder"

# Of a field that came later: what a part is known by says nothing of it while it has its default.
LATER = {"later": True}


@dataclass(frozen=True)
class Sound:
    """The sound of a wav, flac, mp3 or video file, as mono FLAC.

    path: below the raw folder. start_s, seconds: the part to take; None takes all that follows. rate: Hz. silence: a
    file that has frames but no sound gives `seconds` of silence, and a remark in the ledger.
    """

    path: str
    rate: int
    start_s: float = 0.0
    seconds: float | None = None
    silence: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class Video:
    """Frames of a video file, as JPEG pictures in order.

    Either `per_second` frames of every second between start_s and start_s + seconds, or those numbered first_frame to
    end_frame (exclusive), counted from the file's beginning without seeking. least, most: fewer drop the row, more
    are cut. size: (height, width), or an int for the shorter side; None keeps it. channels: 3 RGB, 1 grey.
    """

    path: str
    per_second: float | None = None
    start_s: float = 0.0
    seconds: float | None = None
    first_frame: int | None = None
    end_frame: int | None = None
    least: int = 1
    most: int = 600
    size: tuple[int, int] | int | None = None
    channels: int = 3


@dataclass(frozen=True)
class Pictures:
    """Picture files in the order given. size, channels as in `Video`. one: the column holds one picture, not a list."""

    paths: tuple[str, ...]
    size: tuple[int, int] | int | None = None
    channels: int = 3
    one: bool = False


@dataclass(frozen=True)
class Flow:
    """Optical flow as a list of pictures whose first two channels are u and v, 128 for none, `bound` pixels at 1, 255.

    Stored: paths of the u and of the v pictures, frame by frame. Otherwise computed: what `video` chooses are the
    frames that get a field, each of the movement to the next frame of the file, u to the right and v down.
    """

    u: tuple[str, ...] = ()
    v: tuple[str, ...] = ()
    video: Video | None = None
    bound: float = 20.0
    size: tuple[int, int] | int | None = None


Media = Sound | Video | Pictures | Flow


@dataclass(frozen=True)
class RawRow:
    """One row to be: media by column name, and columns that are known already (text, speaker, ...)."""

    sample_id: str
    split: str  # train | valid | test
    label: str | int
    media: Mapping[str, Media]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Left:
    """A row of the lists that is left out before its media are looked at, e.g. a duplicate."""

    sample_id: str
    split: str
    reason: str  # one of the words above, where one fits
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """All rows of a corpus in a fixed order. expected: rows that the published lists hold, by split.

    notes: what the user should know, in whole sentences. rows_per_part: rows of a shard; fewer where rows are large.
    """

    rows: Sequence[RawRow]
    left: Sequence[Left] = ()
    expected: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rows_per_part: int = 256


@dataclass(frozen=True)
class Raw:
    """The raw folder (local or s3://) and every file in it, by path relative to it, with its size in bytes."""

    uri: str
    files: Mapping[str, int]

    def text(self, path: str, encoding: str = "utf-8-sig") -> str:
        """A list file as text, with or without a byte order mark. path: below the raw folder, absolute or s3://."""
        place = path if "://" in path or path.startswith("/") else storage.join(self.uri, path)
        try:
            return storage.read_bytes(place).decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(f"{storage.show(place)} is not {encoding} text: {error}") from None


def open_raw(uri: str) -> Raw:
    """The raw folder with all its files, less hidden ones (.git, .DS_Store); linked folders are followed."""
    if storage.is_local(uri):
        top = storage.local_path(uri)
        if not os.path.isdir(top):
            raise ConfigError(f"--raw {storage.show(uri)}: no such folder; give the one that holds the download")
        files = dict(sorted(_walk(top, "", frozenset())))
        uri = top
    else:
        found = storage.list_files(uri)
        files = {n: b for n, b in found.items() if not any(part.startswith(".") for part in n.split("/"))}
    if not files:
        raise ConfigError(f"--raw {storage.show(uri)} holds no files; give the folder that holds the download")
    return Raw(uri.rstrip("/"), files)


def _walk(top: str, below: str, above: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(path relative to top, bytes) of all files; a link to a folder that it lies in is not followed."""
    real = os.path.realpath(os.path.join(top, below))
    if real in above:
        return
    for entry in os.scandir(real):
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(top, path, above | {real})
        elif entry.is_file():
            yield path, entry.stat().st_size
