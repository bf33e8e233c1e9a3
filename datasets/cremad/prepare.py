"""CREMA-D: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import PurePosixPath

from counterpoise.contracts import ConfigError
from counterpoise.data.lists import Line, lines, one_of
from counterpoise.data.raw import DUPLICATE, NOT_IN_SPLIT, Left, Listing, Raw, RawRow, Sound, Video

RATE = 22050  # Hz, as in the papers
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
CLIP = re.compile(r"(1\d{3})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})")  # actor, sentence, emotion, level
# rows of OGM-GE's lists; those of PMR, DI-MML and MLA have as many
EXPECTED = {"train": 6698, "test": 744}
CLIPS = 7442
MOST_FRAMES = 10  # clips have up to 5; one file is a reel of a minute


def listing(
    raw: Raw,
    *,
    train: str = "",
    test: str = "",
    valid: str = "",
    split: str = "speakers",
    test_fraction: float = 0.1,
    seed: int = 0,
    sound: str = "AudioWAV",
    video: str = "VideoFlash",
    per_second: float = 1.0,
    size: int = 224,
) -> Listing:
    """Rows of the given lists or, without lists, of all clips that are there.

    train, test, valid: lists, below the raw folder, absolute or s3://. split, test_fraction, seed: without lists, what
    goes to test: whole `speakers`, or `clips` of every emotion. sound, video: folders. per_second: frames that are
    kept. size: height and width of the stored frames in pixels, 0 keeps them as they are.
    """
    one_of("split", split, ("speakers", "clips"))
    if not 0 < test_fraction < 1 or per_second <= 0:
        raise ConfigError(f"test_fraction is {test_fraction} and per_second {per_second}; give 0..1 and more than 0")
    if bool(train) != bool(test) or (valid and not train):
        raise ConfigError("give lists for train and test, or none; a list for valid comes on top")
    there = sorted({name for path in raw.files if (name := _clip_in(path, sound) or _clip_in(path, video))})
    left: list[Left] = []
    if train:
        # test first: a clip that two lists have stays there
        chosen = _listed(raw, {"test": test, "valid": valid, "train": train}, left)
        left += [Left(clip, "", NOT_IN_SPLIT) for clip in there if clip not in chosen]
        expected = EXPECTED
        notes = ["Every actor is in train and in test of the published lists: voices and faces are known at test time."]
    else:
        chosen = _divided(there, split, test_fraction, seed)
        expected = {}
        notes = [
            f"Split made here (by {split}, seed {seed}): accuracies cannot be compared with those of papers.",
            f"{len(there)} of the corpus' {CLIPS} clips are in the raw folder.",
        ]
    rows = []
    for clip, part in chosen.items():
        speaker, sentence, emotion, level = CLIP.fullmatch(clip).groups()  # type: ignore[union-attr]
        frames = Video(
            f"{video}/{clip}.flv", per_second=per_second, most=MOST_FRAMES, size=(size, size) if size else None
        )
        media = {"audio": Sound(f"{sound}/{clip}.wav", RATE), "frames": frames}
        rows.append(RawRow(clip, part, emotion, media, {"speaker": speaker, "sentence": sentence, "level": level}))
    return Listing(rows, left, expected, notes)


def _clip_in(path: str, folder: str) -> str | None:
    """The name of the clip that a file of the raw folder belongs to."""
    file = PurePosixPath(path)
    known = file.parent == PurePosixPath(folder) and CLIP.fullmatch(file.stem) and file.suffix in (".wav", ".flv")
    return file.stem if known else None


def _listed(raw: Raw, places: dict[str, str], left: list[Left]) -> dict[str, str]:
    """Splits by clip, in the order of the lists: `clip,EMO` (OGM-GE) or `clip.flv Emotion` (MLA)."""
    found: dict[str, tuple[str, Line]] = {}
    for split, place in places.items():
        for line in lines(raw, place) if place else []:
            name, *label = re.split(r"[,\s]+", line.text.strip())
            clip = name.removesuffix(".flv").removesuffix(".wav")
            match = CLIP.fullmatch(clip)
            if match is None or match[3] not in EMOTIONS:
                raise line.wrong("it should begin with a clip such as 1001_IEO_ANG_HI")
            if label and label[0][:3].upper() != match[3]:
                raise line.wrong(f"the clip's name says {match[3]}, the list says {label[0]}")
            if clip in found:
                first_split, first = found[clip]
                left.append(Left(clip, split, DUPLICATE, f"{first} has it too ({first_split})"))
                continue
            found[clip] = (split, line)
    return {clip: split for clip, (split, _) in found.items()}


def _divided(clips: list[str], by: str, fraction: float, seed: int) -> dict[str, str]:
    """Splits by clip: of every group of things that are divided, those with the lowest hashes go to test."""
    things: dict[str, set[str]] = {}  # by group: actors together, or the clips of each emotion
    for clip in clips:
        speaker, _, emotion, _ = clip.split("_")
        if by == "speakers":
            things.setdefault("", set()).add(speaker)
        else:
            things.setdefault(emotion, set()).add(clip)
    test: set[str] = set()
    for names in things.values():
        order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
        test |= set(order[: math.ceil(fraction * len(order))])
    return {clip: "test" if (clip.split("_")[0] if by == "speakers" else clip) in test else "train" for clip in clips}
