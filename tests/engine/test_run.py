import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from counterpoise import storage
from counterpoise.contracts import ConfigError, DataError, RefusedError, ResourceError
from counterpoise.engine import run as run_module
from counterpoise.engine.run import RunFolder, list_runs, redact

EXPERIMENT = "corpus: synthetic\nseed: 0\n"


def create(root, name="a", **manifest) -> RunFolder:
    return RunFolder.create(
        str(root), name, experiment_text=EXPERIMENT, provenance={"commit": "abc"}, manifest=manifest
    )


def lock_of(run: RunFolder, **changes) -> None:
    """Put a lock there that another process left."""
    owner = json.loads(run._lock_text("0" * 32)) | changes
    storage.write_text(run.at("lock"), json.dumps(owner))


# ------------------------------------------------------------------------------------------------ create and open


def test_a_new_run_holds_what_it_was_made_of(tmp_path):
    run = create(tmp_path / "runs", corpus="synthetic")
    assert sorted(os.listdir(tmp_path / "runs")) == ["a"]
    again = RunFolder.open(f"{tmp_path}/runs/a/")
    assert again.name == "a"
    assert again.experiment_text == EXPERIMENT
    assert again.provenance == {"commit": "abc"}
    assert again.manifest["corpus"] == "synthetic"
    assert again.manifest["name"] == "a"
    assert (again.state(), again.describe(), again.read_status()) == ("created", "created", {})
    assert again.records() == [] and again.num_records == 0
    assert run.checkpoints == f"{tmp_path}/runs/a/checkpoints"
    assert run.best == f"{tmp_path}/runs/a/best"


@pytest.mark.parametrize("bad", ["", ".", "..", "../a", "a/b", "-a", ".a", "a b", "ä", "a\n", "a" * 101])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, bad):
    with pytest.raises(ConfigError, match="run name"):
        create(tmp_path, bad)
    assert os.listdir(tmp_path) == []


def test_a_name_in_use_is_refused_and_says_how_far_that_run_is(tmp_path):
    run = create(tmp_path)
    run.write_status({"state": "interrupted", "epoch": 7, "epochs": 20})
    with pytest.raises(RefusedError) as caught:
        create(tmp_path)
    assert str(caught.value) == (
        f"run 'a' exists in {tmp_path} (interrupted after epoch 7 of 20); "
        "choose another --name, or continue it with --resume"
    )
    run.write_status({"state": "finished", "epoch": 20, "epochs": 20})
    with pytest.raises(RefusedError, match=r"\(finished\)"):
        create(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
    assert run.experiment_text == EXPERIMENT


def race_to_create(root, barrier, wins) -> None:
    barrier.wait()
    try:
        RunFolder.create(root, "a", experiment_text=str(os.getpid()), provenance={}, manifest={})
    except RefusedError:
        return
    wins.put(os.getpid())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_twenty_processes_exactly_one_gets_the_name(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(20), context.Queue()
    args = (str(tmp_path), barrier, wins)
    processes = [context.Process(target=race_to_create, args=args) for _ in range(20)]
    for process in processes:
        process.start()
    winner = wins.get(timeout=30)
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * 20
    assert wins.empty()
    wins.close()
    assert os.listdir(tmp_path) == ["a"]
    assert RunFolder.open(f"{tmp_path}/a").experiment_text == str(winner)


def test_what_is_not_a_run_folder_is_not_opened(tmp_path):
    with pytest.raises(DataError, match=r"is not a run folder: it has no run\.json"):
        RunFolder.open(str(tmp_path))


def test_runs_are_listed_by_name(tmp_path):
    for name in ("b", "a", "c"):
        create(tmp_path, name)
    (tmp_path / "d").mkdir()
    (tmp_path / ".tmp-x").mkdir()
    assert [run.name for run in list_runs(str(tmp_path))] == ["a", "b", "c"]
    assert list_runs(f"{tmp_path}/none") == []


def test_reading_run_folders_needs_neither_torch_nor_pyarrow():
    code = "import sys, counterpoise.engine.run; print([m for m in ('torch', 'pyarrow') if m in sys.modules])"
    path = os.pathsep.join(sys.path)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert out.stdout.strip() == "[]", out.stderr


# ------------------------------------------------------------------------------------------------ lock


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    run = create(tmp_path)
    with run:
        run.acquire()  # once more is no error
        assert run.state() == "running"
        with pytest.raises(RefusedError, match=f"being written by process {os.getpid()} on"):
            RunFolder.open(run.uri).acquire()
        RunFolder.open(run.uri).release()  # not its lock
        assert run.is_locked()
    assert not run.is_locked()
    with RunFolder.open(run.uri):
        pass


def test_the_lock_of_another_live_process_holds(tmp_path):
    run = create(tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    try:
        lock_of(run, pid=process.pid, started=run_module._process_start(process.pid))
        with pytest.raises(RefusedError, match=f"process {process.pid}"):
            run.acquire()
    finally:
        process.kill()
        process.wait()
    run.acquire()
    run.release()


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # no such process
        {"pid": os.getppid(), "started": "another-boot:1"},  # the pid is in use again
        {"host": "elsewhere", "time": time.time() - 400},  # no sign of life from another machine
        {},  # this process, from an object that is gone
    ],
    ids=["dead", "reused-pid", "silent-host", "own"],
)
def test_a_lock_left_behind_is_taken_over(tmp_path, changes):
    run = create(tmp_path)
    lock_of(run, **changes)
    run.write_status({"epoch": 3, "epochs": 5})
    assert run.describe() == "interrupted after epoch 3 of 5"
    with run:
        assert run.is_locked()


def test_a_lock_whose_writer_died_while_writing_it_is_taken_over(tmp_path):
    run = create(tmp_path)
    storage.write_bytes(run.at("lock"), b"")
    with run:
        assert run.is_locked()


def test_a_lock_of_another_machine_holds_while_it_gives_signs_of_life(tmp_path):
    run = create(tmp_path)
    lock_of(run, host="elsewhere", time=time.time() - 100)
    with pytest.raises(RefusedError, match=r"on elsewhere, seen 10\d s ago.*or delete .*/lock"):
        run.acquire()


def test_a_writer_that_slept_and_lost_its_lock_stops(tmp_path):
    run = create(tmp_path)
    run.acquire()
    run.append({"kind": "epoch"})
    lock_of(run, host="elsewhere")
    run._beat -= 1000
    with pytest.raises(RefusedError, match=r"taken over by process .* on elsewhere"):
        run.append({"kind": "epoch"})
    run.release()
    assert run.is_locked()
    assert len(run.records()) == 1


def test_the_heartbeat_renews_the_lock(tmp_path, monkeypatch):
    with create(tmp_path) as run:
        later = time.time() + 1000
        monkeypatch.setattr(run_module, "_clock", lambda: later)
        run.stop_requested()
        assert run._owner()["time"] < later
        run._beat -= 1000
        run._stop_time -= 1000
        run.stop_requested()
        assert run._owner()["time"] == later


def race_to_acquire(uri, barrier, wins) -> None:
    run = RunFolder.open(uri)
    is_alive, pause = run._is_alive, random.Random(os.getpid()).uniform(0.0, 0.05)
    run._is_alive = lambda owner: (is_alive(owner), time.sleep(pause))[0]  # the moment between look and deed
    barrier.wait()
    try:
        run.acquire()
    except RefusedError:
        return
    wins.put(os.getpid())
    time.sleep(1.0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_ten_processes_exactly_one_takes_over_a_dead_ones_lock(tmp_path):
    run = create(tmp_path)
    lock_of(run, pid=2**22 + 1)
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(10), context.Queue()
    args = (run.uri, barrier, wins)
    processes = [context.Process(target=race_to_acquire, args=args) for _ in range(10)]
    for process in processes:
        process.start()
    winner = wins.get(timeout=30)
    for process in processes:
        process.join()
    assert wins.empty()
    wins.close()
    assert run._owner()["pid"] == winner


# ------------------------------------------------------------------------------------------------ records


def test_records_get_a_number_and_a_time(tmp_path):
    with create(tmp_path) as run:
        first = run.append({"kind": "start", "seq": 99})
        assert first["seq"] == 0 and abs(first["time"] - time.time()) < 5
        assert list(first) == ["seq", "time", "kind"]
        run.append({"kind": "progress", "loss": np.float32(0.5), "m": np.arange(2)})
        assert run.append({"kind": "end", "x": float("inf")})["seq"] == 2
        assert run.num_records == 3
        assert [r["kind"] for r in RunFolder.open(run.uri).records()] == ["start", "progress", "end"]
    assert run.records()[1]["m"] == [0, 1]
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        run.append({"kind": "x", "bad": object()})
    assert run.num_records == 3


def test_a_torn_last_line_is_ignored_and_then_overwritten(tmp_path):
    with create(tmp_path) as run:
        for _ in range(3):
            run.append({"kind": "epoch"})
    path = tmp_path / "a" / "records.jsonl"
    for cut in (1, 5, 20):  # even a line that lacks only its newline
        path.write_bytes(path.read_bytes()[:-cut])
        again = RunFolder.open(run.uri)
        assert [r["seq"] for r in again.records()] == [0, 1]
        with again:
            assert again.append({"kind": "epoch"})["seq"] == 2
        assert [r["seq"] for r in again.records()] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    with create(tmp_path) as run:
        for _ in range(3):
            run.append({"kind": "epoch"})
    path = tmp_path / "a" / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"seq": 1', b'"seq": x'))
    with pytest.raises(RefusedError, match=r"records\.jsonl, line 2 is damaged"):
        run.records()


def test_a_resumed_run_writes_no_record_twice(tmp_path):
    with create(tmp_path) as run:
        for epoch in range(5):
            run.append({"kind": "epoch", "epoch": epoch})
        run.truncate_records(3)
        assert run.num_records == 3
        assert run.append({"kind": "epoch", "epoch": 3})["seq"] == 3
        assert [r["epoch"] for r in run.records()] == [0, 1, 2, 3]
        with pytest.raises(RefusedError, match="holds 4 records, the checkpoint was made after 9"):
            run.truncate_records(9)
        run.truncate_records(0)
        assert run.records() == []


def test_records_on_a_full_disk_are_whole_lines(tmp_path):
    """/dev/full is no help: it cannot be truncated. A file size limit fails in the same place."""
    run = create(tmp_path)
    code = (
        "import resource, signal, sys\n"
        "from counterpoise.engine.run import RunFolder\n"
        "from counterpoise.contracts import ResourceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "run = RunFolder.open(sys.argv[1])\n"
        "run.acquire()\n"
        "run.append({'kind': 'epoch', 'x': 'x' * 300})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))\n"
        "try:\n    run.append({'kind': 'epoch', 'x': 'x' * 300})\n"
        "except ResourceError as error:\n    print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "run.append({'kind': 'end'})\n"
        "run.release()\n"
    )
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code, run.uri], capture_output=True, text=True, env=env)
    assert "records.jsonl: disk full" in out.stdout, out.stderr
    assert [(r["seq"], r["kind"]) for r in run.records()] == [(0, "epoch"), (1, "end")]


def test_records_of_several_threads_do_not_mix(tmp_path):
    with create(tmp_path) as run:

        def write():
            for _ in range(50):
                run.append({"kind": "progress"})

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [r["seq"] for r in run.records()] == list(range(200))


def test_the_ledger_grows(tmp_path):
    run = create(tmp_path)
    run.append_ledger([])
    assert run.ledger() == []
    run.append_ledger([{"row": 1}, {"row": 2}])
    run.append_ledger([{"row": 3}])
    assert [row["row"] for row in run.ledger()] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ status and stop


def test_status_is_throttled_except_for_news(tmp_path):
    run = create(tmp_path)
    assert run.write_status({"state": "running", "epoch": 1})
    assert not run.write_status({"state": "running", "epoch": 2})
    assert run.read_status()["epoch"] == 1
    assert run.write_status({"epoch": 3}, force=True)
    assert run.write_status({"state": "finished", "epoch": 4})
    status = run.read_status()
    assert status.keys() == {"state", "epoch", "pid", "host", "time"}
    assert (status["state"], status["epoch"], status["pid"]) == ("finished", 4, os.getpid())
    run._status_time -= 1
    assert run.write_status({"epoch": 5})
    with pytest.raises(ValueError, match="state is 'done'; known: created"):
        run.write_status({"state": "done"})


def test_a_status_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    run = create(tmp_path)

    def full(*_, **__):
        raise ResourceError("disk full")

    monkeypatch.setattr(storage, "write_text", full)
    assert not run.write_status({"epoch": 1})
    assert "disk full" in caplog.text


def test_a_request_to_stop_is_seen_with_its_reason(tmp_path):
    run = create(tmp_path)
    assert run.stop_requested() is None
    RunFolder.open(run.uri).request_stop("maintenance at noon")
    assert run.stop_requested() is None  # looked a moment ago
    run._stop_time -= 1
    assert run.stop_requested() == "maintenance at noon"
    run.clear_stop()
    run._stop_time -= 1
    assert run.stop_requested() is None
    run.clear_stop()


def test_looking_for_a_stop_is_cheap(tmp_path, monkeypatch):
    run = create(tmp_path)
    looks = []
    monkeypatch.setattr(storage, "exists", lambda uri: bool(looks.append(uri)))
    for _ in range(1000):
        run.stop_requested()
    assert len(looks) <= 2


# ------------------------------------------------------------------------------------------------ other files


def test_predictions_come_back_and_a_flipped_bit_is_found(tmp_path):
    run = create(tmp_path)
    rng = np.random.default_rng(0)
    columns = {
        "sample_id": [f"clip{i}" for i in range(100)],
        "label": np.arange(100) % 6,
        "fused": rng.normal(size=(100, 6)).astype(np.float32),
    }
    run.write_predictions(columns)
    back = run.read_predictions()
    assert list(back["sample_id"]) == columns["sample_id"]
    for key in ("label", "fused"):
        np.testing.assert_array_equal(back[key], columns[key])
        assert back[key].dtype == columns[key].dtype
    path = tmp_path / "a" / "predictions.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(RefusedError, match=r"predictions\.parquet is damaged"):
        run.read_predictions()


def test_json_files_are_sorted_and_damage_is_named(tmp_path):
    run = create(tmp_path)
    run.write_json("summary.json", {"b": 1, "a": np.float64(0.5)})
    assert storage.read_text(run.at("summary.json")) == '{\n  "a": 0.5,\n  "b": 1\n}\n'
    assert run.read_json("summary.json") == {"a": 0.5, "b": 1}
    storage.write_bytes(run.at("summary.json"), b"{")
    with pytest.raises(RefusedError, match=r"summary\.json is damaged"):
        run.read_json("summary.json")
    with pytest.raises(DataError, match="there is no such file"):
        run.read_json("none.json")


def test_a_sealed_run_knows_what_was_changed(tmp_path):
    from counterpoise.engine import checkpoint

    with create(tmp_path) as run:
        run.append({"kind": "end"})
        run.write_json("summary.json", {"accuracy": 0.5})
        place = checkpoint.save(run.best, "step-00000001", {}, {"x": 1})
        run.write_status({"state": "finished"})
        assert run.verify() == ["SHA256SUMS: missing; the run was not sealed"]
        run.seal()
    assert run.verify() == []
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(command, cwd=run.uri, capture_output=True).returncode == 0
    run.write_json("summary.json", {"accuracy": 0.9})
    storage.write_bytes(f"{place}/state.json", b'{\n "x": 2\n}')
    storage.delete(run.at("provenance.json"))
    run.write_json("extra.json", 1)
    problems = run.verify()
    assert len(problems) == 4
    for said in ("summary.json: differs", "state.json is damaged", "provenance.json: missing", "extra.json: not in"):
        assert any(said in problem for problem in problems)
    with run:  # whoever writes again breaks the seal
        assert not storage.exists(run.at("SHA256SUMS"))


# ------------------------------------------------------------------------------------------------ secrets


def test_secrets_do_not_reach_a_manifest(tmp_path, monkeypatch):
    canary = "canary-0123456789abcdef"
    monkeypatch.setenv("MY_SERVICE_TOKEN", canary)
    secrets = {
        "grafana_token": canary,
        "nested": {"AWS_SECRET_ACCESS_KEY": [canary], "password": canary, "Authorization": f"Basic {canary}"},
        "url": f"https://user:{canary}@host/path",
        "signed": f"https://host/x?a=1&X-Amz-Signature={canary}&b=2",
        "argv": ["run", "--api-key", canary, f"--token={canary}"],
        "message": f"could not log in with {canary}",
        "key": "AKIA" + "A" * 16,
    }
    run = RunFolder.create(
        str(tmp_path), "a", experiment_text=EXPERIMENT, provenance=secrets, manifest={"env": secrets}
    )
    everything = b"".join(storage.read_bytes(run.at(name)) for name in run.files())
    assert canary.encode() not in everything
    assert b"AKIA" not in everything
    assert run.provenance["url"] == "https://[redacted]@host/path"
    assert run.provenance["signed"] == "https://host/x?a=1&X-Amz-Signature=[redacted]&b=2"
    assert run.provenance["argv"][0] == "run"


def test_what_is_no_secret_stays():
    harmless = {
        "max_tokens": 128,
        "tokenizer": "bert",
        "keep": True,
        "url": "s3://bucket/a@b",
        "monkey": "x",
        "n": None,
    }
    assert redact(harmless) == harmless
    assert redact({"a": ("x", 1)}) == {"a": ["x", 1]}


def test_an_experiment_with_a_secret_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 2 of the experiment") as caught:
        RunFolder.create(
            str(tmp_path), "a", experiment_text="a: 1\nplace: s3://me:hush@b\n", provenance={}, manifest={}
        )
    assert "hush" not in str(caught.value)
    assert os.listdir(tmp_path) == []
