"""`bench scaling`: groups of workers do the steps they are asked for. Nothing is said about how fast."""

from __future__ import annotations

import pytest

from counterpoise.bench.scaling import render, scaling
from counterpoise.contracts import ConfigError


def test_every_group_gets_its_batch_of_both_kinds() -> None:
    said: list[str] = []
    found = scaling(
        encoder="cnn", batch_size=8, audio=(16, 16), image=(16, 16), workers=(2,), steps=1, rounds=3, device="cpu",
        compute={}, batch_norm="local", say=said.append,
    )  # fmt: skip
    rows = [(row["kind"], row["workers"], row["batch_size"]) for row in found["rows"]]
    assert rows == [("strong", 1, 8), ("strong", 2, 8), ("weak", 1, 4), ("weak", 2, 8)]
    assert all(row["median_s"] > 0 for row in found["rows"])
    assert [row["speedup"]["median"] for row in found["rows"] if row["workers"] == 1] == [1, 1]
    assert [row["waiting"] > 0 for row in found["rows"]] == [False, True, False, True]
    assert said == ["starting 1 worker", "starting 2 workers", "warmed up"] + [
        f"round {n} of 3 done" for n in (1, 2, 3)
    ]
    assert "strong         2       8" in render(found)


def test_a_batch_that_cannot_be_dealt_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch-size 6 cannot be dealt to 4 workers evenly"):
        scaling(
            encoder="cnn", batch_size=6, audio=(16, 16), image=(16, 16), workers=(4,), steps=1, rounds=3, device="cpu",
            compute={}, batch_norm="sync", say=print,
        )  # fmt: skip
