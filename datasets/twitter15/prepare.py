"""Twitter-15: recipe. What it takes and why is told in README.md."""

from __future__ import annotations

from counterpoise.data.raw import Listing, Raw
from counterpoise.data.tweets import target_sentiment

# rows of the published lists
EXPECTED = {"train": 3179, "valid": 1122, "test": 1037}


def listing(
    raw: Raw,
    *,
    train: str = "absa_data/twitter2015/train.tsv",
    valid: str = "absa_data/twitter2015/dev.tsv",
    test: str = "absa_data/twitter2015/test.tsv",
    images: str = "twitter2015_images",
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
