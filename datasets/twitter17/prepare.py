"""Twitter-17: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

from counterpoise.data.raw import Listing, Raw
from counterpoise.data.tweets import target_sentiment

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
) -> Listing:
    """train, valid, test: lists, below the raw folder, absolute or s3://. The rest: see `target_sentiment`."""
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
