"""What has been trained already is not trained again. No test here starts Ray: nothing is left to do for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.conftest import settings

from counterpoise.cli import main
from counterpoise.contracts import ConfigError, DataError
from counterpoise.engine.run import RunFolder
from counterpoise.start import Settings
from counterpoise.sweep import run_sweep
from counterpoise.sweepfile import ask


@pytest.fixture(scope="module")
def done(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, and the experiment file they came from."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "base.yaml").write_text(yaml.safe_dump(settings(corpus, epochs=1)))
    for seed in (0, 1):
        command = ["train", str(folder / "base.yaml"), "--set", f"seed={seed}", "--engine", "local", "--threads", "1"]
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*command, "--runs", str(folder / "runs"), "--name", f"first{seed}", "--metrics-port", "off"])
    return folder


@pytest.fixture
def sweep(done: Path, tmp_path: Path) -> Callable[..., bool]:
    """sweep(reuse=[...]) of the two runs."""
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({"experiment": str(done / "base.yaml"), "seeds": [0, 1]}))

    def call(**more: object) -> bool:
        asked = ask(str(file), None, [], None, None)
        return run_sweep(asked=asked, settings=Settings("ray", 1), runs=str(tmp_path), name="two", **more)  # type: ignore[arg-type]

    return call


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_finished_runs_of_the_same_experiment_are_copied_and_named(
    done: Path, tmp_path: Path, sweep: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "runs", tmp_path / "elsewhere")
    assert sweep(reuse=[str(done / "runs"), str(tmp_path / "elsewhere")])
    shutil.rmtree(tmp_path / "elsewhere")
    saved = json.loads((tmp_path / "two" / "sweep.json").read_text())
    for seed, trial in enumerate(saved["trials"]):
        source = done / "runs" / f"first{seed}"
        assert (trial["state"], trial["reused"]) == ("finished", str(source))
        assert content(tmp_path / "two" / trial["name"]) == content(source)
        assert RunFolder.open(str(tmp_path / "two" / trial["name"])).verify() == []
    out, err = capsys.readouterr()
    assert "2 runs were trained elsewhere and taken over" in out
    assert f"reused      {saved['trials'][0]['name']} from {done / 'runs' / 'first0'}" in err
    assert sweep(resume=True), "nothing is copied again, and a place that is gone is not missed"
    assert "reused" not in capsys.readouterr().err


def test_a_run_that_is_not_the_same_is_not_taken(
    done: Path, tmp_path: Path, sweep: Callable[..., bool], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("counterpoise.launch.cluster.cluster", lambda *a, **b: pytest.fail("a trial is left to do"))
    spoilt = tmp_path / "spoilt"
    shutil.copytree(done / "runs", spoilt)
    (spoilt / "first0" / "predictions.parquet").write_bytes(b"")
    manifest = json.loads((spoilt / "first1" / "run.json").read_text())
    manifest["versions"]["torch"] = "1.0"
    (spoilt / "first1" / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(pytest.fail.Exception, match="left to do"):
        sweep(reuse=[str(spoilt)])
    err = capsys.readouterr().err
    assert f"{spoilt / 'first0'}: predictions.parquet: differs from SHA256SUMS" in err
    assert f"{spoilt / 'first1'}: it has other versions" in err
    assert not list((tmp_path / "two").glob("*seed*"))


def test_a_place_without_runs_and_a_population_are_refused(
    tmp_path: Path, sweep: Callable[..., bool], done: Path
) -> None:
    with pytest.raises(DataError, match=r"nothing to reuse in .*nowhere: it holds no run"):
        sweep(reuse=[str(tmp_path / "nowhere")])
    scheduler = {"name": "pbt", "interval": 1, "mutate": {"optim.lr": {"log_uniform": [0.01, 0.1]}}}
    content = {"experiment": str(done / "base.yaml"), "seeds": [0, 1], "scheduler": scheduler}
    (tmp_path / "pbt.yaml").write_text(yaml.safe_dump(content))
    asked = ask(str(tmp_path / "pbt.yaml"), None, [], None, None)
    with pytest.raises(ConfigError, match="--reuse takes whole runs over"):
        run_sweep(asked=asked, settings=Settings("ray", 1), runs=str(tmp_path), name="pbt", reuse=[str(done)])
