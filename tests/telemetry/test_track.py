"""What trackers have been told is read back from what they wrote."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cases import SMALL
from tests.conftest import SECRET, Done, Run, new_folder, settings

from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, Interrupted, ResourceError
from counterpoise.telemetry import track
from counterpoise.telemetry.track import chosen, epoch_numbers, summary_numbers, tracking

installed = {name: all(importlib.util.find_spec(m) for m in needs) for name, (_, needs) in track.TRACKERS.items()}


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed[name], reason=f"{name} is not installed (uv sync --extra track)")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "COUNTERPOISE_TENSORBOARD", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", f"local-{SECRET}-{'0' * 40}")
    monkeypatch.setattr(track, "LOCAL_POLL_S", 0.05)


@pytest.fixture
def tracked(run_experiment: Run, corpus: str, tmp_path: Path) -> Callable[..., Done]:
    """tracked(names, stop_after=None): a run of AUG in tmp_path, watched; with stop_after it is stopped and resumed."""

    def run(names: list[str], stop_after: int | None = None) -> Done:
        content = settings(corpus, method=SMALL["aug"])
        experiment, provenance = resolve(content)
        folder = new_folder(tmp_path, experiment, provenance, "one")
        if stop_after is not None:
            asked = iter([None] * stop_after + ["test"] * 999)
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted), tracking([folder.uri], names):
                patch.setattr("counterpoise.engine.loop.CONTROL_INTERVAL_S", 0.0)
                run_experiment(content, folder=folder, stop=lambda: next(asked))
        with tracking([folder.uri], names):
            return run_experiment(content, folder=folder, resume=stop_after is not None)

    return run


def expected(done: Done) -> dict[str, list[tuple[int, float]]]:
    """Every series that a tracker should have, by name: (epoch, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in done.records("epoch"):
        for name, value in epoch_numbers(record).items():
            found.setdefault(name, []).append((record["epoch"], value))
    for name, value in summary_numbers(done.summary).items():
        found.setdefault(name, []).append((done.summary["epochs"], value))
    return found


def written(folder: Path) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_the_numbers_of_an_epoch_have_names_that_sort_well() -> None:
    record = {
        "lr": 0.1, "gap": 0.25, "seconds": 2.0, "samples_per_s": None,
        "train": {"loss": 1.5, "losses": {"fused": 1.5}, "accuracy": {"fused": 0.5, "audio": 0.25}},
        "valid": None, "classifiers": {"audio": 2}, "classifier_weights": {"audio": [1.0, 0.5]},
        "coefficients": {"modulation/audio": 0.75}, "best_epoch": 1,
    }  # fmt: skip
    assert epoch_numbers(record) == {
        "lr": 0.1, "gap": 0.25, "seconds": 2.0, "train/loss": 1.5, "train/losses/fused": 1.5,
        "train/accuracy/fused": 0.5, "train/accuracy/audio": 0.25, "classifiers/audio": 2.0,
        "classifier_weights/audio/1": 1.0, "classifier_weights/audio/2": 0.5, "coefficients/modulation/audio": 0.75,
    }  # fmt: skip


@needs("tensorboard")
@pytest.mark.parametrize("stop_after", [None, 9])
def test_tensorboard_has_every_number_of_every_epoch_once(
    tracked: Callable[..., Done], tmp_path: Path, stop_after: int | None
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = tracked(["tensorboard"], stop_after)
    found = EventAccumulator(str(tmp_path / "tensorboard" / "one"))
    found.Reload()
    wanted = expected(done)
    assert set(found.Tags()["scalars"]) == set(wanted)
    for name, series in wanted.items():
        said = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in said] == [epoch for epoch, _ in series]
        assert [value for _, value in said] == pytest.approx([value for _, value in series], rel=1e-6)
    decisions = found.Tensors("decision/text_summary")
    assert len(decisions) == len(done.records("decision"))
    settings_text = found.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| method.name | aug |" in settings_text and done.folder.uri in settings_text
    assert done.folder.verify() == []
    assert SECRET.encode() not in written(tmp_path)


@needs("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stop_after", [None, 9])
def test_mlflow_has_one_run_with_every_number(
    tracked: Callable[..., Done], tmp_path: Path, stop_after: int | None
) -> None:
    from mlflow.tracking import MlflowClient

    done = tracked(["mlflow"], stop_after)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("counterpoise")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    assert run.data.params["method.name"] == "aug" and run.data.tags["counterpoise.folder"] == done.folder.uri
    notes = [text for key, text in run.data.tags.items() if key.startswith("note.")]
    assert sum(text.startswith("decision: ") for text in notes) == len(done.records("decision"))
    for name, series in expected(done).items():
        said = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert [step for step, _ in sorted(said)] == [epoch for epoch, _ in series], name
        assert [value for _, value in sorted(said)] == pytest.approx([value for _, value in series]), name
    assert SECRET.encode() not in written(tmp_path)


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_that_can_be_synced_later(tracked: Callable[..., Done], tmp_path: Path) -> None:
    done = tracked(["wandb"])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    data = file.read_bytes()
    assert done.folder.manifest["id"] in file.name
    for name in ("train/loss", "valid/accuracy/fused", "test/accuracy/weak", "classifiers/weak"):
        assert name.encode() in data, name
    assert repr(done.summary["test"]["accuracy"]["fused"]).encode() in data
    assert SECRET.encode() not in written(tmp_path)


class Broken:
    """Fails at the second epoch."""

    def __init__(self, run: track.Subject, last_epoch: int) -> None:
        assert last_epoch == 0

    def numbers(self, epoch: int, values: dict[str, float]) -> None:
        if epoch == 2:
            raise ConnectionError("https://me:hunter2@tracker.example is gone")

    def note(self, epoch: int, kind: str, text: str) -> None: ...

    def close(self, state: str) -> None:
        raise AssertionError("what has failed is left alone")


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(
    tracked: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(track.TRACKERS, "broken", (Broken, ()))
    done = tracked(["broken"])
    said = capsys.readouterr().err
    assert done.summary["epochs"] == 3 and done.folder.state() == "finished"
    assert said.count("warning: broken failed and is told nothing more") == 1 and "hunter2" not in said
    assert json.loads((Path(done.folder.uri) / "trackers.json").read_text())["broken"]["epoch"] == 1


def test_an_unknown_tracker_and_one_that_is_not_installed_are_errors_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"no tracker 'wandbb', did you mean 'wandb'\?; known: tensorboard, mlflow"):
        chosen(["wandbb"])
    monkeypatch.setitem(track.TRACKERS, "mlflow", (Broken, ("no_such_package",)))
    with pytest.raises(ResourceError, match=r"--track mlflow needs no_such_package; .* `uv sync --extra track`"):
        chosen(["tensorboard,mlflow"] if installed["tensorboard"] else ["mlflow"])


def test_names_may_come_in_one_word_or_several() -> None:
    names = [name for name, there in installed.items() if there]
    assert chosen([",".join(names)]) == chosen(names) == chosen([" ".join(names), *names]) == tuple(names)


def test_trackers_in_the_experiment_change_no_digest(corpus: str) -> None:
    plain, _ = resolve(settings(corpus))
    told, _ = resolve(settings(corpus, track=["tensorboard"]))
    assert told.track == ("tensorboard",) and told.digest == plain.digest and told.group == plain.group
    with pytest.raises(ConfigError, match="track"):
        resolve(settings(corpus, track=["paper"]))
