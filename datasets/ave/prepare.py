"""AVE, sound and pictures of events: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

from dataclasses import dataclass

from counterpoise.data.lists import (
    Line,
    card_classes,
    check_reading,
    known_class,
    lines,
    one_of,
    part_overlap,
    video_id,
    whole_number,
)
from counterpoise.data.raw import DUPLICATE, TOO_SHORT, Left, Listing, Media, Raw, RawRow, Sound, Video

EXPECTED = {"train": 3339, "valid": 402, "test": 402}  # rows of the published lists
SECONDS = 10  # of a clip
HEADER = "Category&"


@dataclass(frozen=True)
class _Event:
    line: Line
    label: str
    video: str
    start: int
    end: int


def listing(
    raw: Raw,
    *,
    train: str = "trainSet.txt",
    valid: str = "valSet.txt",
    test: str = "testSet.txt",
    videos: str = "AVE",
    span: str = "event",
    repeats: str = "first",
    overlap: str = "keep",
    rate: int = 22050,
    per_second: float = 1.0,
    size: int = 256,
) -> Listing:
    """train, valid, test: lists, below the raw folder, absolute or s3://. videos: folder of the clips.

    span: the seconds of the `event`, or the whole `clip`. repeats: which of the events of one video in one split:
    `first`, `last` or `all`. overlap: `keep` or `drop` rows of train and valid whose video is in a later split.
    rate: of the sound in Hz. per_second: frames of every second. size: shorter side in pixels at most, 0 keeps it.
    """
    one_of("span", span, ("event", "clip"))
    one_of("repeats", repeats, ("first", "last", "all"))
    one_of("overlap", overlap, ("keep", "drop"))
    check_reading(rate=rate, per_second=per_second)
    classes = card_classes(__file__)
    rows: list[RawRow] = []
    left: list[Left] = []
    for split, path in {"train": train, "valid": valid, "test": test}.items():
        events: dict[str, list[_Event]] = {}
        order = []
        for event in _events(raw, path, classes):
            if span == "event" and event.end == event.start:
                detail = f"{event.line}: the event begins and ends at {event.start} s"
                left.append(Left(event.video, split, TOO_SHORT, detail))
                continue
            events.setdefault(event.video, []).append(event)
            order.append(event)
        for event in order:
            same = events[event.video]
            number = same.index(event) + 1
            taken = same[0] if repeats == "first" else same[-1] if repeats == "last" else event
            if event is not taken:
                detail = f"video {event.video} is taken as {taken.label} from {taken.line}, not as {event.label}"
                left.append(Left(f"{event.video}@{split}:{event.line.number}", split, DUPLICATE, detail))
                continue
            sample_id = f"{event.video}#{number}" if repeats == "all" and number > 1 else event.video
            rows.append(_row(event, sample_id, split, videos, span, rate, per_second, size))
    clear, shared, notes = part_overlap(rows, "video_id")
    if overlap == "drop":
        rows, left = clear, left + shared
    return Listing(rows, left, EXPECTED, notes, rows_per_part=128)


def _row(
    event: _Event, sample_id: str, split: str, videos: str, span: str, rate: int, per_second: float, size: int
) -> RawRow:
    path = f"{videos.rstrip('/')}/{event.video}.mp4"
    start, end = (event.start, event.end) if span == "event" else (0, SECONDS)
    media: dict[str, Media] = {
        "audio": Sound(path, rate, float(start), float(end - start)),
        "frames": Video(
            path, per_second=per_second, start_s=float(start), seconds=float(end - start), size=size or None
        ),
    }
    columns = {"video_id": event.video, "start_s": event.start, "end_s": event.end}
    return RawRow(sample_id, split, event.label, media, columns)


def _events(raw: Raw, path: str, classes: tuple[str, ...]) -> list[_Event]:
    """Rows of `Category&VideoID&Quality&StartTime&EndTime`, with or without that line at the top."""
    found = []
    for place, line in enumerate(lines(raw, path)):
        if place == 0 and line.text.startswith(HEADER):
            continue
        fields = [field.strip() for field in line.text.split("&")]
        if len(fields) != 5:
            raise line.wrong(f"{len(fields)} fields between &; there should be 5")
        label, video, _, begin, finish = fields
        known_class(label, classes, line)
        video_id(video, line)
        start, end = whole_number(begin, "the start", line), whole_number(finish, "the end", line)
        if not start <= end <= SECONDS:
            raise line.wrong(f"the event is from {start} to {end}; it should lie within 0 and {SECONDS} s")
        found.append(_Event(line, label, video, start, end))
    return found
