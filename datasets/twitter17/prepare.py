"""Twitter-17: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

from typing import Any

from counterpoise.data.raw import Listing, Raw
from counterpoise.data.tweets import paired, target_sentiment, with_tokenizer

# rows of the published lists
EXPECTED = {"train": 3562, "valid": 1176, "test": 1234}


def listing(
    raw: Raw,
    *,
    train: str = "absa_data/twitter/train.tsv",
    valid: str = "absa_data/twitter/dev.tsv",
    test: str = "absa_data/twitter/test.tsv",
    images: str = "twitter2017_images",
    text: str = "marked",
    repeats: str = "keep",
    overlap: str = "keep",
    size: int = 256,
    tokenizer: str = "",
    pair: str = "none",
) -> Listing:
    """train, valid, test: lists, below the raw folder, absolute or s3://. The rest: see `target_sentiment`.

    tokenizer, pair: of the card, see `adapt_card`.
    """
    paired(pair)
    return target_sentiment(
        raw,
        {"train": train, "valid": valid, "test": test},
        images,
        text=text,
        repeats=repeats,
        overlap=overlap,
        size=size,
        expected=EXPECTED,
    )


def adapt_card(content: dict[str, Any], *, tokenizer: str, pair: str, **_: Any) -> dict[str, Any]:
    """The card as plain data. tokenizer: of Hugging Face, for text. pair: `target` reads the target as second text."""
    return with_tokenizer(content, tokenizer, paired(pair))
