"""`counterpoise bench stream` with a small corpus and a small bound."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from counterpoise.bench import stream
from counterpoise.bench.machine import Side
from counterpoise.cli import app
from counterpoise.contracts import ResourceError

GIB = 2**30
SIZE_GIB = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


def measured(folder: Path, *options: str) -> tuple[int, dict]:
    done = CliRunner().invoke(
        app, ["bench", "stream", "--gib", str(SIZE_GIB), "--out", str(folder), "--batch-size", "4", "--json", *options]
    )
    assert done.stdout, done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_corpus_streams_in_less_memory_than_it_has_bytes(folder: Path) -> None:
    """Holding it would take its bytes, and on top the row group being read, decoded batches and free lists of the
    allocators, which do not depend on its size."""
    code, found = measured(folder, "--memory-gib", "4", "--shuffle-mib", "8")
    assert code == 0 and found["within"] and found["finished"]
    assert found["stored_bytes"] >= SIZE_GIB * GIB
    assert found["windows"] >= 30
    assert len(found["thirds_samples_per_s"]) == 3 and min(found["thirds_samples_per_s"]) > 0
    taken = found["peak_memory_bytes"] - found["memory_before_bytes"]
    assert 0 < taken < found["stored_bytes"], f"{taken / 2**20:.0f} MiB"


def test_one_window_for_everything_is_what_the_bound_is_there_for(folder: Path) -> None:
    """The same corpus with a window that holds all of it passes a bound that small windows keep."""
    _, small = measured(folder, "--memory-gib", "4", "--shuffle-mib", "8")
    bound = f"{small['peak_memory_bytes'] / GIB + 0.06:.3f}"
    code, found = measured(folder, "--memory-gib", bound, "--shuffle-mib", "4096")
    assert code == 4 and not found["within"]
    assert "PAST the bound" in stream.render(found)


def test_rates_of_thirds_are_those_of_their_samples() -> None:
    times = [(10, 1.0), (20, 2.0), (30, 4.0), (40, 6.0), (50, 10.0), (60, 14.0)]
    found = stream.rates(times, stored=60 * 2**20, rows=60)
    assert found["thirds_samples_per_s"] == [10.0, 5.0, 2.5]
    assert found["samples_per_s"] == pytest.approx(60 / 14)
    assert found["mib_per_s"] == pytest.approx(60 / 14)
    assert stream.rates([], 1, 1)["samples_per_s"] is None


def test_a_side_whose_process_ends_is_named() -> None:
    with pytest.raises(ResourceError, match=r"doomed: its process ended \(exit code 3\)"):
        Side("doomed", sys.exit, 3)
