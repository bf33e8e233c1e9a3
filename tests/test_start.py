from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cases import SMALL_AUG
from tests.conftest import new_folder, settings, write_corpus

from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, DataError, Interrupted, RefusedError, ResourceError
from counterpoise.engine.run import RunFolder
from counterpoise.start import (
    Settings,
    StopRequest,
    check_same_data,
    keep_changes,
    make_job,
    new_run,
    preview,
    reopen,
    run_jobs,
)

HERE = Settings(device="cpu", threads=1)


def test_a_preview_says_what_a_run_would_be(corpus: str) -> None:
    experiment, _ = resolve(settings(corpus, method=SMALL_AUG))
    seen = preview(experiment, HERE)
    assert seen.samples == {"train": 240, "valid": 60, "test": 60} and seen.classes == 4 and seen.batches == 8
    assert seen.encoders == {"strong": "mlp", "weak": "mlp"}
    text = "\n".join(seen.lines())
    for part in (
        "train 240",
        "4 classes",
        "strong (mlp)",
        "aug",
        "3 epochs of 8 batches of up to 32",
        experiment.digest,
    ):
        assert part in text


def test_a_preview_limits_itself_to_what_is_trained(corpus: str) -> None:
    experiment, _ = resolve(settings(corpus, method={"name": "unimodal", "modality": "weak"}))
    assert set(preview(experiment, HERE).encoders) == {"weak"}


@pytest.mark.parametrize(
    ("changes", "where", "error", "message"),
    [
        ({"batch_size": 33}, Settings(device="cpu", workers=2), ConfigError, "does not divide among 2 workers"),
        ({"modalities": {"strnog": "mlp"}}, HERE, ConfigError, "did you mean 'strong'"),
        ({"modalities": {"strong": "cnn", "weak": "mlp"}}, HERE, ConfigError, "encoder cnn takes"),
        ({"method": {"name": "aug", "classifiers": {"wek": 2}}}, HERE, ConfigError, "method.classifiers names wek"),
        ({}, Settings(device="gpu"), ConfigError, "choose auto, cpu or cuda"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    corpus: str, changes: dict[str, Any], where: Settings, error: type[Exception], message: str
) -> None:
    content = {**settings(corpus), **changes}
    with pytest.raises(error, match=message):
        preview(resolve(content)[0], where)


def test_a_gpu_that_is_not_there_is_missed_early(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Settings(device="auto").resolved_device == "cpu"
    with pytest.raises(ResourceError, match="no CUDA device; use --device cpu"):
        preview(resolve(settings(corpus))[0], Settings(device="cuda"))


def test_a_cluster_may_have_the_gpus_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert Settings(engine="ray", device="cuda", address="head:6379").resolved_device == "cuda"
    assert Settings(engine="ray", device="auto", address="head:6379").resolved_device == "cpu"
    with pytest.raises(ResourceError, match="no CUDA device"):
        assert Settings(engine="ray", device="cuda").resolved_device


def test_without_a_valid_split_an_epoch_cannot_be_selected_on_it(tmp_path: Path) -> None:
    place = write_corpus(tmp_path / "c", rows={"train": 40, "test": 8})
    with pytest.raises(DataError, match="no valid split to select the epoch on"):
        preview(resolve(settings(place))[0], HERE)
    experiment, provenance = resolve(settings(place, select="last", epochs=2))
    seen = preview(experiment, HERE)
    folder = new_run(seen, provenance, str(tmp_path / "runs"), "r")
    (summary,) = run_jobs([make_job(seen, folder)], HERE, show=False)
    assert summary["selected_epoch"] == 2 and "valid" not in summary and summary["test"]["samples"] == 8


def test_a_run_folder_tells_where_its_numbers_come_from(corpus: str, tmp_path: Path) -> None:
    experiment, provenance = resolve(settings(corpus), ["seed=4"], "my.yaml")
    seen = preview(experiment, HERE)
    folder = new_run(seen, provenance, str(tmp_path), None, ["train", "my.yaml"])
    assert folder.name.startswith("pair-joint-seed4-")
    manifest = folder.manifest
    assert manifest["digest"] == experiment.digest and manifest["data_fingerprint"] == seen.fingerprint
    assert manifest["argv"] == ["train", "my.yaml"] and manifest["versions"]["torch"] and manifest["threads"] == 1
    assert folder.provenance["seed"] == {"value": 4, "origin": "command line"}
    assert resolve(yaml.safe_load(folder.experiment_text))[0].digest == experiment.digest


def interrupted(content: dict[str, Any], root: Path, run_experiment: Callable[..., Any], name: str) -> RunFolder:
    experiment, provenance = resolve(content)
    folder = new_folder(root, experiment, provenance, name)
    with pytest.raises(Interrupted):
        run_experiment(content, folder=folder, stop=lambda: "test")
    return folder


def test_a_changed_experiment_becomes_the_runs_own(
    corpus: str, tmp_path: Path, run_experiment: Callable[..., Any]
) -> None:
    content = settings(corpus)
    folder = interrupted(content, tmp_path, run_experiment, "r")
    with pytest.raises(RefusedError, match=r"say --allow-change optim.lr"):
        reopen(str(tmp_path), "r", None, "r", ["optim.lr=0.2"], [])
    again, experiment, changes = reopen(str(tmp_path), "r", None, "r", ["optim.lr=0.2"], ["optim.lr"])
    assert changes == ["optim.lr: 0.05 -> 0.2"] and experiment.optim.lr == 0.2
    keep_changes(again, experiment, changes)
    _, saved, changes = reopen(str(tmp_path), "r", None, "r", [], [])
    assert saved == experiment and changes == []
    keep_changes(folder, saved, changes)
    assert [entry["changes"] for entry in folder.read_json("changes.json")] == [["optim.lr: 0.05 -> 0.2"]]


def test_a_run_is_not_continued_on_other_data(corpus: str, tmp_path: Path) -> None:
    experiment, provenance = resolve(settings(corpus))
    folder = new_run(preview(experiment, HERE), provenance, str(tmp_path / "runs"), "r")
    check_same_data(folder, preview(experiment, HERE))
    other = write_corpus(tmp_path / "other", rows={"train": 232, "valid": 60, "test": 60})
    moved = preview(resolve(settings(other))[0], HERE)
    with pytest.raises(RefusedError, match="is not the one this run was started with"):
        check_same_data(folder, moved)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_a_wish_to_stop(number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.installed():
        assert stop() is None
        os.kill(os.getpid(), number)
        assert stop() == number.name and stop.exit_code == code
    assert signal.getsignal(number) is before
    assert "stopping after a checkpoint" in capfd.readouterr().err


def test_a_stop_file_interrupts_with_the_code_for_try_again(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, provenance = resolve(settings(corpus))
    seen = preview(experiment, HERE)
    folder = new_run(seen, provenance, str(tmp_path), "r")
    monkeypatch.setattr(RunFolder, "stop_requested", lambda self: "someone asked")
    with pytest.raises(Interrupted, match="someone asked") as caught:
        run_jobs([make_job(seen, folder)], HERE, show=False)
    assert caught.value.exit_code == 75
