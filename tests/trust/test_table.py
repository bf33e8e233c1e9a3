"""The table counts what happened, and a run of the long set fails by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.trust.faults import LOG, DidNotLandError, keep
from tests.trust.soak import Look, slope, verdict
from tests.trust.table import passed, table


def test_the_table_counts_faults_controls_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv(LOG, str(log))
    keep("10 later", "b", {"step": 3}, True)
    keep("1 first", "a", {"step": 9}, True, recover_s=0.5)
    keep("1 first", "a", {"step": 4}, True, recover_s=1.5)
    keep("1 first", "control", {"step": 5}, False, control=True)
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    assert passed(lines)
    text = table(lines).splitlines()
    assert text[1].split() == ["1", "first", "2", "2", "2", "1", "of", "1", "1.0", "(at", "most", "1.5)"]
    assert text[2].split() == ["10", "later", "1", "1", "1", "-", "-"]
    assert text[3] == "ranks were killed at steps 0-9: 2"
    assert not passed([*lines, {**lines[0], "survived": False}])
    assert not passed([*lines, {**lines[3], "survived": True}]), "a control that nobody noticed"


def test_a_fault_that_did_not_land_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG, str(tmp_path / "log.jsonl"))
    with pytest.raises(DidNotLandError, match="1 first: a kill did not land"):
        keep("1 first", "a kill", None, True)
    assert not passed([json.loads((tmp_path / "log.jsonl").read_text())])


def test_a_soak_tells_growth_from_noise() -> None:
    def looks(**growing: float) -> list[Look]:
        still = {"rss_mib": 500.0, "descriptors": 20, "threads": 5, "shared": 0, "children": 0, "temporary": 1}
        return [
            Look(
                hours=i / 10, **{k: v + (growing.get(k, 0) * i) + (k == "rss_mib") * (i % 3) for k, v in still.items()}
            )
            for i in range(80)
        ]

    assert verdict(looks())[1] == []
    assert slope(looks(rss_mib=2.0), "rss_mib") == pytest.approx(20.0, abs=0.2)
    assert "memory grows by 3.7% an hour" in verdict(looks(rss_mib=2.0))[1][0]
    for name in ("descriptors", "threads", "shared", "temporary"):
        assert verdict(looks(**{name: 1}))[1][0].startswith(f"{name} grew from")
    assert verdict(looks(children=1))[1][-1].endswith("processes are left behind")
