"""Lists of the two corpora of tweets with a sentiment per target, Twitter-15 and Twitter-17."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from counterpoise.contracts import ConfigError
from counterpoise.data.lists import Line, below, lines, one_of, part_overlap, whole_number
from counterpoise.data.raw import DUPLICATE, Left, Listing, Pictures, Raw, RawRow

CLASSES = ("negative", "neutral", "positive")  # written as 0, 1, 2
TARGET = "$T$"


def with_tokenizer(content: dict[str, Any], tokenizer: str, pair: str | None = None) -> dict[str, Any]:
    """A card as plain data whose modality `text` is read with a tokenizer, and with a second text, or as it is.

    tokenizer: folder (absolute or s3://) or name of the hub; "" leaves hashed words. pair: column of the second text.
    Protocols that this would make wrong are left out: those of hashed words, and with a pair all, which know none.
    """
    if not tokenizer:
        if pair is not None:
            raise ConfigError(
                f"option pair is {pair!r}, which needs a tokenizer: hashed words know no second text; give "
                "--option tokenizer=google-bert/bert-base-uncased, or a folder, too"
            )
        return content
    if tokenizer.startswith(("./", "../", "~/")) or tokenizer in (".", "..", "~"):
        raise ConfigError(
            f"option tokenizer is {tokenizer!r}; give the whole path (/...), an s3:// folder or a name of the hub: the "
            "card may be read from another folder"
        )
    text = content["modalities"]["text"]
    preprocess = {key: value for key, value in text["preprocess"].items() if key != "vocabulary"}
    text = text | {"preprocess": preprocess | {"tokenizer": tokenizer}} | ({"pair": pair} if pair else {})
    protocols = {
        name: protocol
        for name, protocol in content.get("protocols", {}).items()
        if pair is None and "tokenizer" in protocol.get("preprocess", {}).get("text", {})
    }
    return content | {"modalities": content["modalities"] | {"text": text}, "protocols": protocols}


def paired(pair: str) -> str | None:
    """The column of the second text that the option `pair` of a recipe asks for."""
    return "target" if one_of("pair", pair, ("none", "target")) == "target" else None


def target_sentiment(
    raw: Raw,
    lists: Mapping[str, str],
    images: str,
    *,
    text: str,
    repeats: str,
    overlap: str,
    size: int,
    expected: Mapping[str, int],
) -> Listing:
    """Rows of tab-separated lists with the fields number, label, picture, sentence with `$T$`, target.

    Fields are taken by place and never unquoted: the header of train has one name twice, that of test has one name
    too few, and tweets contain quotation marks.

    lists: by split. images: folder of the pictures. text: `marked` leaves `$T$` in the sentence, `filled` puts the
    target there. repeats: `keep` or `drop` rows that say again what another row of their split says. overlap: `keep`
    or `drop` rows of train and valid whose picture is in a later split. size: shorter side in pixels, 0 keeps it.
    """
    one_of("text", text, ("marked", "filled"))
    one_of("repeats", repeats, ("keep", "drop"))
    one_of("overlap", overlap, ("keep", "drop"))
    rows: list[RawRow] = []
    left: list[Left] = []
    again: Counter[str] = Counter()
    for split, path in lists.items():
        said: dict[tuple[str, ...], str] = {}
        numbers: dict[int, Line] = {}
        for place, line in enumerate(lines(raw, path)):
            fields = line.text.split("\t")
            if place == 0 and fields[0].strip().lower() == "index":
                continue
            number, label, image, sentence, target = _checked(fields, line)
            if number in numbers:
                raise line.wrong(f"row number {number} is that of {numbers[number]} too; numbers name the samples")
            numbers[number] = line
            sample_id = f"{split}-{number}"
            first = said.setdefault(tuple(fields[1:]), sample_id)
            if first != sample_id:
                again[split] += 1
                if repeats == "drop":
                    left.append(Left(sample_id, split, DUPLICATE, f"the same as {first}"))
                    continue
            path_of_image = below(images, image, line)
            shown = sentence if text == "marked" else sentence.replace(TARGET, target)
            rows.append(
                RawRow(
                    sample_id,
                    split,
                    label,
                    {"image": Pictures((path_of_image,), size=size or None, one=True)},
                    {"text": shown, "target": target, "image_id": image},
                )
            )
    clear, shared, notes = part_overlap(rows, "image_id")
    if overlap == "drop":
        rows, left = clear, left + shared
    fate = "left out" if repeats == "drop" else "kept (repeats=drop leaves them out)"
    notes += [f"Rows of {split} that repeat another one: {count}, {fate}." for split, count in again.items()]
    return Listing(rows, left, expected, notes)


def _checked(fields: list[str], line: Line) -> tuple[int, str, str, str, str]:
    if len(fields) != 5:
        raise line.wrong(f"{len(fields)} fields between tabs; there should be 5")
    number = whole_number(fields[0].strip(), "the row number", line)
    label = fields[1].strip()
    if label not in ("0", "1", "2"):
        raise line.wrong(f"unknown class {label!r}; labels are 0 negative, 1 neutral, 2 positive")
    image, sentence, target = (field.strip() for field in fields[2:])
    if TARGET not in sentence or not target:
        raise line.wrong(f"the sentence has no {TARGET} or the target is empty")
    return number, CLASSES[int(label)], image, sentence, target
