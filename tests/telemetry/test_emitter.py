"""Live metrics: what a scrape says of a run, how Prometheus finds it, and what must never touch the run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.conftest import Run, settings

from counterpoise.contracts import ConfigError, Interrupted
from counterpoise.engine.run import RunFolder
from counterpoise.telemetry import emitter, feed
from counterpoise.telemetry.catalogue import BY_NAME, EVENTS, LIMITS
from counterpoise.telemetry.emitter import Metrics, Options, clean_targets, corpus_name, emitting
from counterpoise.telemetry.feed import Feed, feeding, following

EXPERIMENT = "corpus: /data/corpora/instruments\nmethod: {name: aug}\nseed: 3\nprotocol: null\n"
QUIET = Options(linger_s=0)
START = {"kind": "start", "run": "r", "method": "aug", "corpus": "/data/corpora/instruments", "epochs": 4, "seed": 3}
START |= {"modalities": ["strong", "weak"], "batches": 10, "workers": 1, "device": "cpu", "parameters": 12}


def epoch(number: int, **more: Any) -> dict[str, Any]:
    """Scores 0.6 and 0.3: ratios 2 and 0.5."""
    train = {"loss": 1.5, "losses": {"strong/first": 0.5, "weak/first": 1.0}, "score": {"strong": 0.6, "weak": 0.3}}
    train["accuracy"] = {"fused": 0.7, "strong": 0.65, "weak": 0.4}
    valid = {"loss": 1.75, "accuracy": {"fused": 0.6, "strong": 0.5, "weak": 0.25}, "score": {"strong": 0.5}}
    return {
        "kind": "epoch",
        "epoch": number,
        "lr": 0.1,
        "train": train,
        "valid": valid,
        "gap": 0.25,
        "classifiers": {"strong": 1, "weak": 1},
        "coefficients": {},
        "best_epoch": 1,
        "seconds": 2.0,
    } | more


def decision(number: int, *add: str) -> dict[str, Any]:
    inputs = {"ratios": {"strong": 2.0, "weak": 0.5}, "sigma": 1.0, "tau": 0.01}
    now = {"strong": 1, "weak": 1 + len(add)}
    return {"kind": "decision", "epoch": number, "action": "assign_classifier", "add": list(add), "inputs": inputs,
            "classifiers": now}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "POLL_S", 0.02)


@pytest.fixture
def said() -> list[str]:
    return []


def new_run(root: Path, name: str = "r") -> RunFolder:
    return RunFolder.create(str(root), name, experiment_text=EXPERIMENT, provenance={}, manifest={})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    folder = new_run(tmp_path)
    folder.min_interval_s = 0.0
    with folder:
        yield folder


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


class Scraped(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """Samples by name and labels."""

    def __init__(self, text: str) -> None:
        super().__init__()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name.removeprefix("counterpoise_"), frozenset(sample.labels.items()))
                assert key not in self, f"{key} is there twice"
                self[key] = sample.value

    def value(self, name: str, **labels: str) -> float:
        (found,) = self.having(name, **labels)
        return found

    def having(self, name: str, **labels: str) -> list[float]:
        wanted = labels.items()
        return [value for (n, own), value in self.items() if n == name and wanted <= set(own)]


def url_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metrics     ")]
    return lines[-1].split()[1]


def until(url: str, name: str, wanted: float, **labels: str) -> Scraped:
    """Scrape until a value is what is wanted."""
    end = time.monotonic() + 20
    while True:
        found = Scraped(scrape(url))
        if found.having(name, **labels) == [wanted]:
            return found
        assert time.monotonic() < end, f"{name} is {found.having(name, **labels)}, not {wanted}"
        time.sleep(0.02)


# --- what a scrape says


def test_a_scrape_says_what_the_records_of_a_real_run_say(
    run_experiment: Run, corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import new_folder

    from counterpoise.config import resolve

    content = settings(corpus, method="aug")
    experiment, provenance = resolve(content)
    folder = new_folder(tmp_path, experiment, provenance, "real")
    with emitting(QUIET, str(tmp_path), "real"):
        url = url_of(capsys)
        with following({folder.uri: False}):
            done = run_experiment(content, folder=folder)
        found = Scraped(scrape(url))
    last, summary = done.records("epoch")[-1], done.summary
    for split in ("train", "valid"):
        for name in ("strong", "weak"):
            assert found.value("modality_accuracy", modality=name, split=split) == last[split]["accuracy"][name]
        assert found.value("fused_accuracy", split=split) == last[split]["accuracy"]["fused"]
    assert found.value("accuracy_gap", split="valid") == pytest.approx(last["gap"])
    assert found.value("fused_accuracy", split="test") == summary["test"]["accuracy"]["fused"]
    assert found.value("loss", split="train") == pytest.approx(last["train"]["loss"])
    assert found.value("samples_total") == 3 * 240
    assert found.value("steps_total") == 3 * 8
    assert found.value("step_seconds_total") >= found.value("data_wait_seconds_total") > 0
    assert found.value("progress_ratio") == 1
    assert found.value("run_state", state="finished") == 1
    assert sum(found.having("run_state")) == 1
    assert found.value("run_info", seed="0", workers="1", modalities="strong,weak", run="real", sweep="") == 1
    assert found.value("checkpoint_timestamp_seconds") == pytest.approx(time.time(), abs=300)
    added = [name for record in done.records("decision") for name in record["add"]]
    for name in ("strong", "weak"):
        assert found.value("classifiers", modality=name) == 1 + added.count(name)
        assert found.value("classifiers_added_total", modality=name) == added.count(name)
    assert found.value("decisions_total", action="assign_classifier") == len(done.records("decision"))
    assert {"counterpoise_" + name for name, _ in found} <= set(BY_NAME)


def test_numbers_of_an_epoch_and_a_decision_worked_by_hand(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        url = url_of(capsys)
        run.append(START)
        run.append(epoch(1, coefficients={"modulation/weak": 0.75, "free": 2.0}))
        run.append(decision(1, "weak"))
        found = until(url, "decisions_total", 1)
    assert found.value("score_ratio", modality="strong") == pytest.approx(2.0)
    assert found.value("score_ratio", modality="weak") == pytest.approx(0.5)
    assert found.value("score_ratio_threshold", bound="low") == 0.99
    assert found.value("score_ratio_threshold", bound="high") == 1.01
    assert found.value("classifiers", modality="weak") == 2, "after the decision, before the next epoch"
    assert found.value("classifier_added_epoch", modality="weak") == 1
    assert not found.having("classifier_added_epoch", modality="strong")
    assert found.value("accuracy_gap", split="train") == pytest.approx(0.25)
    assert found.value("loss_term", term="weak/first") == 1.0
    assert found.value("coefficient", coefficient="modulation", modality="weak") == 0.75
    assert found.value("coefficient", coefficient="free", modality="") == 2.0
    assert found.value("fused_accuracy", split="valid", run="r", corpus="instruments", method="aug") == 0.6


def test_counters_are_there_before_anything_is_counted(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        time.sleep(0.2)  # some looks, at a folder that says nothing yet
        found = Scraped(scrape(url_of(capsys)))
    for name in ("steps_total", "samples_total", "data_wait_seconds_total", "worker_restarts_total"):
        assert found.value(name) == 0
    assert [found.value("events_total", event=event) for event in EVENTS] == [0] * len(EVENTS)
    assert found.value("failures_total", error="NonFiniteLossError") == 0
    assert found.value("run_state", state="created") == 1


def test_a_nan_loss_is_counted_as_what_it_is(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        run.append(START)
        run.append({"kind": "event", "event": "failed", "error": "loss is not finite", "type": "NonFiniteLossError"})
        run.write_status({"state": "failed"})
        found = until(url_of(capsys), "run_state", 1, state="failed")
    assert found.value("failures_total", error="NonFiniteLossError") == 1
    assert found.value("failures_total", error="other") == 0


def test_a_resumed_run_goes_on(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.append(START)
    run.append(epoch(1))
    run.append(decision(1, "weak"))
    run.write_status({"state": "interrupted", "step": 12, "samples": 120})
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: True}):
        url = url_of(capsys)
        found = Scraped(scrape(url))
        assert found.value("epoch") == 1 and found.value("classifiers", modality="weak") == 2, "where it stands"
        assert found.value("decisions_total") == 0, "counters count what this process has seen"
        assert found.value("run_state", state="created") == 1, "an interruption of before is over"
        run.append({"kind": "event", "event": "resumed", "epoch": 2})
        run.write_status({"state": "running", "step": 10, "samples": 100})
        until(url, "run_state", 1, state="running")
        run.write_status({"step": 15, "samples": 150})
        found = until(url, "steps_total", 5)
        assert found.value("samples_total") == 50
        assert found.value("worker_restarts_total") == 0, "somebody wanted it resumed"
        run.append({"kind": "event", "event": "resumed", "epoch": 2})  # now a worker died
        run.write_status({"step": 11, "samples": 110, "workers": 2})
        until(url, "worker_restarts_total", 1)
        until(url, "workers", 2)  # that status has been read
        run.write_status({"step": 14, "samples": 140})
        assert until(url, "steps_total", 8).value("samples_total") == 80


def test_the_last_values_can_be_read_after_the_end(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    seen: list[str] = []
    with emitting(Options(), str(tmp_path), "r", warn=said.append):
        url = url_of(capsys)
        with following({run.uri: False}):
            run.append(START)
            until(url, "epochs", 4)
            run.append({"kind": "end", "summary": {"test": {"accuracy": {"fused": 0.5}}}})

        def late() -> None:
            time.sleep(0.3)
            seen.append(scrape(url))

        reader = threading.Thread(target=late)
        reader.start()
        ended = time.monotonic()
    reader.join()
    assert 0.2 < time.monotonic() - ended < emitter.FIRST_WAIT_S / 2, "it waits for one scrape and no longer"
    assert Scraped(seen[0]).value("fused_accuracy", split="test") == 0.5
    assert "waiting up to 20 s" in said[0]
    with pytest.raises(urllib.error.URLError):
        scrape(url)


def test_nobody_waits_if_the_last_values_have_been_read(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    with emitting(Options(), str(tmp_path), "r", warn=said.append):
        url = url_of(capsys)
        with following({run.uri: False}):
            run.append(START)
        assert Scraped(scrape(url)).value("epochs") == 4
    assert not said


def test_nobody_waits_where_nobody_reads(run: RunFolder, tmp_path: Path, said: list[str]) -> None:
    with emitting(Options(), str(tmp_path), "r", warn=said.append), following({run.uri: False}):
        run.append(START)
        ended = time.monotonic()
    assert time.monotonic() - ended < 5 and not said


def test_a_fixed_time_to_linger_ends_by_itself(run: RunFolder, tmp_path: Path, said: list[str]) -> None:
    with emitting(Options(linger_s=0.4), str(tmp_path), "r", warn=said.append):
        ended = time.monotonic()
    assert 0.4 <= time.monotonic() - ended < 5


def test_an_error_of_the_run_passes_through(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), emitting(QUIET, str(tmp_path), "r"):
        raise Interrupted("stopped")


def test_a_run_in_object_storage_is_shown(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"{bucket}/runs"
    folder = RunFolder.create(root, "far", experiment_text=EXPERIMENT, provenance={}, manifest={})
    with emitting(QUIET, root, "far"):
        url = url_of(capsys)
        with folder, following({folder.uri: False}):
            folder.append(START)
            folder.append(epoch(1))
            folder.write_status({"state": "interrupted", "step": 10}, force=True)
        found = Scraped(scrape(url))
    assert found.value("fused_accuracy", run="far", split="valid") == 0.6
    assert found.value("run_state", state="interrupted") == 1 and found.value("steps_total") == 10


def test_labels_are_bounded(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = {f"c{i}": 0.5 for i in range(1000)}
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        url = url_of(capsys)
        run.append(START)
        run.append(epoch(1, coefficients=many))
        first = until(url, "epoch", 1)
        second = Scraped(scrape(url))
    assert len(first.having("coefficient")) == LIMITS["coefficient"]
    assert [s.value("exporter_left_out_total", label="coefficient") for s in (first, second)] == [
        1000 - LIMITS["coefficient"]
    ] * 2, "each is counted once"


def test_every_classifier_has_its_weight_up_to_a_limit(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stacks = {"strong": [1.0], "weak": [1.0, 0.75, *[0.5] * 20]}
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        url = url_of(capsys)
        run.append(START)
        run.append(epoch(1))
        assert not until(url, "epoch", 1).having("classifier_weight"), (
            "a method without, or a run of before there were any"
        )
        run.append(epoch(2, classifier_weights=stacks))
        found = until(url, "epoch", 2)
    shown = [(n, found.value("classifier_weight", modality="weak", classifier=str(n))) for n in (1, 2, 3, 16)]
    assert shown == [(1, 1.0), (2, 0.75), (3, 0.5), (16, 0.5)]
    assert len(found.having("classifier_weight", modality="weak")) == LIMITS["classifier"] == 16
    assert len(found.having("classifier_weight", modality="strong")) == 1
    assert found.value("exporter_left_out_total", label="classifier") == 6


def test_a_record_that_makes_no_sense_is_counted_and_the_next_is_shown(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        run.append(START)
        run.append({"kind": "epoch", "epoch": "three"})
        run.append(epoch(2, classifiers="none", classifier_weights={"weak": 3}, coefficients=None, lr="fast"))
        found = until(url_of(capsys), "epoch", 2)
    assert found.value("exporter_unusable_records_total") == 1
    assert found.value("fused_accuracy", split="valid") == 0.6
    assert not found.having("learning_rate")


def test_names_are_made_fit_for_labels() -> None:
    assert corpus_name("av_digits") == "av_digits"
    assert corpus_name("s3://bucket/corpora/cremad/corpus.yaml") == "cremad"
    assert corpus_name("/data/ave/") == "ave"
    assert len(corpus_name("x" * 500)) == 120
    assert corpus_name("a\nb") == "a?b"


def test_runs_are_named_by_their_place_and_forgotten_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = new_run(tmp_path / "c1", "aug-seed0")
    metrics = Metrics(str(tmp_path))
    metrics.begin(trial.uri, [])
    (labels, info), *_ = metrics.infos()
    assert labels == ("c1/aug-seed0", "instruments", "aug") and info["sweep"] == "c1" and info["seed"] == "3"
    metrics.end(trial.uri)
    assert metrics.samples()["counterpoise_run_state"], "Prometheus may still come for the last values"
    monkeypatch.setattr(emitter, "KEEP_S", -1.0)
    assert not metrics.samples()["counterpoise_run_state"]


# --- how Prometheus finds it


def targets(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text())[0] for file in folder.glob("*.json")]


def test_the_target_is_registered_while_the_run_lives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emitter, "BEAT_S", 0.02)
    folder = tmp_path / "targets"
    with emitting(Options(linger_s=0, folder=str(folder)), str(tmp_path), "a1"):
        url = url_of(capsys)
        (target,) = targets(folder)
        assert target["targets"] == [url.removeprefix("http://").removesuffix("/metrics")]
        visible = {k: v for k, v in target["labels"].items() if not k.startswith("__")}
        assert visible == {"job": "counterpoise", "session": "a1", "host": socket.gethostname()}
        for file in folder.iterdir():
            file.unlink()
        end = time.monotonic() + 10
        while not targets(folder):  # somebody tidied up too much
            assert time.monotonic() < end
            time.sleep(0.02)
    assert list(folder.iterdir()) == []


def test_targets_of_dead_processes_are_removed_and_others_left_alone(tmp_path: Path) -> None:
    def write(name: str, **labels: str) -> None:
        (tmp_path / name).write_text(json.dumps([{"targets": ["127.0.0.1:1"], "labels": labels}]))

    here, me = socket.gethostname(), psutil.Process()
    meta = "__meta_counterpoise_"
    dead = subprocess.Popen(["true"])
    dead.wait()
    write("dead.json", **{"host": here, f"{meta}pid": str(dead.pid), f"{meta}started": "1.0"})
    write("reused.json", **{"host": here, f"{meta}pid": str(me.pid), f"{meta}started": "1.0"})
    write("alive.json", **{"host": here, f"{meta}pid": str(me.pid), f"{meta}started": str(me.create_time())})
    write("elsewhere.json", **{"host": here + "x", f"{meta}pid": str(dead.pid), f"{meta}started": "1.0"})
    write("by-hand.json", job="node")
    (tmp_path / "torn.json").write_text("[{")
    (tmp_path / "notes.txt").write_text("mine")
    assert clean_targets(str(tmp_path)) == ["dead.json", "reused.json"]
    assert {p.name for p in tmp_path.iterdir()} == {
        "alive.json",
        "elsewhere.json",
        "by-hand.json",
        "torn.json",
        "notes.txt",
    }


def test_two_commands_on_one_machine_do_not_collide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    folder = str(tmp_path / "targets")
    first, second = new_run(tmp_path, "first"), new_run(tmp_path, "second")
    with emitting(Options(linger_s=0, folder=folder), str(tmp_path), "first"), following({first.uri: False}):
        one = url_of(capsys)
        port = int(one.split(":")[2].split("/")[0])
        with emitting(Options(linger_s=0, port=port, folder=folder), str(tmp_path), "second", warn=said.append):
            two = url_of(capsys)
            with following({second.uri: False}):
                assert len(targets(tmp_path / "targets")) == 2
                runs = [{dict(labels).get("run") for _, labels in Scraped(scrape(url))} - {None} for url in (one, two)]
    assert runs == [{"first"}, {"second"}]
    assert f"port {port} cannot be had" in said[0] and two != one


@pytest.mark.parametrize("port", ["on", "-1", "65536", "1.5", ""])
def test_a_wrong_port_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="--metrics-port is"):
        Options.parse(port, "127.0.0.1", None, None, "runs")


def test_off_is_off_and_the_folder_lies_with_the_runs(tmp_path: Path) -> None:
    assert Options.parse("off", "127.0.0.1", None, None, "runs") is None
    found = Options.parse("0", "127.0.0.1", None, None, str(tmp_path))
    assert found is not None and found.folder == str(tmp_path / ".metrics")
    remote = Options.parse("0", "127.0.0.1", None, None, "s3://bucket/runs")
    assert remote is not None and remote.folder is None
    with pytest.raises(ConfigError, match="a folder of this machine"):
        Options.parse("0", "127.0.0.1", "s3://bucket/targets", None, "runs")


# --- what must never touch a run


def test_clients_that_hang_are_dropped_and_others_served(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emitter._Handler, "timeout", 0.5)
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        url = url_of(capsys)
        port = int(url.split(":")[2].split("/")[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(emitter.CLIENTS - 2)]
        deaf = socket.create_connection(("127.0.0.1", port))
        deaf.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")  # and never reads
        run.append(START)
        until(url, "epochs", 4)  # meanwhile the run goes on and others are served
        more = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * emitter.CLIENTS)]
        for client in silent:  # in time they are closed from the other side
            client.settimeout(20)
            assert client.recv(1) == b""
        before = threading.active_count()
        until(url, "epochs", 4)
        for client in [*silent, *more, deaf]:
            client.close()
    assert before < 3 * emitter.CLIENTS


def test_an_address_that_cannot_be_had_is_a_warning(tmp_path: Path, said: list[str]) -> None:
    with emitting(Options(address="192.0.2.1"), str(tmp_path), "r", warn=said.append) as opened:
        assert opened is None
    assert "no metrics: cannot listen at 192.0.2.1" in said[0]


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with emitting(Options(linger_s=0, folder=str(tmp_path / "file" / "sd")), str(tmp_path), "r", warn=said.append):
        assert scrape(url_of(capsys))
    assert len(said) == 1 and "Prometheus has to be told" in said[0]


def test_only_metrics_are_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with emitting(QUIET, str(tmp_path), "r"):
        url = url_of(capsys)
        assert url.startswith("http://127.0.0.1:")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(url.replace("/metrics", "/run.json"))


def test_a_sink_that_fails_is_dropped_with_a_warning(run: RunFolder, said: list[str]) -> None:
    class Broken:
        name = "broken"
        calls = 0

        def begin(self, uri: str, records: Any) -> None:
            self.calls += 1
            raise OSError("disk full")

        record = status = end = None  # never reached

    class Counting:
        def __init__(self) -> None:
            self.got: list[str] = []

        def begin(self, uri: str, records: Any) -> None:
            self.got.append("begin")

        def record(self, uri: str, record: dict[str, Any]) -> None:
            self.got.append(record["kind"])

        def status(self, uri: str, state: str, status: Any) -> None: ...

        def end(self, uri: str) -> None:
            self.got.append("left")

    broken, counting = Broken(), Counting()
    with feeding([broken, counting], said.append), following({run.uri: False}):  # type: ignore[list-item]
        run.append(START)
        run.append(epoch(1))
    assert counting.got == ["begin", "start", "epoch", "left"]
    assert broken.calls == 1 and said == ["broken: OSError: disk full; it gets no more, the run goes on"]


def test_a_feed_without_an_answer_does_not_hold_a_run_up(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WAIT_S", 0.2)
    stuck = threading.Event()

    class Stuck:
        def begin(self, uri: str, records: Any) -> None:
            stuck.wait(30)

    began = time.monotonic()
    opened = Feed([Stuck()])  # type: ignore[list-item]
    opened.follow(run.uri)
    opened.leave(run.uri)
    opened.close()
    assert time.monotonic() - began < 5
    stuck.set()


def test_promtool_has_no_objection(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    with emitting(QUIET, str(tmp_path), "r"), following({run.uri: False}):
        url = url_of(capsys)
        run.append(START)
        run.append(epoch(1, coefficients={"modulation/weak": 0.5}))
        run.append(decision(1, "weak"))
        run.write_status({"state": "running", "step": 3, "batches": 10, "epoch": 1, "checkpoint": {"time": 1.0}})
        until(url, "decisions_total", 1)
        text = scrape(url)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_command_shows_metrics_and_leaves_nothing(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    from counterpoise.cli import main

    monkeypatch.setenv("CI", "1")
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(settings(corpus)))
    runs = tmp_path / "runs"
    for name, port in (("with", "0"), ("without", "off")):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(file), "--runs", str(runs), "--name", name, "--metrics-port", port, "--threads", "1"])
        assert ended.value.code == 0
        assert ("metrics     http://127.0.0.1:" in capsys.readouterr().err) == (port == "0")
    assert os.listdir(runs / ".metrics") == []
