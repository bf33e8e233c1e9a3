"""`counterpoise report` on sweeps, comparisons and runs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Run, settings
from typer.testing import CliRunner

from counterpoise.cli import app
from counterpoise.contracts import ConfigError, DataError
from counterpoise.engine.features import encode_run
from counterpoise.report import check_formats, on_plane, read_sources, write
from counterpoise.reports.spec import TsneSpec

Make = Callable[..., Path]


@pytest.fixture
def make_run() -> Make:
    import importlib.util

    place = Path(__file__).parent / "reports" / "make_run.py"
    spec = importlib.util.spec_from_file_location("make_run_again", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Make = module.make_run
    return made


def write_sweep(root: Path, trials: Mapping[str, tuple[str, int]], report: Mapping[str, Any], **more: Any) -> str:
    """sweep.json beside its runs. trials: {name of the run: (method, seed)}."""
    entries = [{"name": n, "vary": {"method": m}, "seed": s, "state": "finished"} for n, (m, s) in trials.items()]
    content = {"title": "Gaps", "report": dict(report), "trials": entries, **more}
    (root / "sweep.json").write_text(json.dumps(content))
    return str(root)


@pytest.fixture
def sweep(tmp_path: Path, make_run: Make) -> str:
    root, trials = tmp_path / "sweep", {}
    for method in ("joint", "aug"):
        for seed in (0, 1):
            trials[make_run(root, method, seed=seed, epochs=3).name] = (method, seed)
    return write_sweep(root, trials, {"kind": "gap", "rows": {"aug": "AUG"}})


def test_a_sweep_is_reported_as_it_asks(sweep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "page.html"
    paths = write([sweep], formats=["html", "md", "latex", "csv"], out=str(out), pictures=str(tmp_path / "pictures"))
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split() == ["method", "Multi", "Audio", "Visual", "n", "vs", "joint", "p"]
    assert [Path(p).name for p in paths[:5]] == ["page.html", "page.md", "page.tex", "page.csv", "gap.png"]
    page = out.read_text()
    assert "<h1>Gaps</h1>" in page and page.index("<h2>Gap between") < page.index("<h2>Accuracy of each modality")
    markdown = out.with_suffix(".md").read_text()
    assert markdown.startswith("# Gaps\n") and "](../pictures/gap.png)" in markdown and "## Leaderboard" in markdown
    assert r"\includegraphics[width=\linewidth]{../pictures/gap.pdf}" in out.with_suffix(".tex").read_text()
    rows = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    assert [(row["method"], row["n"]) for row in rows] == [("joint", "2"), ("aug", "2")]
    assert rows[1]["published_accuracy_fused"] == "0.8441"


def test_trials_without_a_run_and_stopped_ones_are_named(tmp_path: Path, make_run: Make) -> None:
    root = tmp_path / "sweep"
    name = make_run(root, "aug", epochs=3).name
    stopped = make_run(root, "aug", seed=1, epochs=3).name
    write_sweep(root, {name: ("aug", 0), stopped: ("aug", 1), "late-seed0": ("late", 0)}, {})
    content = json.loads((root / "sweep.json").read_text())
    content["trials"][1]["state"] = "stopped"
    content["trials"][2] |= {"state": "failed", "error": "out of memory"}
    (root / "sweep.json").write_text(json.dumps(content))
    source = read_sources([str(root)])[0]
    assert {label: [run.state for run in runs] for label, runs in source.groups["cremad"].items()} == {
        "aug": ["finished", "stopped"], "late": ["failed"],
    }  # fmt: skip
    notes = " ".join(str(run.status.get("error")) for run in source.runs)
    assert "out of memory" in notes


def test_names_in_a_sweep_are_no_paths(tmp_path: Path, make_run: Make) -> None:
    outside = make_run(tmp_path, "joint", epochs=2)
    root = tmp_path / "sweep"
    inside = make_run(root, "aug", epochs=2)
    write_sweep(root, {inside.name: ("aug", 0), f"../{outside.name}": ("joint", 0)}, {})
    runs = {run.method: run for run in read_sources([str(root)])[0].runs}
    assert runs["aug"].finished and "joint" not in runs


def test_a_wrong_report_names_the_file(sweep: str) -> None:
    write_sweep(Path(sweep), {"cremad-aug-0": ("aug", 0)}, {"kind": "gaps"})
    with pytest.raises(ConfigError, match=r"sweep.json: report.kind: unknown kind 'gaps', did you mean 'gap'\?"):
        read_sources([sweep])
    (Path(sweep) / "sweep.json").write_text("{")
    with pytest.raises(DataError, match=r"sweep\.json is damaged"):
        read_sources([sweep])


def test_sweeps_of_one_kind_on_two_corpora_share_a_table(tmp_path: Path, make_run: Make) -> None:
    places = []
    for corpus in ("cremad", "digits"):
        root = tmp_path / corpus
        places.append(write_sweep(root, {make_run(root, "aug", epochs=2, corpus=corpus).name: ("aug", 0)}, {}))
    other = tmp_path / "other"
    write_sweep(other, {make_run(other, "aug", epochs=2, corpus="third").name: ("aug", 0)}, {"metrics": ["map"]})
    sources = read_sources([*places, str(other)])
    assert [list(source.groups) for source in sources] == [["cremad", "digits"], ["third"]]


def test_a_comparison_keeps_its_labels(tmp_path: Path, make_run: Make) -> None:
    root = tmp_path / "c1"
    names = [make_run(root, "aug", seed=seed, epochs=2).name for seed in (0, 1)]
    result = {"reference": "aug:lam=0.2", "methods": [{"label": "aug:lam=0.2", "runs": names, "failed": {}}]}
    (root / "comparison.json").write_text(json.dumps({"result": result}))
    (source,) = read_sources([str(root)])
    assert list(source.groups["cremad"]) == ["aug:lam=0.2"] and len(source.runs) == 2
    (root / "comparison.json").write_text(json.dumps({"result": None}))
    assert list(read_sources([str(root)])[0].groups["cremad"]) == ["aug"], "without a result they are runs"


def test_published_numbers_can_be_chosen(sweep: str) -> None:
    assert read_sources([sweep], ["pmr"])[0].spec.published == ("pmr",)
    assert read_sources([sweep])[0].spec.published is None


def test_formats_by_name_and_by_ending() -> None:
    assert check_formats(None, None) == check_formats(None, "x.html") == ["html"]
    assert check_formats(None, "table.tex") == ["latex"] and check_formats("MD, csv,md", None) == ["md", "csv"]
    with pytest.raises(ConfigError, match=r"--format 'latx', did you mean 'latex'\?; choose html, md, latex, csv"):
        check_formats("latx", None)


def test_the_command(sweep: str, tmp_path: Path) -> None:
    out = tmp_path / "t.tex"
    done = CliRunner().invoke(app, ["report", sweep, "--out", str(out), "--published", "none"])
    assert done.exit_code == 0 and "0.8441" not in out.read_text() and r"\toprule" in out.read_text()


# --- what needs the network again


@pytest.fixture(scope="module")
def trained(corpus: str, run_experiment: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two finished runs."""
    root, trials = tmp_path_factory.mktemp("sweeps") / "tiny", {}
    for method in ("joint", "aug"):
        done = run_experiment(settings(corpus, method=method, epochs=2))
        shutil.copytree(done.folder.uri, root / done.folder.name)
        trials[done.folder.name] = (method, 0)
    write_sweep(root, trials, {"kind": "missing", "rates": [0.5]})
    return root


def test_missing_modalities_are_evaluated_once(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write([str(trained)], formats=["csv"], out=str(tmp_path / "m.csv"))
    first = capsys.readouterr()
    assert first.err.count("with missing modalities") == 2
    rows = list(csv.DictReader(io.StringIO((tmp_path / "m.csv").read_text())))
    folder = next(p for p in trained.iterdir() if p.is_dir())
    saved = json.loads((folder / "evaluation-test.json").read_text())
    row = next(row for row in rows if row["runs"] == folder.name)
    assert float(row["without/strong"]) == saved["missing"]["strong"]["accuracy"]
    assert float(row["missing/0.5"]) == saved["missing_rates"]["0.5"]["accuracy"]
    assert float(row["fused"]) == saved["accuracy"]["fused"]
    write([str(trained)], formats=["csv"], out=str(tmp_path / "again.csv"))
    assert "with missing" not in capsys.readouterr().err
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "m.csv").read_bytes()


def test_features_are_of_the_same_samples_in_every_run(trained: Path) -> None:
    one, two = (encode_run(str(p), "test", 9, 3) for p in sorted(trained.iterdir()) if p.is_dir())
    assert (one.labels == two.labels).all() and len(one.labels) == 9
    assert set(one.features) == {"strong", "weak"} and not np.allclose(one.features["strong"], two.features["strong"])
    again = encode_run(str(next(p for p in sorted(trained.iterdir()) if p.is_dir())), "test", 9, 3)
    assert all((again.features[name] == one.features[name]).all() for name in one.features)


def test_features_come_to_the_plane_and_a_run_without_weights_is_named(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained, root)
    content = json.loads((root / "sweep.json").read_text())
    content["report"] = {"kind": "tsne", "points": 12}
    (root / "sweep.json").write_text(json.dumps(content))
    lost = content["trials"][0]["name"]
    for folder in ("best", "checkpoints"):
        shutil.rmtree(root / lost / folder)
    page = Path(write([str(root)], out=str(tmp_path / "t.html"))[0]).read_text()
    assert "aug: Strong" in page and "aug: Weak" in page and "joint: Strong" not in page
    assert f"{lost}: no picture of its features" in page


def test_the_plane_is_the_same_every_time() -> None:
    features = np.random.default_rng(0).normal(size=(25, 4)).astype(np.float32)
    spec = TsneSpec(kind="tsne", points=25)
    first, second = on_plane(features, spec), on_plane(features, spec)
    assert first.shape == (25, 2) and (first == second).all()
