"""Ray is a way of running: what comes out is what comes out without it. One cluster for the whole file."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tests.launch.nodes import wait_for
from tests.launch.runs import same_bits, weights

from counterpoise.config import resolve
from counterpoise.contracts import DataError, Interrupted, NonFiniteLossError
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.engine import checkpoint
from counterpoise.engine.job import Job
from counterpoise.engine.local import run_local
from counterpoise.engine.run import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

LONG = "epochs=16"
SPLITS = {"train": 120, "valid": 30, "test": 30}


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A strong and a weak vector, a picture, three classes; one picture of train cannot be decoded."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    centres = {"strong": rng.normal(size=(3, 6)), "weak": 0.4 * rng.normal(size=(3, 4))}
    for split, count in SPLITS.items():
        labels = rng.integers(0, 3, count)
        columns: dict[str, Any] = {"key": [f"{split}{i}" for i in range(count)], "label": labels}
        for name, centre in centres.items():
            columns[name] = list(centre[labels] + rng.normal(size=(count, centre.shape[1])))
        columns["picture"] = [png(rng.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(count)]
        if split == "train":
            columns["picture"][17] = b"no picture"
        pq.write_table(pa.table(columns), folder / f"{split}.parquet", row_group_size=16)
    card = {
        "name": "two",
        "num_classes": 3,
        "sample_id": "key",
        "splits": {split: {"files": f"{split}.parquet"} for split in SPLITS},
        "modalities": {
            "strong": {"kind": "vector", "column": "strong", "preprocess": {"standardize": True}},
            "weak": {"kind": "vector", "column": "weak"},
            "picture": {"kind": "image", "column": "picture", "preprocess": {"size": [8, 8], "channels": 1}},
        },
    }
    (folder / "corpus.yaml").write_text(yaml.safe_dump(card))
    return str(folder)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    from counterpoise.launch.cluster import cluster

    with cluster(workers=2, tasks=2):
        yield


@pytest.fixture(scope="module")
def job(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    root = tmp_path_factory.mktemp("runs")

    def make(name: str, *sets: str, **more: Any) -> Job:
        content = {
            "corpus": corpus,
            "modalities": {"strong": "mlp", "weak": "mlp"},
            "method": "aug",
            "epochs": 5,
            "batch_size": 24,
            "optim": {"lr": 0.05},
        }
        experiment, provenance = resolve(content, sets, "test.yaml")
        folder = RunFolder.create(
            str(root),
            name,
            experiment_text=yaml.safe_dump(experiment.to_json()),
            provenance=provenance,
            manifest={},
        )
        return Job(experiment.to_json(), folder.uri, threads=1, **more)

    return make


@pytest.fixture(scope="module")
def plain(job: Callable[..., Job]) -> Job:
    """A run by two plain processes of torch.distributed."""
    plain = job("plain", LONG)
    run_local([plain], workers=2)
    return plain


def ray(*jobs: Job, workers: int, **more: Any) -> list[Any]:
    from counterpoise.launch.train import run_ray

    return run_ray(jobs, workers=workers, **more)


TIMES = ("time", "seconds", "data_wait_s", "samples_per_s", "wall_s", "data_wait_share", "run", "seq", "rank_step_s")


def facts(value: Any) -> Any:
    """Records without times."""
    if isinstance(value, dict):
        return {k: facts(v) for k, v in value.items() if k not in TIMES}
    return [facts(v) for v in value] if isinstance(value, list) else value


def records(job: Job, *kinds: str) -> list[Any]:
    told = [r for r in RunFolder.open(job.run).records() if r.get("event") != "straggler"]  # of a busy machine
    return [facts(r) for r in told if not kinds or r["kind"] in kinds]


def test_one_ray_worker_does_what_this_process_does(ray_cluster: None, job: Callable[..., Job]) -> None:
    here, there = job("here"), job("there")
    assert [facts(s) for s in run_local([here])] == [facts(s) for s in ray(there, workers=1)]
    assert same_bits(here, there)
    assert records(here) == records(there)
    assert records(there, "decision"), "AUG decided nothing, so nothing about decisions was tested"


def test_two_ray_workers_equal_two_plain_ones_even_if_one_is_killed(
    ray_cluster: None, job: Callable[..., Job], plain: Job
) -> None:
    alone, both, there, killed = job("alone"), job("both"), job("by-ray", LONG), job("killed", LONG)
    run_local([alone])

    def kill() -> None:
        folder = RunFolder.open(killed.run)
        wait_for(lambda: folder.read_status().get("epoch", 0) > 3)
        os.kill(folder.read_status()["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    ray(both, there, killed, workers=2)
    killer.join()

    assert same_bits(plain, there)
    assert records(plain) == records(there)
    left, right = weights(alone), weights(both)
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)
    assert [d["add"] for d in records(alone, "decision")] == [d["add"] for d in records(both, "decision")]

    assert [e["event"] for e in records(killed, "event")] == ["resumed"]
    assert same_bits(there, killed)
    assert records(there, "epoch", "decision", "end") == records(killed, "epoch", "decision", "end")


def test_a_run_stops_on_request_and_goes_on_later_and_errors_come_back_as_ours(
    ray_cluster: None, job: Callable[..., Job], plain: Job
) -> None:
    stopped, broken = job("stopped", LONG), job("broken", "optim.lr=1e30")
    folder = RunFolder.open(stopped.run)
    with pytest.raises(Interrupted, match=r"^stopped \(SIGTERM\) in epoch \d+ of 16 .* continue with --resume$"):
        ray(stopped, workers=2, stop=lambda: "SIGTERM" if folder.read_status().get("epoch", 0) > 3 else None)
    assert folder.state() == "interrupted"

    again = Job(stopped.experiment, stopped.run, resume=True, threads=1)
    with pytest.raises(NonFiniteLossError) as caught:
        ray(again, broken, workers=2)
    assert "\n" not in str(caught.value) and "lower optim.lr" in str(caught.value).lower()
    assert RunFolder.open(broken.run).state() == "failed"
    assert folder.state() == "finished"
    assert same_bits(plain, stopped)
    assert records(plain, "epoch", "decision") == records(stopped, "epoch", "decision")


AUGMENT = {"picture": ["flip", {"name": "shift", "pixels": 1}], "weak": [{"name": "noise", "std": 0.1}]}


def listening(root: int) -> dict[str, str]:
    """Sockets on which `root` and the processes below it listen: inode -> address in hex, as /proc has it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    ours = set()
    for pid in family:
        with contextlib.suppress(OSError):
            ours |= {os.readlink(fd) for fd in Path("/proc", str(pid), "fd").iterdir()}
    sockets = {}
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                sockets[fields[9]] = fields[1].rpartition(":")[0]
    return sockets


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_a_cluster_of_our_own_listens_on_loopback_and_wants_its_token(ray_cluster: None) -> None:
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    found = set(listening(os.getpid()).values())
    assert found and found <= loopback
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cache", ["off", "on"])
@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_ray_data_are_those_of_local_data(ray_cluster: None, corpus: str, cache: str, world: int) -> None:
    from counterpoise.launch.ingest import RayData

    more: dict[str, Any] = {"batch_size": 16, "rank": world - 1, "world": world}
    more["options"] = DataOptions(cache=cache, shuffle_window=50, augment=AUGMENT)  # type: ignore[arg-type]
    with contextlib.closing(LocalData(corpus, **more)) as local, contextlib.closing(RayData(corpus, **more)) as there:
        for batches in (
            lambda data: data.train_batches(1),
            lambda data: data.train_batches(2, start=5),
            lambda data: data.batches("test"),
        ):
            expected, found = list(batches(local)), list(batches(there))
            assert len(expected) == len(found) > 0
            for one, other in zip(expected, found, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
            assert local.skipped() == there.skipped()


@pytest.mark.parametrize(("cpus", "begun"), [(1.0, 0), (2.0, 1)])
def test_an_epoch_is_begun_early_where_there_are_cpus_for_it(
    ray_cluster: None, corpus: str, cpus: float, begun: int
) -> None:
    from counterpoise.launch.ingest import RayData

    def reading() -> int:
        return sum(thread.name == "batches" for thread in threading.enumerate())

    more: dict[str, Any] = {"batch_size": 16, "options": DataOptions(cache="off", decode_threads=1, augment=AUGMENT)}
    with (
        contextlib.closing(LocalData(corpus, **more)) as local,
        contextlib.closing(RayData(corpus, cpus=cpus, **more)) as there,
    ):
        before = reading()
        there.expect(2)
        assert reading() - before == begun
        for batches in (lambda data: data.batches("test"), lambda data: data.train_batches(2)):
            for one, other in zip(batches(local), batches(there), strict=True):
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_in_a_decoding_task_is_ours(ray_cluster: None, corpus: str) -> None:
    from counterpoise.launch.ingest import RayData

    options = DataOptions(cache="off", bad_samples=0.0)
    with (
        contextlib.closing(RayData(corpus, batch_size=16, options=options)) as data,
        pytest.raises(DataError, match=r"1 rows cannot be decoded, 0 of 120 are tolerated: train17"),
    ):
        list(data.train_batches(1))


def test_ctrl_c_at_the_terminal_writes_a_checkpoint_and_leaves_nothing_behind(corpus: str, tmp_path: Path) -> None:
    """A command of its own, with a cluster of its own; what is typed reaches the whole process group."""
    experiment = {"corpus": corpus, "modalities": {"strong": "mlp", "weak": "mlp"}, "method": "aug", "epochs": 500}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(experiment))
    argv = ["-m", "counterpoise", "train", "long.yaml", "--engine", "ray", "--runs", "runs", "--name", "long"]
    command = subprocess.Popen(
        [sys.executable, *argv],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    folder = RunFolder(str(tmp_path / "runs" / "long"))
    wait_for(lambda: command.poll() is not None or folder.read_status().get("epoch", 0) > 3)
    assert command.poll() is None, command.communicate()[0]
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=60)

    assert command.returncode == 130, output
    assert "a checkpoint is written, continue with --resume" in output.splitlines()[-1]
    assert not [line for line in output.splitlines() if re.search(r"raylet|Traceback|Warning|pid=|INFO|ray\.", line)]
    assert folder.state() == "interrupted"
    assert checkpoint.latest(folder.checkpoints) is not None
    left = f"counterpoise-ray-{command.pid}-"
    wait_for(lambda: not any(left in line for line in commands()), 10)
    assert not list(Path(tempfile.gettempdir()).glob(left + "*"))


def commands() -> Iterator[str]:
    """Command lines of all processes."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield place.read_bytes().decode(errors="replace")


TWO_CLUSTERS = """
import pickle, threading, time
from contextlib import closing
import pyarrow as pa
import ray
from counterpoise.launch.cluster import cluster
from counterpoise.launch.prepare import arrivals

def record(block):
    time.sleep(0.2)
    return pa.table({"record": pa.array([pickle.dumps("made")] * len(block), pa.large_binary())})

for number in range(2):
    with cluster(workers=1, tasks=1) as own:
        import ray.data
        others = iter(ray.data.range(30, override_num_blocks=30).map(lambda row: time.sleep(0.1) or row).iter_rows())
        next(others)
        rows = ray.data.from_items(list(range(50)), override_num_blocks=50)
        parts = lambda: rows.map_batches(record, batch_size=None, batch_format="pyarrow")
        with closing(arrivals(parts)) as found:
            first = next(item for item in found if item)
        print(number, own.cpus, first, 1 + len(list(others)))
time.sleep(4)
print(ray.is_initialized(), [t.name for t in threading.enumerate() if t.name.startswith(("ray", "Stream", "iter"))])
"""


def test_a_process_can_have_one_cluster_after_another() -> None:
    """Also after `import ray`, which reads settings and keeps them. What was left before its end is over, what somebody
    else executes is not."""
    package = Path(__file__).resolve().parents[2] / "platform"
    # A request to a cluster that is no more ends a process after a minute; here after a second.
    environment = {**os.environ, "PYTHONPATH": str(package), "RAY_gcs_rpc_server_reconnect_timeout_s": "1"}
    command = [sys.executable, "-c", TWO_CLUSTERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2.0", "made", "30", "1", "2.0", "made", "30", "False", "[]"]
