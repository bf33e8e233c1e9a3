"""A whole run whose corpus and run folder lie in object storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import Interrupted
from counterpoise.engine import checkpoint
from counterpoise.engine.again import evaluate_run
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import RunFolder
from counterpoise.reports.html import write_report
from counterpoise.reports.records import read_run

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]  # servers and clients warn of their own


def start(corpus: str, root: str, name: str) -> Job:
    content: dict[str, Any] = {
        "corpus": corpus,
        "modalities": {m: {"name": "mlp", "hidden": 8, "width": 8} for m in ("strong", "weak")},
        "method": {"name": "aug", "hidden": 8, "check_every": 1},
        "optim": {"lr": 0.05},
        "batch_size": 48,
        "epochs": 3,
    }
    experiment, provenance = resolve(content)
    text = yaml.safe_dump(experiment.to_json())
    folder = RunFolder.create(root, name, experiment_text=text, provenance=provenance, manifest={"run": name})
    return Job(experiment.to_json(), folder.uri)


def weights(uri: str) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(RunFolder.open(uri).checkpoints)
    assert found is not None
    return found.tensors["model"]


def test_a_run_in_object_storage_is_interrupted_resumed_and_equal_to_one_on_disk(
    bucket: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = f"{bucket}/instruments"
    for file in Path(corpus).iterdir():
        storage.write_bytes(f"{remote}/{file.name}", file.read_bytes())
    here = start(corpus, str(tmp_path), "whole")
    assert execute(here, SingleComm()) is not None

    monkeypatch.setattr("counterpoise.engine.loop.CONTROL_INTERVAL_S", 0.0)  # look for a wish to stop at every batch
    there = start(remote, f"{bucket}/runs", "parts")
    looks = iter([None] * 7 + ["enough"])
    with pytest.raises(Interrupted):
        execute(there, SingleComm(), stop=lambda: next(looks))
    assert RunFolder.open(there.run).state() == "interrupted"
    again = Job(there.experiment, there.run, resume=True)
    assert execute(again, SingleComm()) is not None

    one, two = weights(here.run), weights(there.run)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert RunFolder.open(there.run).verify() == []
    assert evaluate_run(there.run, "valid")["samples"] == 60
    assert read_run(there.run).finished
    page = write_report([there.run, here.run], str(tmp_path / "report.html"))
    assert "parts" in Path(page).read_text()

    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    files = [storage.join(there.run, name) for name in RunFolder.open(there.run).files()]
    assert len(files) > 10
    assert not [file for file in files if secret in storage.read_bytes(file)]
