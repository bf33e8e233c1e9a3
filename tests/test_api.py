"""The Python API: light to import, equal to the commands, and as docs/python-api.md shows it."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from tests import test_readme
from tests.cases import SMALL
from tests.conftest import Done, new_folder, settings
from tests.test_layers import HEAVY, loaded

import counterpoise
from counterpoise import Interrupted, Run, experiment, formulas, list_methods, load_records, load_run, load_runs, train
from counterpoise.config import resolve
from counterpoise.contracts import ConfigError, DataError, RefusedError
from counterpoise.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/python-api.md").read_text()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not loaded("import counterpoise\nassert 'train' in dir(counterpoise)") & {*HEAVY, "pandas", "pydantic"}


def test_every_name_it_offers_is_there() -> None:
    for name in counterpoise.__all__:
        assert getattr(counterpoise, name) is not None
    assert set(counterpoise._API) | {"__version__"} == set(counterpoise.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        counterpoise.trian  # noqa: B018


def test_training_here_gives_the_numbers_of_the_command(
    corpus: str, run_experiment: Callable[..., Done], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = settings(corpus, method=SMALL["aug"])
    run = train(content, runs=str(tmp_path), name="one", device="cpu", threads=1)
    said = capfd.readouterr()
    assert said.out == said.err == "", "silent"
    other = run_experiment(content)
    assert run.summary is not None and run.state == "finished"
    assert run.summary["test"] == other.summary["test"] and run.summary["digest"] == other.summary["digest"]
    assert load_run(tmp_path / "one") == run == Run(str(tmp_path / "one"))


def test_a_table_of_runs_has_what_they_measured_and_where_they_differ(
    finished: Callable[[str], Done], tmp_path: Path, corpus: str
) -> None:
    aug, joint = finished("aug"), finished("joint")
    waiting, provenance = resolve(settings(corpus, seed=3))
    folder = new_folder(tmp_path / "more", waiting, provenance, "waiting")
    table = load_runs([aug.folder.uri, joint.folder.uri, folder.uri]).set_index("run")
    row = table.loc[aug.folder.name]
    assert row["method"] == "aug" and row["state"] == "finished" and row["split"] == "test" and row["samples"] == 60
    for name, value in aug.summary["test"]["accuracy"].items():
        assert row[f"accuracy/{name}"] == value
    assert row["classifiers/weak"] == aug.summary["classifiers"]["weak"] and row["gap"] == aug.summary["test"]["gap"]
    assert row["valid/accuracy/fused"] == aug.summary["valid"]["accuracy"]["fused"]
    assert pd.isna(table.loc[joint.folder.name, "classifiers/weak"])
    assert table.loc["waiting", "state"] == "created" and pd.isna(table.loc["waiting", "accuracy/fused"])
    assert "method.hidden" in table.columns and "optim.lr" not in table.columns, "only what differs"
    assert list(load_runs(tmp_path)["run"]) == ["waiting"], "two levels deep"
    with pytest.raises(DataError, match="holds no run"):
        load_runs(tmp_path / "more" / "waiting" / "nothing")


def test_records_are_one_row_per_epoch(finished: Callable[[str], Done]) -> None:
    done = finished("aug")
    table = load_records(done.folder.uri)
    assert list(table.index) == [1, 2, 3]
    for record in done.records("epoch"):
        row = table.loc[record["epoch"]]
        assert row["train/loss"] == record["train"]["loss"] and row["gap"] == record["gap"]
        assert row["valid/accuracy/weak"] == record["valid"]["accuracy"]["weak"]
    decided = [record["epoch"] for record in done.records("decision")]
    assert [epoch for epoch, text in table["decision"].items() if isinstance(text, str)] == decided


def test_predictions_are_one_row_per_sample(finished: Callable[[str], Done]) -> None:
    done = finished("aug")
    table = Run(done.folder.uri).predictions()
    right = (table["label"] == table["prediction"]).mean()
    assert len(table) == 60 and right == pytest.approx(done.summary["test"]["accuracy"]["fused"])
    assert len(table["logits_weak"][0]) == 4


def test_an_interrupt_leaves_a_run_that_can_be_resumed_to_the_same_numbers(corpus: str, tmp_path: Path) -> None:
    content = settings(corpus, method=SMALL["aug"], epochs=8)
    whole = train(content, runs=str(tmp_path), name="whole", device="cpu", threads=1)
    from counterpoise.engine import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CONTROL_INTERVAL_S", 0.0)
        save = loop.Trainer._save
        pressed: list[int] = []

        def press(self: loop.Trainer) -> None:
            save(self)
            if not pressed:
                pressed.append(os.getpid())
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(loop.Trainer, "_save", press)
        with pytest.raises(Interrupted, match="continue with --resume"):
            train(content, runs=str(tmp_path), name="cut", device="cpu", threads=1)
    assert load_run(tmp_path / "cut").state == "interrupted"
    with pytest.raises(RefusedError, match=r"exists in .* continue it with --resume"):
        train(content, runs=str(tmp_path), name="cut", device="cpu", threads=1)
    again = train(content, runs=str(tmp_path), name="cut", resume=True, device="cpu", threads=1)
    assert again.summary is not None and whole.summary is not None
    assert again.summary["test"] == whole.summary["test"]
    with pytest.raises(ConfigError, match="needs the name"):
        train(content, resume=True)


def test_experiments_are_resolved_as_the_command_does(corpus: str) -> None:
    made = experiment(settings(corpus), sets=["optim.lr=0.5"])
    assert made.optim.lr == 0.5 and experiment(made) == made and experiment(made, ["seed=4"]).seed == 4
    with pytest.raises(ConfigError, match=r"optim.lrr: unknown key, did you mean 'lr'"):
        experiment(settings(corpus), sets=["optim.lrr=1"])
    with pytest.raises(ConfigError, match=r"no experiment file 'nothing.yaml'"):
        experiment("nothing.yaml")


def test_methods_tell_their_formulas() -> None:
    assert "k_m" in formulas("ogm_ge") and "Settings, under method" in formulas("ogm_ge")
    assert list(list_methods().index) == list(METHODS)
    with pytest.raises(ConfigError, match="did you mean 'aug'"):
        formulas("augg")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a small av_digits, and the files of the repository that the guide names."""
    import yaml

    from counterpoise.data.recipes import prepare

    monkeypatch.setenv("COUNTERPOISE_HOME", str(tmp_path / "home"))
    place = prepare("av_digits", None, lambda *_: None, train=120, valid=20, test=30)
    assert yaml.safe_load(Path(place, "corpus.yaml").read_text())["name"] == "av_digits"
    (tmp_path / "trainables").symlink_to(ROOT / "trainables")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_runs_as_it_stands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        exec(compile(block, "docs/python-api.md", "exec"), names)
    said = capsys.readouterr().out
    assert "finished" in said and "joint-0" in said and "NeurIPS" in said and "('visual',)" in said
    assert (home / "exported" / "model.safetensors").exists()


@pytest.mark.parametrize("page", ["inference", "trackers", "python-api"])
def test_every_command_of_the_pages_exists(page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if "counterpoise" in words:
            test_readme.test_every_command_and_option_exists(words[words.index("counterpoise") + 1 :])
