"""`bench start`: a run is followed to its first step and then ended. Nothing is said about how long it takes."""

from __future__ import annotations

import pytest

from counterpoise.bench.start import render, start_times


def test_the_first_step_is_compared_with_importing_torch() -> None:
    said: list[str] = []
    found = start_times(rounds=1, workers=1, ray=False, say=said.append)
    torch, train = found["rows"]
    assert (torch["what"], train["what"]) == ("import torch", "train")
    assert torch["seconds"] > 0 and "seconds_ratio" not in torch
    assert train["seconds_ratio"]["median"] == pytest.approx(train["seconds"] / torch["seconds"])
    assert said == ["warmed up", "round 1 of 1 done"]
    lines = render(found).splitlines()
    assert lines[-2].startswith("import torch") and lines[-1].startswith("train")
    assert f"{train['seconds_ratio']['median']:.2f} (" in lines[-1]
