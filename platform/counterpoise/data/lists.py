"""Lists of raw downloads: their lines with file and number, the names in them, and rows that occur twice.

What a list says is not trusted: a name that leaves the raw folder is an error, not a path.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.card import CARD, load_card
from counterpoise.data.raw import DUPLICATE, Left, Media, Raw, RawRow, Sound, Video
from counterpoise.wording import did_you_mean

PICTURES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv")
OVERLAP = "in a later split too"  # why a row is left, beside the words of data/raw.py

_VIDEO_ID = r"[A-Za-z0-9_-]{11}"
_CLIP = re.compile(rf"({_VIDEO_ID})_([0-9]{{1,6}})(?:_[0-9]{{1,6}})?")

Clip = tuple[str, int]  # YouTube id, start in seconds


@dataclass(frozen=True)
class Line:
    """One line of a list (number from 1), without its line end."""

    text: str
    file: str
    number: int

    def __str__(self) -> str:
        return f"{storage.show(self.file)}:{self.number}"

    def wrong(self, reason: str) -> DataError:
        return DataError(f"{self}: {reason}; the line is {self.text!r:.200}")


def lines(raw: Raw, path: str) -> list[Line]:
    """Lines that are not blank. Only LF and CRLF end one: tweets contain U+0085, U+2028 and the like."""
    parts = raw.text(path).split("\n")
    found = [Line(text.removesuffix("\r"), path, number) for number, text in enumerate(parts, 1) if text.strip()]
    if not found:
        raise DataError(f"{storage.show(path)} is empty; the recipe's README says where lists come from")
    return found


def comma_fields(line: Line) -> list[str]:
    """The fields between commas, less blanks around them; those with commas of their own are in double quotes."""
    try:
        return [field.strip() for field in next(csv.reader([line.text], skipinitialspace=True, strict=True))]
    except csv.Error as error:
        raise line.wrong(f"not fields between commas ({error})") from None


def below(folder: str, name: str, line: Line) -> str:
    """`name`, as `line` has it, inside `folder`: a path below the raw folder."""
    path = PurePosixPath(name)
    if not name.strip() or path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\\0"):
        raise line.wrong(f"the name {name!r} is not one below the raw folder (no leading /, no .., no \\)")
    return str(PurePosixPath(folder) / path)


def whole_number(text: str, meaning: str, line: Line) -> int:
    if not (text.isascii() and text.isdigit()):
        raise line.wrong(f"{meaning} is {text!r}; it should be a whole number")
    return int(text)


def known_class(name: str, classes: Sequence[str], line: Line) -> str:
    if name not in classes:
        shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
        raise line.wrong(f"unknown class {name!r}{did_you_mean(name, classes)}; classes of the card: {shown}")
    return name


def card_classes(recipe: str) -> tuple[str, ...]:
    """Classes of the card beside a recipe, in label order. recipe: its `__file__`."""
    return load_card(str(Path(recipe).with_name(CARD))).class_names


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """The value of an option that names one of a few ways."""
    if value not in allowed:
        raise ConfigError(f"option {option} is {value!r}{did_you_mean(value, allowed)}; give {' or '.join(allowed)}")
    return value


def check_reading(*, rate: int | None = None, per_second: float | None = None, least: int | None = None) -> None:
    """Raise if an option says something impossible: samples per second, frames per second, frames of a clip."""
    if rate is not None and rate < 1:
        raise ConfigError(f"option rate is {rate}; give samples per second, such as 22050")
    if per_second is not None and not per_second > 0:
        raise ConfigError(f"option per_second is {per_second}; give more than 0")
    if least is not None and least < 1:
        raise ConfigError(f"option least is {least}; give 1 or more")


def files_in(raw: Raw, folder: str, endings: Iterable[str] = PICTURES) -> dict[str, list[str]]:
    """Sorted paths of the files in every folder at or below `folder`, by the folder that holds them."""
    start = "" if PurePosixPath(folder) == PurePosixPath(".") else f"{PurePosixPath(folder)}/"
    endings = tuple(endings)
    found: dict[str, list[str]] = {}
    for path in raw.files:
        if path.startswith(start) and path.lower().endswith(endings):
            found.setdefault(path.rpartition("/")[0], []).append(path)
    return {name: sorted(paths) for name, paths in found.items()}


def clip_named(name: str) -> Clip | None:
    """What `<YouTube id>_<start>` or `<YouTube id>_<start>_<end>` names, with zeros before the numbers or without.

    An id has 11 characters, `-` and `_` among them, so it is told by its length.
    """
    match = _CLIP.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def video_id(text: str, line: Line) -> str:
    if not re.fullmatch(_VIDEO_ID, text):
        raise line.wrong(f"video id {text!r}; a YouTube id has 11 letters, digits, - and _")
    return text


def clip_at(video: str, start: str, line: Line) -> Clip:
    """The clip of a YouTube id and a start that stand in fields of their own."""
    return video_id(video, line), whole_number(start, "the start", line)


@dataclass(frozen=True)
class ListedClip:
    """A row of a list of clips. place: for messages. number: line or entry, from 1."""

    clip: Clip
    label: str
    place: str
    number: int


def clips_in(raw: Raw, folder: str) -> tuple[dict[Clip, str], list[str]]:
    """Paths of the video files at or below `folder` whose names say which clip they are, and what to know of them.

    Of several files of one clip the largest is taken: pages, pointers and stumps of downloads are small.
    """
    found: dict[Clip, list[str]] = {}
    for paths in files_in(raw, folder or ".", VIDEOS).values():
        for path in paths:
            if clip := clip_named(PurePosixPath(path).stem):
                found.setdefault(clip, []).append(path)
    again = sum(len(paths) > 1 for paths in found.values())
    notes = [f"Clips with several video files: {again}; the largest of each is read."] if again else []
    return {clip: min(paths, key=lambda path: (-raw.files[path], path)) for clip, paths in found.items()}, notes


def clip_rows(
    raw: Raw,
    splits: Mapping[str, Iterable[ListedClip]],
    videos: str,
    usual_name: Callable[[str, int], str],
    *,
    seconds: float,
    rate: int,
    per_second: float,
    least: int,
    size: int,
    silent: str,
) -> tuple[list[RawRow], list[Left], list[str]]:
    """Rows with the sound and the frames of listed clips, those that a split lists again, and notes.

    videos: folder at or below which the clips are. usual_name: the file of (id, start) where none is there, for the
    ledger. The others as in `Sound` and `Video`; size 0 keeps the frames as they are. silent: `drop` rows of clips
    without sound, or `keep` them with silence.
    """
    one_of("silent", silent, ("drop", "keep"))
    there, notes = clips_in(raw, videos)
    folder = f"{videos.rstrip('/')}/" if videos else ""
    rows: list[RawRow] = []
    left: list[Left] = []
    for split, listed in splits.items():
        seen: dict[Clip, ListedClip] = {}
        for one in listed:
            video, start = one.clip
            name = f"{video}_{start:06}"
            first = seen.setdefault(one.clip, one)
            if first is not one:
                detail = f"clip {name} is {first.label} in {first.place}, and {one.label} here"
                left.append(Left(f"{name}@{split}:{one.number}", split, DUPLICATE, detail))
                continue
            file = there.get(one.clip, folder + usual_name(video, start))
            media: dict[str, Media] = {
                "audio": Sound(file, rate, seconds=seconds, silence=silent == "keep"),
                "frames": Video(file, per_second=per_second, seconds=seconds, least=least, size=size or None),
            }
            rows.append(RawRow(name, split, one.label, media, {"video_id": video, "start_s": start}))
    return rows, left, notes


def part_overlap(rows: Iterable[RawRow], column: str) -> tuple[list[RawRow], list[Left], list[str]]:
    """Rows without those of train and valid that share `column` with a later split, those rows, and a note each.

    A value in valid and test leaves valid; one in train and in valid or test leaves train.
    """
    rows = list(rows)
    values = {
        split: {row.columns[column] for row in rows if row.split == split} for split in ("train", "valid", "test")
    }
    later = {"train": {"valid": values["valid"], "test": values["test"]}, "valid": {"test": values["test"]}, "test": {}}
    kept, left = [], []
    for row in rows:
        shared = [split for split, others in later[row.split].items() if row.columns[column] in others]
        if shared:
            detail = f"{column} {row.columns[column]} is in {' and '.join(shared)}"
            left.append(Left(row.sample_id, row.split, OVERLAP, detail))
        else:
            kept.append(row)
    notes = []
    for split, others in later.items():
        for other, there in others.items():
            if count := len(values[split] & there):
                notes.append(f"Values of {column} that are in {split} and in {other}: {count}.")
    return kept, left, notes
