"""counterpoise watch: what it draws, when it ends, and where runs may lie."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from counterpoise import storage, watch
from counterpoise.contracts import DataError
from counterpoise.engine.run import RunFolder, find_runs
from counterpoise.watch import Watched, curve, overview, picture, watch_runs

ROOT = Path(__file__).parents[1]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_run", ROOT / "tests/reports/make_run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_run = _generator().make_run


def drawn(*runs: Path | str, width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    watched = [Watched.of(str(run)) for run in runs]
    for run in watched:
        run.look()
    console.print(picture(watched[0], console, **options) if len(watched) == 1 else overview(watched, console))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_curve_spans_low_to_high() -> None:
    assert curve([0.0, 0.5, 1.0], 0.0, 1.0) == "▁▅█"
    assert curve([0.2, None, float("nan")], 0.2, 0.2) == "▅  ", "what is not there is a gap; one level is the middle"
    assert curve([-1.0, 2.0], 0.0, 1.0) == "▁█"
    assert curve([0.0, 1.0], 0.0, 1.0, bars="_#") == "_#"


def test_a_long_curve_shows_the_end_of_each_stretch() -> None:
    assert curve([0.0, 1.0] * 40, 0.0, 1.0, width=40) == "█" * 40
    assert len(curve([0.5] * 1000, 0.0, 1.0, width=40)) == 40


def test_the_picture_holds_what_the_records_say(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug")
    text = drawn(run)
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "epoch"][-1]
    for name in ("fused", "audio", "visual"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert f"{last['valid']['accuracy'][name]:.3f}  best " in line
    gaps = {record["epoch"]: record["gap"] for record in records if record["kind"] == "epoch"}
    best = min(gaps, key=lambda epoch: gaps[epoch])
    assert f"best {gaps[best]:.3f} in epoch {best}" in text
    score = last["train"]["score"]
    assert f"ratio {score['visual'] / score['audio']:.3f}" in text
    assert "balanced from 0.990 to 1.010" in text and "5 classifiers" in text
    assert "epoch 1  classifier added to visual (2 now): ratio 0.874 < 0.990" in text
    assert "skipped rows: count 2" in text and "3% of it waiting for data" in text
    assert "finished in 20m30s, test accuracy fused" in text


def test_a_run_under_way_says_how_far_it_is_and_how_old_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug", upto=5)
    status = json.loads((run / "status.json").read_text())
    now = status["time"] + 30
    checkpoint = {"time": now - 12, "seconds": 0.25, "step": 420}
    status |= {"step": 460, "checkpoint": checkpoint, "train_s": 46.0, "data_wait_s": 4.6, "samples": 29000}
    (run / "status.json").write_text(json.dumps(status))
    with RunFolder.open(str(run)):  # somebody runs it
        text = drawn(run, now=now)
        silent = drawn(run, now=now + 300)
    assert "running\n" in text and "running, silent for 5m30s" in silent
    assert "epoch 6/30, batch 40/84, loss 0.910, 18% done, " in text and " left\n" in text
    assert "100.0 ms per step, 10% of it waiting for data" in text
    assert "at step 420, written in 0.25 s, 12s ago" in text
    assert "lags behind" in text and "is ahead" in text
    assert "interrupted" in drawn(run), "nobody holds its lock"


def test_why_a_run_failed_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, "joint", upto=2)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "failed", "error": "loss \x1b[2Jis not finite"}))
    text = drawn(run)
    assert "failed: loss ?[2Jis not finite" in text and "\x1b" not in text


def test_a_run_of_one_modality_and_one_without_an_epoch(tmp_path: Path) -> None:
    text = drawn(make_run(tmp_path, "audio", upto=3))
    assert "gap" not in text and "ratio" not in text and "fused" in text
    assert "joint on cremad" in drawn(make_run(tmp_path, "joint", upto=0))


def test_several_runs_are_a_line_each(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "aug"), make_run(tmp_path / "a", "joint"), make_run(tmp_path / "b", "aug", upto=4)]
    lines = drawn(*runs).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["a/cremad-aug-0", "a/cremad-joint-0", "b/cremad-aug-0"]
    assert "30/30" in lines[1] and "4/30" in lines[3] and "2+5" in lines[1]
    assert lines[-1].strip() == "2 finished, 1 interrupted"


def test_runs_are_found_in_folders_comparisons_and_by_name(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "runs", "aug"), make_run(tmp_path / "runs" / "c1", "joint")
    (tmp_path / "runs" / ".metrics").mkdir()
    (tmp_path / "runs" / "report.html").write_text("")
    assert find_runs([str(tmp_path / "runs")]) == [str(one), str(two)]
    assert find_runs([str(two), str(tmp_path / "runs") + "/"]) == [str(two), str(one)]
    with pytest.raises(DataError, match=r"no runs in .*nowhere; name a run folder"):
        watch_runs([str(tmp_path / "nowhere")])


def test_lines_come_as_the_run_goes_on_and_end_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = make_run(tmp_path / "full", "aug", epochs=6, seed=1)
    records = (full / "records.jsonl").read_text().splitlines(keepends=True)
    run = make_run(tmp_path / "live", "aug", epochs=6, upto=2, seed=1)
    lines = (run / "records.jsonl").read_text()
    folder = RunFolder.open(str(run))

    def go_on() -> None:
        with folder, open(run / "records.jsonl", "a") as file:
            for record in records[lines.count("\n") :]:
                time.sleep(0.05)
                file.write(record)
                file.flush()
            folder.write_status({"state": "finished"}, force=True)

    writer = threading.Thread(target=go_on)
    writer.start()
    while not folder.is_locked():
        time.sleep(0.01)
    watch_runs([str(run)], interval_s=0.02)
    writer.join()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("cremad-aug-1: aug on cremad, seed 1, 6 epochs of 84 batches")
    assert [line.split()[1] for line in out if line.startswith("epoch ") and "loss" in line] == [
        f"{n}/6" for n in range(1, 7)
    ]
    assert any("classifier added to visual (2 now)" in line for line in out)
    assert out[-1].startswith("cremad-aug-1 finished in")


def test_a_folder_is_done_when_nothing_has_run_in_it_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLE_S", 1.0)
    monkeypatch.setattr(watch, "FIND_S", 0.05)
    make_run(tmp_path, "aug", epochs=3)
    later = threading.Timer(0.3, make_run, (tmp_path, "joint"), {"epochs": 3})
    later.start()
    watch_runs([str(tmp_path)], interval_s=0.05)
    later.join()
    out = capsys.readouterr().out
    assert "cremad-aug-0 finished" in out
    assert "cremad-joint-0  epoch 3/3" in out, "a run that came later, told apart by its name"


def test_runs_in_object_storage_are_watched(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "aug", epochs=3)
    fs, path = storage.filesystem(f"{bucket}/runs/aug")
    for file in run.iterdir():
        fs.pipe_file(f"{path}/{file.name}", file.read_bytes())
    watch_runs([f"{bucket}/runs"], once=True)
    assert "aug on cremad, seed 0  finished" in capsys.readouterr().out


def test_the_command_prints_once_and_knows_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug", epochs=3)
    command = [sys.executable, "-m", "counterpoise", "watch"]
    done = subprocess.run([*command, str(run), "--once"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy on valid, epochs 1 to 3" in done.stdout and "\x1b" not in done.stdout
    wrong = subprocess.run([*command, str(tmp_path / "x")], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 3 and wrong.stderr.startswith("counterpoise: no runs in ")
