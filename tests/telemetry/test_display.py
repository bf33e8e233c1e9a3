from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from counterpoise.telemetry.display import (
    Tail,
    decision_line,
    end_line,
    epoch_header,
    epoch_line,
    event_line,
    follow,
    start_line,
)
from counterpoise.wording import duration

ROOT = Path(__file__).parents[2]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_run", ROOT / "tests/reports/make_run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_run = _generator().make_run

EPOCH: dict[str, Any] = {
    "seq": 5, "time": 100.0, "kind": "epoch", "epoch": 5, "train": {"loss": 1.2344, "accuracy": {"fused": 0.9}},
    "valid": {"loss": 1.5, "accuracy": {"fused": 0.612, "audio": 0.5714, "visual": 0.3125}}, "gap": 0.2589,
    "classifiers": {"audio": 1, "visual": 3}, "seconds": 3.0,
}  # fmt: skip
DECISION: dict[str, Any] = {
    "kind": "decision", "epoch": 5, "action": "assign_classifier", "add": ["visual"],
    "inputs": {"ratios": {"audio": 1.613, "visual": 0.62}, "sigma": 1.0, "tau": 0.01},
    "classifiers": {"audio": 1, "visual": 3},
}  # fmt: skip


def shown(*runs: Path | str, **options: Any) -> str:
    out, stop = io.StringIO(), threading.Event()
    stop.set()
    options = {"interactive": False, "stop": stop, "resuming": False, **options}
    follow([str(run) for run in runs], console=Console(file=out, width=100), **options)
    return out.getvalue()


def test_the_stage_is_named_where_a_run_has_several() -> None:
    record = {**EPOCH, "stage": "fusion"}
    stages = ["unimodal", "fusion"]
    assert "  stage fusion  loss" in epoch_line(record, epochs=30, stages=stages)
    assert "stage" not in epoch_line({**EPOCH, "stage": "train"}, epochs=30, stages=["train"])
    header = epoch_header(record, epochs=30, stages=stages)
    line = epoch_line(record, epochs=30, stages=stages, left_s=75, labels=False)
    assert header.index("loss") + len("loss") == line.index("1.234") + len("1.234")


def test_a_decision_about_weights_names_them() -> None:
    record = {"epoch": 9, "action": "blend_weights", "inputs": {"weights": {"audio": 0.25, "fused": 0.75}}}
    assert decision_line(record) == "epoch 9  blend weights: audio 0.250, fused 0.750"


def test_epoch_line() -> None:
    line = epoch_line(EPOCH, epochs=30, left_s=75)
    assert line == (
        "epoch  5/30  loss 1.234  fused 0.612  audio 0.571  visual 0.312  gap 0.259  classifiers 1+3  left  1m15s"
    )


def test_epoch_line_stands_below_its_header() -> None:
    header = epoch_header(EPOCH, epochs=30)
    line = epoch_line(EPOCH, epochs=30, left_s=75, labels=False)
    assert header == "epoch   loss  fused  audio  visual    gap  classifiers    left"
    assert line == " 5/30  1.234  0.612  0.571   0.312  0.259          1+3   1m15s"


def test_epoch_line_of_one_modality_has_no_gap() -> None:
    record = {"epoch": 2, "train": {"loss": 1.0, "accuracy": {"fused": 0.5, "audio": 0.5}}, "valid": None, "gap": 0.0}
    assert epoch_line(record, epochs=9) == "epoch 2/9  loss 1.000  fused 0.500"


def test_epoch_line_of_an_empty_record() -> None:
    assert epoch_line({}) == "epoch ?  loss -  fused -"


def test_decision_line() -> None:
    assert decision_line(DECISION) == "epoch 5  classifier added to visual (3 now): ratio 0.620 < 0.990"


def test_decision_line_without_inputs_or_modalities() -> None:
    assert decision_line({"epoch": 3, "action": "next_stage"}) == "epoch 3  next stage"
    assert decision_line(
        {"epoch": 3, "action": "assign_classifier", "add": [], "inputs": {"ratios": {"a": 1, "b": 1}}}
    ) == ("epoch 3  no classifier added: ratio of a 1.000, ratio of b 1.000")
    assert decision_line({"epoch": 3, "add": ["text"]}) == "epoch 3  classifier added to text"


def test_decision_line_for_two_modalities_at_once() -> None:
    inputs = {"ratios": {"a": 2.4, "b": 0.75, "c": 0.4444}, "threshold_low": 0.8}
    record = {"epoch": 3, "add": ["b", "c"], "inputs": inputs, "classifiers": {"a": 1, "b": 2, "c": 4}}
    assert decision_line(record) == (
        "epoch 3  classifier added to b (2 now), c (4 now): ratio of b 0.750 < 0.800, ratio of c 0.444 < 0.800"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (8.2, "8.2s"), (59.6, "1m00s"), (182, "3m02s"), (3599.7, "1h00m"), (200_000, "2d07h")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_other_lines() -> None:
    start = {"run": "a", "method": "aug", "corpus": "cremad", "seed": 0, "epochs": 1, "batches": 4, "workers": 2}
    assert start_line({**start, "device": "cpu"}) == "a: aug on cremad, seed 0, 1 epoch of 4 batches, 2 workers on cpu"
    assert start_line({"method": "aug", "corpus": "cremad"}, "b") == "b: aug on cremad"
    assert end_line("a", "failed") == "a failed"
    assert (
        end_line("a", "finished", {"train": {"accuracy": {"fused": 0.5}}}) == "a finished, train accuracy fused 0.500"
    )
    assert event_line({"kind": "event", "event": "skipped_rows", "seq": 1, "count": 2}) == "skipped rows: count 2"


def test_plain_output(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug", epochs=4)
    assert shown(run).splitlines() == [
        "cremad-aug-0: aug on cremad, seed 0, 4 epochs of 84 batches, 2 workers on cuda",
        "epoch 1/4  loss 1.935  fused 0.219  audio 0.237  visual 0.207  gap 0.030  classifiers 1+1  left  2m03s",
        "epoch 1  classifier added to visual (2 now): ratio 0.874 < 0.990",
        "epoch 2/4  loss 1.731  fused 0.315  audio 0.322  visual 0.240  gap 0.082  classifiers 1+2  left  1m22s",
        "epoch 3/4  loss 1.533  fused 0.388  audio 0.375  visual 0.293  gap 0.083  classifiers 1+2  left    41s",
        "epoch 3  classifier added to visual (3 now): ratio 0.780 < 0.990",
        "epoch 4/4  loss 1.379  fused 0.444  audio 0.415  visual 0.341  gap 0.074  classifiers 1+3  left     0s",
        "skipped rows: count 2",
        "cremad-aug-0 finished in 2m44s, test accuracy fused 0.434  audio 0.405  visual 0.331  gap 0.074, "
        "epoch 4 selected",
    ]


def test_fast_epochs_are_thinned_but_no_decision_is_lost(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug", epochs=30, epoch_s=0.25)
    lines = shown(run).splitlines()
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert sum(": ratio" in line for line in lines) == sum(r["kind"] == "decision" for r in records)
    assert sum(line.startswith("epoch") and "loss" in line for line in lines) < 20
    assert any(line.startswith("epoch 30/30") for line in lines)


def test_plain_output_has_no_control_characters(tmp_path: Path) -> None:
    text = shown(make_run(tmp_path, "joint", epochs=3, name="bad\x1b[2J\rname"))
    assert text.replace("\n", "").isprintable()


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    assert "[red]x[/red] finished" in shown(make_run(tmp_path, "joint", epochs=2, name="[red]x[/red]"))


def test_half_written_and_absent_files_do_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path, "aug", epochs=9, upto=3)
    whole = (run / "records.jsonl").read_bytes()
    (run / "records.jsonl").write_bytes(whole[:-30] + b"\n\xff\xfe{]\n[1]\n" + b'{"kind": "epoch", "ep')
    (run / "status.json").write_text('{"state": "runn')
    assert "epoch 3/9" in shown(run)
    assert shown(tmp_path / "nowhere") == ""


def test_records_that_make_no_sense_do_no_harm(tmp_path: Path) -> None:
    run = tmp_path / "odd"
    run.mkdir()
    odd = [
        {"kind": "epoch", "epoch": "x", "train": 3, "valid": [], "gap": None, "time": "now"},
        {"kind": "decision", "add": None, "inputs": 7},
        {"kind": "decision", "add": 4, "inputs": {"ratios": {"a": "b"}, "sigma": 1}},
        {"kind": "start", "modalities": None, "epochs": None},
        {"kind": None},
        {"kind": "end", "summary": 4},
    ]
    (run / "records.jsonl").write_text("".join(json.dumps({"seq": i, **r}) + "\n" for i, r in enumerate(odd)))
    (run / "status.json").write_text(json.dumps({"state": 3, "epoch": "one", "eta_s": "soon"}))
    shown(run)
    shown(run, interactive=True)


def test_tail_reads_a_line_once_it_is_whole(tmp_path: Path) -> None:
    tail = Tail(str(tmp_path))
    assert tail.poll() == []
    file = tmp_path / "records.jsonl"
    file.write_bytes(b'{"seq": 0, "kind": "ev')
    assert tail.poll() == []
    file.write_bytes(b'{"seq": 0, "kind": "event"}\n{"seq": 1')
    assert [r["seq"] for r in tail.poll()] == [0]


def test_tail_survives_a_file_that_is_cut_back(tmp_path: Path) -> None:
    tail, file = Tail(str(tmp_path)), tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps({"seq": i, "time": i, "kind": "epoch", "epoch": i}) + "\n" for i in range(4)))
    assert len(tail.poll()) == 4
    lines = file.read_text().splitlines(keepends=True)[:2]
    file.write_text("".join(lines))
    assert tail.poll() == []
    file.write_text("".join([*lines, '{"seq": 2, "time": 9, "kind": "epoch", "epoch": 2}\n']))
    assert [r["time"] for r in tail.poll()] == [9]


def test_runs_are_followed_one_after_the_other_until_all_have_ended(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "joint", epochs=2), make_run(tmp_path, "aug", epochs=2)
    text = shown(first, second, stop=threading.Event(), poll_s=0.01)
    assert text.index("cremad-joint-0 finished") < text.index("cremad-aug-0: aug")
    assert "cremad-aug-0 finished" in text


def test_a_failed_run_ends_the_wait(tmp_path: Path) -> None:
    run = make_run(tmp_path, "joint", epochs=5, upto=2)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    assert shown(run, stop=threading.Event(), poll_s=0.01).endswith("cremad-joint-0 failed\n")


@pytest.mark.parametrize("resuming", [None, True])
def test_a_resumed_run_shows_only_what_is_new(tmp_path: Path, resuming: bool | None) -> None:
    run = make_run(tmp_path, "joint", epochs=5, upto=2)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    out, stop = io.StringIO(), threading.Event()
    console = Console(file=out, width=100)
    thread = threading.Thread(
        target=follow,
        args=([str(run)],),
        kwargs={"stop": stop, "console": console, "resuming": resuming, "poll_s": 0.01},
    )
    thread.start()
    threading.Event().wait(1.0)  # until it has looked once, on a busy machine too
    make_run(tmp_path, "joint", epochs=5)
    thread.join(timeout=10)
    assert not thread.is_alive()
    text = out.getvalue()
    assert "epoch 2/5" not in text and "epoch 3/5" in text and "finished" in text


def test_the_bar_on_a_pseudo_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    make_run(tmp_path, "aug", epochs=4)
    code = (
        "import sys, threading; from counterpoise.telemetry.display import follow\n"
        "follow(sys.argv[1:], stop=threading.Event(), poll_s=0.05)"
    )
    outer, inner = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "90", "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "cremad-aug-0")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inner, env=env)
    os.close(inner)
    seen = b""
    while True:
        try:
            part = os.read(outer, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(outer)
    assert process.stdout is not None
    with process.stdout as stdout:
        assert stdout.read() == b""
    assert process.wait(timeout=20) == 0
    text = seen.decode()
    assert "classifier added to visual (2 now): ratio 0.874 < 0.990" in text
    assert "epoch   loss  fused" in text and "\x1b[" in text and "finished" in text


@pytest.mark.parametrize("name", ["CI", "TERM"])
def test_no_bar_in_ci_and_on_dumb_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, {"CI": "true", "TERM": "dumb"}[name])
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    run = make_run(tmp_path, "joint", epochs=2)
    follow([str(run)], stop=threading.Event(), console=Console(file=out, width=100), poll_s=0.01)
    assert "\x1b" not in out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
