"""Kinetics-Sounds, actions that are heard: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.lists import (
    Line,
    ListedClip,
    card_classes,
    check_reading,
    clip_at,
    clip_named,
    clip_rows,
    comma_fields,
    lines,
    part_overlap,
    whole_number,
)
from counterpoise.data.raw import Listing, Raw
from counterpoise.wording import did_you_mean

# rows of OGM-GE's lists, and of the subsets of BML's database
OGM = {"train": 14799, "test": 2597}
BML = {"train": 14799, "valid": 1320, "test": 2597}
SUBSETS = {"training": "train", "validation": "valid", "testing": "test"}
SECONDS = 10  # of a clip


def listing(
    raw: Raw,
    *,
    train: str = "my_train.txt",
    valid: str = "",
    test: str = "my_test.txt",
    database: str = "",
    videos: str = "",
    rate: int = 35400,
    per_second: float = 1.0,
    least: int = 4,
    size: int = 256,
    silent: str = "drop",
) -> Listing:
    """train, valid, test: lists of one split each. database: one JSON file with all splits, instead of them.

    All of them below the raw folder, absolute or s3://. videos: folder at or below which the clips are. rate: of the
    sound in Hz. per_second: frames of every second. least: clips with fewer frames are dropped. size: shorter side of
    the frames in pixels at most, 0 keeps it. silent: `drop` clips without sound, or `keep` them with silence.
    """
    check_reading(rate=rate, per_second=per_second, least=least)
    if database and (valid or (train, test) != ("my_train.txt", "my_test.txt")):
        raise ConfigError(f"option database is {database!r}; give it alone, or lists for train, valid and test")
    if not database and not (train and test):
        raise ConfigError(f"option train is {train!r} and test {test!r}; give a list for each, or a database")
    classes = card_classes(__file__)
    splits: dict[str, list[ListedClip]] = {}
    notes: list[str] = []
    if database:
        splits = _database(raw, database, classes)
        expected = BML
    else:
        published = True
        for split, path in {"train": train, "valid": valid, "test": test}.items():
            if path:
                splits[split], kinetics, more = _list(raw, path, classes)
                notes += more
                published = published and not kinetics
        expected = OGM if published and not valid else {}
    rows, left, more = clip_rows(
        raw,
        splits,
        videos,
        lambda video, start: f"{video}_{start:06}_{start + SECONDS:06}.mp4",
        seconds=float(SECONDS),
        rate=rate,
        per_second=per_second,
        least=least,
        size=size,
        silent=silent,
    )
    notes += more
    _, _, more = part_overlap(rows, "video_id")
    return Listing(rows, left, expected, notes + more, rows_per_part=128)


def _database(raw: Raw, path: str, classes: tuple[str, ...]) -> dict[str, list[ListedClip]]:
    """Entries of `{"labels": [...], "database": {clip: {"subset": ..., "label": ...}}}`, by split."""
    where = storage.show(path)
    text = raw.text(path)
    try:
        entries = json.loads(text, object_pairs_hook=_once)["database"]
        items = [(key, entry["subset"], entry["label"]) for key, entry in entries.items()]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not a database of clips ({type(error).__name__}: {error}); there should be an object "
            '{"database": {clip: {"subset": "training", "label": "bowling"}}}'
        ) from None
    found: dict[str, list[ListedClip]] = {split: [] for split in SUBSETS.values()}
    for number, (key, subset, label) in enumerate(items, 1):
        clip = clip_named(key)
        if clip is None:
            raise DataError(f"{where}: entry {key!r:.80} is not a clip such as -3Mwkq-7TV4_2 or id_000058_000068")
        if not isinstance(subset, str) or subset not in SUBSETS:
            raise DataError(f"{where}: entry {key}: subset is {subset!r:.80}; it should be {', '.join(SUBSETS)}")
        if label not in classes:
            raise DataError(
                f"{where}: entry {key}: unknown class {label!r:.80}{did_you_mean(str(label), classes)}; "
                f"classes of the card: {', '.join(classes)}"
            )
        found[SUBSETS[subset]].append(ListedClip(clip, label, f"{where}, entry {number}", number))
    for subset in ("training", "testing"):
        if not found[SUBSETS[subset]]:
            raise DataError(f"{where} has no clip of subset {subset}; give KS_train_val.json, which has all three")
    return found


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


def _list(raw: Raw, path: str, classes: tuple[str, ...]) -> tuple[list[ListedClip], bool, list[str]]:
    """Rows, whether they are a list of Kinetics itself, and notes.

    Without a line of names: `clip,seconds,number of the class`. With one, which has youtube_id and label: a list of
    Kinetics, of which clips of other classes are passed over.
    """
    content = lines(raw, path)
    header = comma_fields(content[0])
    if "youtube_id" not in header:
        return [_of_ogm(line, classes) for line in content], False, []
    found = list(_of_kinetics(content, header, classes))
    if not found:
        raise content[0].wrong(f"the list has no clip of the classes {', '.join(classes[:5])}, ...")
    others = len(content) - 1 - len(found)
    return found, True, [f"Clips of other classes in {storage.show(path)}: {others}."] if others else []


def _of_ogm(line: Line, classes: tuple[str, ...]) -> ListedClip:
    fields = comma_fields(line)
    if len(fields) != 3:
        raise line.wrong(f"{len(fields)} fields between commas; there should be clip, seconds and number of the class")
    clip = clip_named(fields[0])
    if clip is None:
        raise line.wrong(f"{fields[0]!r} is not a clip such as -3Mwkq-7TV4_2 or --4-0ihtnBU_000058_000068")
    whole_number(fields[1], "the seconds", line)
    number = whole_number(fields[2], "the number of the class", line)
    if number >= len(classes):
        raise line.wrong(f"the number of the class is {number}; it should be 0 to {len(classes) - 1}")
    return ListedClip(clip, classes[number], str(line), line.number)


def _of_kinetics(content: list[Line], header: list[str], classes: tuple[str, ...]) -> Iterator[ListedClip]:
    for column in ("label", "time_start"):
        if column not in header:
            raise content[0].wrong(f"there is no column {column}")
    for line in content[1:]:
        fields = comma_fields(line)
        if len(fields) != len(header):
            raise line.wrong(f"{len(fields)} fields between commas; the line of names has {len(header)}")
        row = dict(zip(header, fields, strict=True))
        label = row["label"].replace(" ", "_")
        if label not in classes:
            continue
        clip = clip_at(row["youtube_id"], row["time_start"], line)
        yield ListedClip(clip, label, str(line), line.number)
