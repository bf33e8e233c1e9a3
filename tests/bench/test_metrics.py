"""bench metrics: what it measures, on few and short rounds."""

from __future__ import annotations

import pytest

from counterpoise.bench import metrics


def test_cost_size_and_age_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DECISIONS", 3)
    result = metrics.measure(seconds=0.2, rounds=3, threads=1)
    step, scrape, age = result["step"], result["scrape"], result["age_s"]
    assert step["without_s"] > 0 and step["wall_ratio"]["low"] <= step["wall_ratio"]["median"]
    assert 0 < step["cpu_ratio"]["median"] < 10
    assert 6 * 16 + 100 < scrape["series"] < 6 * 16 + 200, "every classifier has its weight, nothing else has that many"
    assert scrape["bytes"] > scrape["gzip_bytes"] > 0
    assert 0 < age["median"] < 10
    text = metrics.render(result)
    assert f"{scrape['series']} series" in text and f"{age['median']:.2f} s after" in text
