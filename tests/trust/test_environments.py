"""The same run in other surroundings: another interpreter, hash seed, locale, time zone; more threads.

Ray against no Ray, bit for bit: `tests/launch/test_ray.py`. Numbers that stay from version to version:
`tests/engine/golden.json`, and the order below.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tests.conftest import Done, Run, settings
from tests.trust.faults import keep

from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.engine import checkpoint
from counterpoise.engine.run import RunFolder

PACKAGE = Path(__file__).resolve().parents[2] / "platform"
# Rows of epochs 1 to 3, batches of 32, seed 0: for any version of Python, numpy and torch.
ORDER = "806cdc71676d909f7fd1eecf566ffc3baadc4b9a7132cb6c6d22cf099ff891e8"


@pytest.fixture(scope="module")
def whole(corpus: str, run_experiment: Run) -> Done:
    return run_experiment(settings(corpus, epochs=2), name="here")


def test_the_order_of_samples_is_that_of_all_versions(corpus: str) -> None:
    data = LocalData(corpus, batch_size=32, options=DataOptions(cache="on"))
    rows = [batch["row"].tolist() for epoch in (1, 2, 3) for batch in data.train_batches(epoch)]
    found = hashlib.sha256(repr(rows).encode()).hexdigest()
    keep(
        "23 surroundings",
        "order",
        {"versions": [sys.version.split()[0], np.__version__, torch.__version__]},
        found == ORDER,
    )
    assert found == ORDER


def run_command(corpus: str, place: Path, threads: int, environment: dict[str, str]) -> tuple[RunFolder, str]:
    """The run of the command in an interpreter of its own, and what that printed."""
    (place / "e.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=2)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COUNTERPOISE", "PYTEST"))}
    words = ["train", "e.yaml", "--runs", "runs", "--name", "a", "--threads", str(threads), "--metrics-port", "off"]
    done = subprocess.run(
        [sys.executable, "-m", "counterpoise", *words],
        cwd=place,
        env={**kept, **environment, "PYTHONPATH": str(PACKAGE)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return RunFolder.open(str(place / "runs" / "a")), done.stdout + done.stderr


def test_another_interpreter_with_other_surroundings_gives_the_same_bits(
    whole: Done, corpus: str, tmp_path: Path
) -> None:
    surroundings = {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONUTF8": "0"}
    folder, _ = run_command(corpus, tmp_path, 1, surroundings)
    other = checkpoint.latest(folder.at("checkpoints"))
    assert other is not None
    here = whole.last.tensors
    same = all(torch.equal(here[f][k], other.tensors[f][k]) for f in here for k in here[f])
    keep("23 surroundings", "another interpreter", surroundings, same)
    assert same
    assert folder.experiment_text == yaml.safe_dump(whole.experiment.to_json(), sort_keys=False)


def test_two_threads_give_the_same_order_and_nearly_the_same_losses(whole: Done, corpus: str, tmp_path: Path) -> None:
    folder, said = run_command(corpus, tmp_path, 2, {})
    assert "1 worker on cpu, 2 threads each" in said
    losses = [r["train"]["loss"] for r in folder.records() if r["kind"] == "epoch"]
    near = bool(np.allclose(losses, whole.losses(), rtol=1e-4, atol=0))
    keep("23 surroundings", "two threads", {"threads": 2}, near)
    assert near
