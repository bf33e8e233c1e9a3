"""Multimodal sarcasm (MMSD): recipe. What it takes and why is told in README.md."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from counterpoise.contracts import DataError
from counterpoise.data.lists import Line, lines, one_of
from counterpoise.data.raw import DUPLICATE, Left, Listing, Pictures, Raw, RawRow
from counterpoise.data.tweets import with_tokenizer

CLASSES = ("not_sarcastic", "sarcastic")  # written as 0, 1
# Words with which the tweets were found or which give the label away; the pictures of such rows are not distributed.
CUES = frozenset(
    ["sarcasm", "sarcastic", "reposting", "<url>", "joke", "humour", "humor", "jokes", "irony", "ironic", "exgag"]
)
CUE = "word that gives the label away"
# rows of the published lists, and those of MMSD2.0, which are what the filter leaves
EXPECTED = {"train": 29040, "valid": 2410, "test": 2409}
EXPECTED_JSON = {"train": 19816, "valid": 2410, "test": 2409}
LONGEST = 100_000  # characters of a line that are parsed


def listing(
    raw: Raw,
    *,
    train: str = "text/train.txt",
    valid: str = "text/valid2.txt",
    test: str = "text/test2.txt",
    images: str = "images",
    labels: str = "human",
    cues: str = "drop",
    size: int = 256,
    tokenizer: str = "",
) -> Listing:
    """Rows of MMSD's lists of literals, or of MMSD2.0's JSON where a list's name ends with .json.

    train, valid, test: lists, below the raw folder, absolute or s3://. images: folder of the pictures.
    labels: `human` or `hashtag`; where a row has both, they come in the order hashtag, human. cues: `drop` or `keep`
    rows of train, valid and test with one of the words of `CUES`. size: shorter side in pixels, 0 keeps it.
    tokenizer: of the card, see `adapt_card`.
    """
    one_of("labels", labels, ("human", "hashtag"))
    one_of("cues", cues, ("drop", "keep"))
    rows: list[RawRow] = []
    left: list[Left] = []
    seen: dict[str, Line] = {}
    expected: dict[str, int] = {}
    for split, path in {"train": train, "valid": valid, "test": test}.items():
        is_json = path.lower().endswith(".json")
        expected[split] = (EXPECTED_JSON if is_json else EXPECTED)[split]
        for line, tweet, text, hashtag, human in _json(raw, path) if is_json else _literals(raw, path):
            first = seen.setdefault(tweet, line)
            if first is not line:
                # a name of its own: the ledger tells rows apart by it
                left.append(
                    Left(f"{tweet}@{split}:{line.number}", split, DUPLICATE, f"tweet {tweet} is that of {first}")
                )
                continue
            found = [] if is_json or cues == "keep" else [word for word in text.split() if word in CUES]
            if found:
                left.append(Left(tweet, split, CUE, found[0]))
                continue
            picture = Pictures((f"{images.rstrip('/')}/{tweet}.jpg",), size=size or None, one=True)
            label = CLASSES[human if labels == "human" else hashtag]
            rows.append(RawRow(tweet, split, label, {"image": picture}, {"text": text}))
    return Listing(rows, left, expected)


def adapt_card(content: dict[str, Any], *, tokenizer: str, **_: Any) -> dict[str, Any]:
    """The card as plain data. tokenizer: of Hugging Face, for text; "" leaves hashed words."""
    return with_tokenizer(content, tokenizer)


def _literals(raw: Raw, path: str) -> Iterator[tuple[Line, str, str, int, int]]:
    """Line, tweet id, text, hashtag label and human label of a list with one literal per line."""
    for line in lines(raw, path):
        if len(line.text) > LONGEST:
            raise line.wrong(f"{len(line.text)} characters; at most {LONGEST} are read")
        try:
            row = ast.literal_eval(line.text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise line.wrong("not a literal list such as ['682716753374351360', 'text', 1]") from None
        if not isinstance(row, list) or len(row) not in (3, 4) or not all(isinstance(cell, str) for cell in row[:2]):
            raise line.wrong("there should be a tweet id, a text, and one label or two")
        yield line, _tweet_id(row[0], line), row[1], _label(row[2], line), _label(row[-1], line)


def _json(raw: Raw, path: str) -> Iterator[tuple[Line, str, str, int, int]]:
    """The same of MMSD2.0, whose rows have one label. The number of a line is that of the entry, from 1."""
    try:
        entries = json.loads(raw.text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(entries, list):
        raise DataError(f"{path}: there should be a list of entries with image_id, text and label")
    for number, entry in enumerate(entries, 1):
        line = Line(json.dumps(entry, ensure_ascii=False), path, number)
        if not isinstance(entry, dict) or not {"image_id", "text", "label"} <= set(entry):
            raise line.wrong("an entry has image_id, text and label")
        identity = entry["image_id"]
        if isinstance(identity, int) and not isinstance(identity, bool):
            identity = str(identity)
        if not isinstance(entry["text"], str):
            raise line.wrong("text should be a string")
        label = _label(entry["label"], line)
        yield line, _tweet_id(identity, line), entry["text"], label, label


def _tweet_id(value: object, line: Line) -> str:
    """Digits, as text: as a floating-point number an id above 2^53 would become another one."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,25}", value):
        raise line.wrong(f"tweet id {value!r}; it should be digits, and names the picture")
    return value


def _label(value: object, line: Line) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise line.wrong(f"unknown class {value!r}; labels are 0 not sarcastic, 1 sarcastic")
    return value
