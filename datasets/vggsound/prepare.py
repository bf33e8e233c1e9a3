"""VGGSound, sound and pictures of what makes it: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from counterpoise.data.lists import (
    VIDEOS,
    ListedClip,
    card_classes,
    check_reading,
    clip_at,
    clip_named,
    clip_rows,
    comma_fields,
    known_class,
    lines,
    one_of,
    part_overlap,
)
from counterpoise.data.raw import Listing, Raw

# rows of test.csv, and of all 199176 that stat.csv counts those that are not in it
EXPECTED = {"train": 183730, "test": 15446}
SECONDS = 10.0  # of a clip


def listing(
    raw: Raw,
    *,
    lists: str = "vggsound.csv",
    train: str = "",
    test: str = "",
    videos: str = "",
    overlap: str = "keep",
    rate: int = 35400,
    per_second: float = 1.0,
    least: int = 4,
    size: int = 384,
    silent: str = "drop",
) -> Listing:
    """lists: the list with a column of splits. train, test: lists of one split, which take the place of its rows.

    All of them below the raw folder, absolute or s3://. videos: folder at or below which the clips are. overlap:
    `keep` or `drop` rows of train whose video is in test. rate: of the sound in Hz. per_second: frames of every second.
    least: clips with fewer frames are dropped. size: shorter side of the frames in pixels at most, 0 keeps it.
    silent: `drop` clips without sound, or `keep` them with silence.
    """
    one_of("overlap", overlap, ("keep", "drop"))
    check_reading(rate=rate, per_second=per_second, least=least)
    classes = card_classes(__file__)
    both = {} if train and test else _by_split(raw, lists, classes)
    splits = {
        split: _of_one_split(raw, path, classes) if path else both[split]
        for split, path in {"train": train, "test": test}.items()
    }
    rows, left, notes = clip_rows(
        raw,
        splits,
        videos,
        lambda video, start: f"{video}_{start:06}.mp4",
        seconds=SECONDS,
        rate=rate,
        per_second=per_second,
        least=least,
        size=size,
        silent=silent,
    )
    clear, shared, more = part_overlap(rows, "video_id")
    if overlap == "drop":
        rows, left = clear, left + shared
    return Listing(rows, left, EXPECTED, notes + more, rows_per_part=128)


def _by_split(raw: Raw, path: str, classes: tuple[str, ...]) -> dict[str, list[ListedClip]]:
    """Rows of `YouTube id,start,label,split`."""
    found: dict[str, list[ListedClip]] = {"train": [], "test": []}
    for line in lines(raw, path):
        fields = comma_fields(line)
        if len(fields) != 4:
            raise line.wrong(f"{len(fields)} fields between commas; there should be id, start, label and split")
        video, start, label, split = fields
        clip = clip_at(video, start, line)
        if split not in found:
            raise line.wrong(f"the split is {split!r}; it should be train or test")
        found[split].append(ListedClip(clip, known_class(label, classes, line), str(line), line.number))
    return found


def _of_one_split(raw: Raw, path: str, classes: tuple[str, ...]) -> Iterator[ListedClip]:
    """Rows of `<id>_<start>.mp4,label`, with or without the ending, with or without zeros before the start."""
    for line in lines(raw, path):
        fields = comma_fields(line)
        if len(fields) != 2:
            raise line.wrong(f"{len(fields)} fields between commas; there should be a clip and a label")
        file, label = fields
        ending = PurePosixPath(file).suffix
        clip = clip_named(file.removesuffix(ending) if ending in VIDEOS else file)
        if clip is None:
            raise line.wrong(f"{file!r} is not a clip such as 6jiO0tPLK7U_000090.mp4")
        yield ListedClip(clip, known_class(label, classes, line), str(line), line.number)
