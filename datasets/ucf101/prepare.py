"""UCF101, pictures and optical flow: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from counterpoise.contracts import ConfigError
from counterpoise.data.lists import Line, card_classes, files_in, known_class, lines, one_of, part_overlap, whole_number
from counterpoise.data.raw import DUPLICATE, MISSING, Flow, Left, Listing, Media, Pictures, Raw, RawRow, Video

# rows of the published lists
EXPECTED = {
    1: {"train": 9537, "test": 3783},
    2: {"train": 9586, "test": 3734},
    3: {"train": 9624, "test": 3696},
}
FRAME_RATE = 25  # of the clips, and so of the stored pictures
CLIP = re.compile(r"([A-Za-z0-9]+)/v_([A-Za-z0-9]+)_(g[0-9]{2})_(c[0-9]{2})[.]avi")


class _Absent(Exception):
    """Stored pictures of a clip that are not there, or not in pairs."""


def listing(
    raw: Raw,
    *,
    split: int = 1,
    lists: str = "ucfTrainTestlist",
    train: str = "",
    test: str = "",
    videos: str = "UCF-101",
    rgb: str = "video",
    rgb_folder: str = "jpegs_256",
    flow: str = "stored",
    flow_folder: str = "tvl1_flow",
    per_second: float = 1.0,
    size: int = 256,
) -> Listing:
    """split: 1, 2 or 3. lists: folder of classInd.txt and the lists. train, test: lists other than those of `split`.

    rgb: pictures out of the `video`s, or `pictures` stored below rgb_folder. flow: pictures `stored` below
    flow_folder in u and v, or `computed` from frames of the videos, each with the one after it. per_second: pictures
    and fields of flow of every second. size: shorter side in pixels at most, 0 keeps it.
    """
    one_of("rgb", rgb, ("video", "pictures"))
    one_of("flow", flow, ("stored", "computed"))
    if split not in EXPECTED:
        raise ConfigError(f"option split is {split!r}; give 1, 2 or 3")
    if not 0 < per_second <= FRAME_RATE:
        raise ConfigError(f"option per_second is {per_second}; give more than 0 and at most {FRAME_RATE}")
    classes = card_classes(__file__)
    numbers = _class_numbers(raw, f"{lists}/classInd.txt", classes)
    places = {"train": train or f"{lists}/trainlist{split:02}.txt", "test": test or f"{lists}/testlist{split:02}.txt"}
    there = {path.lower(): path for paths in files_in(raw, videos, (".avi",)).values() for path in paths}
    rgb_stored = _by_clip(raw, rgb_folder) if rgb == "pictures" else {}
    u, v = ((_by_clip(raw, f"{flow_folder}/{part}") if flow == "stored" else {}) for part in "uv")
    step = round(FRAME_RATE / per_second)
    small = size or None

    rows: list[RawRow] = []
    left: list[Left] = []
    seen: dict[str, Line] = {}
    for name, path in places.items():
        for line in lines(raw, path):
            folder, stem, group, clip = _clip(line, classes, numbers)
            first = seen.setdefault(clip, line)
            if first is not line:
                left.append(Left(f"{clip}@{name}:{line.number}", name, DUPLICATE, f"clip {clip} is that of {first}"))
                continue
            listed = f"{videos.rstrip('/')}/{folder}/{stem}.avi"
            video = there.get(listed.lower(), listed)
            media: dict[str, Media] = {}
            try:
                if rgb == "video":
                    media["rgb"] = Video(video, per_second=per_second, size=small)
                else:
                    media["rgb"] = Pictures(tuple(_stored(rgb_stored, rgb_folder, stem)[::step]), size=small)
                if flow == "stored":
                    pairs = _pairs(_stored(u, f"{flow_folder}/u", stem), _stored(v, f"{flow_folder}/v", stem))
                    us, vs = zip(*pairs[::step], strict=True)
                    media["flow"] = Flow(us, vs, size=small)
                else:
                    media["flow"] = Flow(video=Video(video, per_second=per_second, size=small))
            except _Absent as error:
                left.append(Left(clip, name, MISSING, str(error)))
                continue
            rows.append(RawRow(clip, name, folder, media, {"group": f"{folder}_{group}"}))
    _, _, notes = part_overlap(rows, "group")
    if flow == "computed":
        notes.append("Flow is computed here, by another method than the TV-L1 flow of the papers.")
    return Listing(rows, left, EXPECTED[split], notes, rows_per_part=64)


def adapt_card(content: dict[str, Any], *, split: int, **_: Any) -> dict[str, Any]:
    """The card as plain data, with the count of the chosen split."""
    splits = content["splits"]
    return content | {"splits": splits | {"test": splits["test"] | {"expected": EXPECTED[split]["test"]}}}


def _class_numbers(raw: Raw, path: str, classes: tuple[str, ...]) -> dict[str, int]:
    """Class names with the numbers of classInd.txt, from 1, which have to be those of the card."""
    numbers = {}
    for line in lines(raw, path):
        fields = line.text.split()
        if len(fields) != 2:
            raise line.wrong("there should be a number and a class")
        name = known_class(fields[1], classes, line)
        number = whole_number(fields[0], "the number of the class", line)
        if number != classes.index(name) + 1:
            raise line.wrong(f"class {name} has number {number}; in the card it is {classes.index(name) + 1}")
        numbers[name] = number
    return numbers


def _clip(line: Line, classes: tuple[str, ...], numbers: Mapping[str, int]) -> tuple[str, str, str, str]:
    """Folder, file name without ending, group, and the clip's name in one spelling for all lists.

    The lists of split 1 have v_HandstandPushups, those of splits 2 and 3 v_HandStandPushups; the folder's name, which
    is the class, is spelled in one way.
    """
    fields = line.text.split()
    match = CLIP.fullmatch(fields[0])
    if match is None or len(fields) > 2:
        raise line.wrong("there should be Class/v_Class_gNN_cNN.avi, and in lists of train a number")
    folder, named, group, number = match.groups()
    known_class(folder, classes, line)
    if folder not in numbers:
        raise line.wrong(f"class {folder} is not in classInd.txt")
    if named.lower() != folder.lower():
        raise line.wrong(f"a clip of {named} in the folder of {folder}")
    if len(fields) == 2 and whole_number(fields[1], "the number of the class", line) != numbers[folder]:
        raise line.wrong(f"class {folder} has number {numbers[folder]} in classInd.txt")
    return folder, fields[0].rpartition("/")[2].removesuffix(".avi"), group, f"v_{folder}_{group}_{number}"


def _by_clip(raw: Raw, folder: str) -> dict[str, list[str]]:
    """Stored pictures by the name of the clip in lower case."""
    return {name.rpartition("/")[2].lower(): paths for name, paths in files_in(raw, folder).items()}


def _stored(pictures: Mapping[str, list[str]], folder: str, clip: str) -> list[str]:
    found = pictures.get(clip.lower())
    if not found:
        raise _Absent(f"no pictures in {folder}/{clip}")
    return found


def _pairs(u: list[str], v: list[str]) -> list[tuple[str, str]]:
    if [path.rpartition("/")[2] for path in u] != [path.rpartition("/")[2] for path in v]:
        raise _Absent(f"{len(u)} pictures of u and {len(v)} of v, which do not form pairs: {u[0].rpartition('/')[0]}")
    return list(zip(u, v, strict=True))
