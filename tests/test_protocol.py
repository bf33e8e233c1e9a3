"""Protocols in runs: what is trained, what selects, and that numbers say under which protocol they were made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import settings, write_corpus

from counterpoise.cli import main
from counterpoise.engine.run import RunFolder
from counterpoise.reports.records import read_runs
from counterpoise.reports.tables import comparison, text_table

PROTOCOLS = {
    "valid-v1": {"description": "the epoch is chosen on a tenth of train"},
    "paper-v1": {"description": "the epoch is chosen on test", "select_on": "test"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.yaml, on a corpus whose valid split is carved out of train."""
    folder = tmp_path_factory.mktemp("protocols")
    card = Path(write_corpus(folder / "corpus")) / "corpus.yaml"
    content = yaml.safe_load(card.read_text())
    content["splits"]["valid"] = {"carve": {"fraction": 0.1}}
    content["splits"]["train"].pop("expected")
    card.write_text(yaml.safe_dump(content | {"protocols": PROTOCOLS}))
    (folder / "small.yaml").write_text(yaml.safe_dump(settings(str(folder / "corpus"), epochs=3)))
    return folder


def call(place: Path, command: str, *arguments: str) -> int:
    fixed = ["--runs", str(place / "runs"), "--device", "cpu", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main([command, str(place / "small.yaml"), *fixed, *arguments])
    return int(ended.value.code or 0)


def run(place: Path, protocol: str) -> tuple[dict[str, Any], Sequence[Any]]:
    """Summary and epoch records of a run under a protocol."""
    assert call(place, "train", "--name", protocol, "--set", f"protocol={protocol}") == 0
    folder = RunFolder.open(str(place / "runs" / protocol))
    return dict(folder.read_json("summary.json")), [r for r in folder.records() if r["kind"] == "epoch"]


def test_a_run_says_which_split_chose_its_epoch(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ours, _ = run(place, "valid-v1")
    assert (ours["protocol"], ours["selection"]) == ("valid-v1", "valid accuracy (fused)")
    assert "on test, as the paper does" not in capfd.readouterr().err
    paper, epochs = run(place, "paper-v1")
    assert "on test, as the paper does" in capfd.readouterr().err
    assert (paper["protocol"], paper["selection"]) == ("paper-v1", "test accuracy (fused)")
    # its valid split is test, and train is whole
    assert paper["test"]["accuracy"]["fused"] == max(e["valid"]["accuracy"]["fused"] for e in epochs)
    assert (epochs[0]["train"]["samples"], epochs[0]["valid"]["samples"]) == (240, 60)
    assert ours["group"] != paper["group"]
    table = comparison(read_runs([str(place / "runs" / name) for name in PROTOCOLS]))
    text = text_table(table)
    assert "(valid-v1)" in text
    assert "(paper-v1)" in text
    assert any("too high" in note for note in table.notes)


def test_nothing_is_tuned_on_test(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tune = ["--methods", "joint,late", "--set", "protocol=paper-v1", "--tune", "optim.lr=0.1,0.01", "--dry-run"]
    assert call(place, "compare", *tune) == 2
    assert "--tune would choose on test, as protocol paper-v1 selects epochs" in capfd.readouterr().err


def test_unknown_protocols_and_preprocessing_are_refused_before_a_run_begins(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(place, "train", "--name", "none", "--set", "protocol=vald-v1") == 2
    assert "no protocol 'vald-v1', did you mean 'valid-v1'" in capfd.readouterr().err
    assert call(place, "train", "--name", "none", "--set", "preprocess.strong.standardise=true") == 2
    assert "unknown key 'standardise', did you mean 'standardize'" in capfd.readouterr().err
    assert not (place / "runs" / "none").exists()


def test_preprocessing_of_an_experiment_is_another_experiment(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digests = set()
    for value in ("true", "false"):
        change = f"preprocess.strong.standardize={value}"
        assert call(place, "train", "--dry-run", "--set", change) == 0
        digests.add(capfd.readouterr().err.split("digest ")[1].split()[0])
    assert len(digests) == 2


def test_an_evaluation_elsewhere_takes_the_protocol_if_there_is_one(place: Path) -> None:
    from counterpoise.engine.again import evaluate_run

    name = "elsewhere"
    assert call(place, "train", "--name", name, "--set", "protocol=valid-v1", "--set", "epochs=1") == 0
    other = write_corpus(place / "other")
    found = evaluate_run(str(place / "runs" / name), corpus=other, device="cpu")
    own = json.loads((place / "runs" / name / "summary.json").read_text())
    assert found["accuracy"] == own["test"]["accuracy"]
