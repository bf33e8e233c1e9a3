"""Raw downloads before they are shards: what a recipe lists, and what is to be read of every row.

A recipe (`datasets/<name>/prepare.py`) has a function

    listing(raw: Raw, **options) -> Listing

that reads lists and names only, never media, and says for every row of the corpus where its media lie and what to
take of them. Reading, limits, shards, ledger and restart are the same for all corpora and not the recipe's business.
Everything here is plain data that can travel to another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from counterpoise import storage
from counterpoise.contracts import DataError


@dataclass(frozen=True)
class Sound:
    """The sound of a wav, flac, mp3 or video file, as mono FLAC.

    path: below the raw folder. start_s, seconds: the part to take; None takes all that follows. rate: Hz.
    """

    path: str
    rate: int
    start_s: float = 0.0
    seconds: float | None = None


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
    """Optical flow as a list of pictures whose first two channels are u and v, 128 for none, `bound` pixels at 0, 255.

    Stored: paths of the u and of the v pictures, frame by frame. Otherwise computed from consecutive frames of
    `video` at its frame rate.
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
    reason: str


@dataclass(frozen=True)
class Listing:
    """All rows of a corpus in a fixed order. expected: rows that the published lists hold, by split."""

    rows: Sequence[RawRow]
    left: Sequence[Left] = ()
    expected: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()


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
        except FileNotFoundError:
            raise DataError(
                f"{storage.show(place)} is not there; the recipe's README says where lists come from"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{storage.show(place)} is not {encoding} text: {error}") from None
