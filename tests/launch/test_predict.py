"""Predictions by actors of Ray Data: the same bytes as in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cases import SMALL
from tests.conftest import Done, settings

from counterpoise.contracts import DataError
from counterpoise.engine import bulk
from counterpoise.engine.bulk import predict_files
from counterpoise.engine.export import export_run
from counterpoise.launch.predict import ray_predict

pytestmark = pytest.mark.ray


def test_actors_write_what_one_process_writes_and_say_what_is_wrong(
    run_experiment: Callable[..., Done], corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_run(run_experiment(settings(corpus, method=SMALL["aug"])).folder.uri, str(tmp_path / "model"))
    model = str(tmp_path / "model")
    alone = predict_files(model, corpus, str(tmp_path / "alone"), split="train", device="cpu", threads=1)
    seen: list[tuple[int, int]] = []
    together = predict_files(
        model,
        corpus,
        str(tmp_path / "together"),
        split="train",
        device="cpu",
        threads=1,
        run_parts=ray_predict(2),
        progress=lambda done, total, text: seen.append((done, total)),
    )
    assert together["accuracy"] == alone["accuracy"] and seen[-1] == (240, 240)
    sums = [(tmp_path / place / "SHA256SUMS").read_bytes() for place in ("alone", "together")]
    assert sums[0] == sums[1]

    load = bulk.load_model
    monkeypatch.setattr(bulk, "load_model", lambda place, device: load(tmp_path / "copy", device))
    (tmp_path / "model").rename(tmp_path / "copy")  # what the actors are told is no longer there
    with pytest.raises(DataError, match="holds no exported model"):
        predict_files(model, corpus, str(tmp_path / "out"), device="cpu", threads=1, run_parts=ray_predict(1))
