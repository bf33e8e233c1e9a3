"""NVGesture, pictures, optical flow and depth: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

import re
from typing import Any

from counterpoise.contracts import ConfigError
from counterpoise.data.lists import Line, below, card_classes, lines, one_of, part_overlap, whole_number
from counterpoise.data.raw import DUPLICATE, Flow, Left, Listing, Media, Raw, RawRow, Video

EXPECTED = {"train": 1050, "test": 482}  # rows of the published lists, of both versions
CLIP = re.compile(r"subject([0-9]+)_r([0-9]+)")


def listing(
    raw: Raw,
    *,
    version: str = "v2",
    lists: str = "",
    train: str = "",
    test: str = "",
    videos: str = "",
    flow: str = "computed",
    least: int = 64,
    size: int = 256,
) -> Listing:
    """version: of the lists, `v2` with 23 labels corrected or `v1`. lists: their folder. train, test: other lists.

    videos: folder that the paths in the lists begin in. flow: `computed` from the colour frames, or `none`. least:
    frames that a window has to have. size: height and width in pixels.
    """
    one_of("version", version, ("v2", "v1"))
    one_of("flow", flow, ("computed", "none"))
    for option, value in (("least", least), ("size", size)):
        if value < 1:
            raise ConfigError(f"option {option} is {value}; give 1 or more")
    suffix = "_v2" if version == "v2" else ""
    folder = f"{lists.rstrip('/')}/" if lists else ""
    classes = card_classes(__file__)
    rows: list[RawRow] = []
    left: list[Left] = []
    seen: dict[str, Line] = {}
    for split, given in {"train": train, "test": test}.items():
        for line in lines(raw, given or f"{folder}nvgesture_{split}_correct_cvpr2016{suffix}.lst"):
            fields = _fields(line)
            place = below(videos, fields["path"][0], line)
            clip = "/".join(place.split("/")[-2:])
            match = CLIP.fullmatch(place.rpartition("/")[2])
            if match is None:
                raise line.wrong(f"path {fields['path'][0]!r} does not end with subject<number>_r<number>")
            label = whole_number(fields["label"][0], "the label", line)
            if not 1 <= label <= len(classes):
                raise line.wrong(f"unknown class {label}; labels lie in 1..{len(classes)}")
            first = seen.setdefault(place, line)
            if first is not line:
                left.append(Left(f"{clip}@{split}:{line.number}", split, DUPLICATE, f"clip {clip} is that of {first}"))
                continue
            colour = _window(place, fields["color"], line, size, least, 3)
            media: dict[str, Media] = {"rgb": colour, "depth": _window(place, fields["depth"], line, size, least, 1)}
            if flow == "computed":
                media["flow"] = Flow(video=colour)
            rows.append(RawRow(clip, split, classes[label - 1], media, {"subject": match[1], "repetition": match[2]}))
    _, _, notes = part_overlap(rows, "subject")
    if flow == "computed":
        notes.append("Flow is computed here; how the flow of the papers was computed is not published.")
    return Listing(rows, left, EXPECTED, notes, rows_per_part=8)


def adapt_card(content: dict[str, Any], *, flow: str, **_: Any) -> dict[str, Any]:
    """The card as plain data, without the modality that is not made."""
    kept = {name: card for name, card in content["modalities"].items() if name != "flow" or flow != "none"}
    return content | {"modalities": kept}


def _fields(line: Line) -> dict[str, list[str]]:
    """What stands behind every name of `path:... depth:sk_depth:146:226 color:... duo_left:... label:1`."""
    found: dict[str, list[str]] = {}
    for field in line.text.split():
        name, *values = field.split(":")
        if name in found:
            raise line.wrong(f"{name} is given twice")
        found[name] = values
    for name, count in {"path": 1, "depth": 3, "color": 3, "label": 1}.items():
        if len(found.get(name, [])) != count:
            raise line.wrong(f"{name} should be there with {count} value{'s' if count > 1 else ''} behind a colon")
    return found


def _window(place: str, values: list[str], line: Line, size: int, least: int, channels: int) -> Video:
    """The frames of one sensor: each has its own frame rate, and so its own numbers."""
    stem, begin, end = values
    if not re.fullmatch(r"[A-Za-z0-9_]+", stem):
        raise line.wrong(f"file {stem!r}; it should be a name such as sk_color")
    first, last = whole_number(begin, "the first frame", line), whole_number(end, "the end frame", line)
    if last <= first:
        raise line.wrong(f"the window {first}:{last} is empty; the second number is the first frame after it")
    return Video(
        f"{place}/{stem}.avi", first_frame=first, end_frame=last, least=least, size=(size, size), channels=channels
    )
