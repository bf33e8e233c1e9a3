"""`counterpoise verify`: does a run on this cluster survive what happens to clusters, and come to the same result?

A short job on a corpus made for it is trained undisturbed, and again with failures: a worker killed, the driver killed,
the driver told to stop, a node killed. Every failure is planned by step and written down where it lands; one that does
not land is an error. Weights and decisions are compared with those of the undisturbed run, and, so that the comparison
itself is known to work, with those of a run of another seed, which must differ.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from counterpoise import storage
from counterpoise.contracts import ConfigError, CounterpoiseError, ResourceError
from counterpoise.engine.job import Job
from counterpoise.engine.run import LOCK, STOP, RunFolder
from counterpoise.start import Settings, StopRequest, make_job, new_run, preview
from counterpoise.storage import join

ROWS = {"train": 480, "valid": 96, "test": 96}
WIDTHS = {"strong": (12, 1.2), "weak": (12, 0.35)}  # numbers of a sample, distance of class centres
BATCH, EPOCHS = 48, 6  # ten batches an epoch
LAUNCH_S = 1200.0  # for one driver, start and failures included
ROUNDING = 1e-3  # between weights of different numbers of workers
_POLL_S = 0.1

Say = Callable[[str], None]


@dataclass
class Case:
    """One run, what is done to it, and what came of it. exact: weights must be those of the reference, bit by bit."""

    name: str
    title: str
    blows: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    exact: bool = True
    min_workers: int | None = None
    landed: list[dict[str, Any]] = field(default_factory=list)
    recover_s: list[float] = field(default_factory=list)
    finished: bool = False
    decisions_equal: bool = False
    weights: str = ""  # identical, or the largest difference
    difference: float | None = None
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


def cases(workers: int, kill_nodes: bool, spare: str) -> list[Case]:
    """What is done. spare: the node of the drivers, which is not killed."""

    def blow(kind: str, step: int, rank: int = -1, name: str = "") -> dict[str, Any]:
        return {"name": name or kind, "kind": kind, "step": step, "rank": rank, "spare": spare}

    found = [
        Case("reference", "undisturbed"),
        Case("control", "another seed: must differ", seed=1),
        Case("worker", "worker killed", [blow("worker", 13, 0, "first"), blow("worker", 37, -1, "last")]),
        Case("driver", "driver killed, same command again", [blow("hold", 33, 0, "driver")]),
        Case("sigterm", "driver told to stop, same command again", [blow("hold", 44, 0, "sigterm")]),
    ]
    if kill_nodes:
        found.append(Case("node", "node killed", [blow("node", 27)], exact=False, min_workers=1))
    return found


def verify(
    *,
    address: str | None,
    workers: int,
    runs: str | None,
    device: str = "cpu",
    kill_nodes: bool = False,
    keep: bool = False,
    verbose: bool = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """What happened, as JSON values; `passed` is the verdict. runs: a place that every node can write to."""
    if kill_nodes and not address:
        raise ConfigError("--kill-nodes needs --address of a cluster with more nodes than the one of the driver")
    spare, hosts = _cluster_facts(address) if address else ("", 1)
    if runs is None and hosts > 1:
        raise ConfigError(
            f"the cluster has {hosts} nodes: give --runs, a shared folder or s3:// that all of them reach"
        )
    if kill_nodes and hosts < 2:
        raise ConfigError("--kill-nodes: the cluster has no node besides that of the driver")
    with contextlib.ExitStack() as stack:
        if runs is None:
            runs = stack.enter_context(tempfile.TemporaryDirectory(prefix="counterpoise-verify-"))
        root = join(runs, f"verify-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
        if not keep:
            stack.callback(storage.delete, root)
        plan = cases(workers, kill_nodes, spare)
        settings = Settings("ray", workers, device, 1, 3600.0, address, verbose=verbose)
        write_corpus(join(root, "corpus"))
        jobs = {case.name: _job(case, root, settings) for case in plan}
        drive = _Drive(settings, say)
        say(f"runs        {root}")
        began = time.monotonic()
        drive.all_at_once(plan, jobs)
        drive.killed(_named(plan, "driver"), jobs["driver"])
        drive.told_to_stop(_named(plan, "sigterm"), jobs["sigterm"])
        for case in plan:
            if case.name == "node":
                drive.one(case, jobs["node"])
        _judge(plan, jobs)
        result = {
            "passed": all(case.passed for case in plan),
            "workers": workers,
            "nodes": hosts,
            "address": address,
            "seconds": time.monotonic() - began,
            "cases": [{**asdict(case), "passed": case.passed} for case in plan],
        }
        if keep:
            result["runs"] = root
        return result


def _named(plan: Sequence[Case], name: str) -> Case:
    return next(case for case in plan if case.name == name)


def _cluster_facts(address: str) -> tuple[str, int]:
    """The id of the node that drivers started here belong to, and how many nodes can have workers."""
    code = "from counterpoise.launch.room import print_facts; print_facts()"  # no connection that a dead node could end
    done = subprocess.run(
        [sys.executable, "-c", code], env={**_environment(), "RAY_ADDRESS": address}, capture_output=True, text=True
    )
    if done.returncode:
        raise ResourceError((done.stderr.strip().splitlines() or [f"cannot connect to {address}"])[-1])
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts["node"], facts["nodes"]


def write_corpus(folder: str) -> None:
    """Two modalities, one strong and one weak: Gaussian vectors around the centres of four classes."""
    import numpy as np
    import yaml

    from counterpoise.data.shards import write_shards

    rng = np.random.default_rng(7)
    centres = {name: rng.normal(size=(4, width)) * distance for name, (width, distance) in WIDTHS.items()}
    splits = {}
    for split, count in ROWS.items():
        rows = []
        for number in range(count):
            row: dict[str, Any] = {"key": f"{split}-{number}", "label": number % 4}
            for name, centre in centres.items():
                row[name] = (centre[number % 4] + rng.normal(size=centre.shape[1])).tolist()
            rows.append(row)
        shards = write_shards(rows, folder, split, num_shards=2, row_group_size=16)
        splits[split] = {"files": [shard.file for shard in shards], "expected": count}
    vector = {name: {"kind": "vector", "column": name, "preprocess": {"standardize": True}} for name in WIDTHS}
    card = {"name": "verify", "num_classes": 4, "sample_id": "key", "label": "label"}
    storage.write_text(
        join(folder, "corpus.yaml"), yaml.safe_dump({**card, "splits": splits, "modalities": vector}, sort_keys=False)
    )


def _job(case: Case, root: str, settings: Settings) -> Job:
    from counterpoise.config import resolve

    small = {"name": "mlp", "hidden": 16, "width": 8}
    content = {
        "corpus": join(root, "corpus"),
        "modalities": dict.fromkeys(WIDTHS, small),
        "method": {"name": "aug", "hidden": 16, "check_every": 2},
        "optim": {"lr": 0.01},  # calm: rounding stays rounding
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "seed": case.seed,
        "data": {"cache": "on"},
    }
    experiment, provenance = resolve(content, (), "counterpoise verify")
    seen = preview(experiment, settings)
    return make_job(seen, new_run(seen, provenance, join(root, "runs"), case.name))


def _environment() -> dict[str, str]:
    """Of a driver: it must find this package as this process does."""
    from pathlib import Path

    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class _Drive:
    """Starts drivers, each a process of its own, and does to them what is planned."""

    def __init__(self, settings: Settings, say: Say) -> None:
        self.settings, self.say = settings, say
        self.pids: list[int] = []

    def all_at_once(self, plan: Sequence[Case], jobs: Mapping[str, Job]) -> None:
        """The runs whose driver lives: they share one start of Ray."""
        chosen = [_named(plan, name) for name in ("reference", "control", "worker")]
        self.say("trains      undisturbed, with another seed, and with workers killed ...")
        with self._driver(chosen, [jobs[case.name] for case in chosen]) as driver:
            self._ended(driver, chosen, 0)

    def one(self, case: Case, job: Job) -> None:
        self.say(f"trains      {case.title} ...")
        with self._driver([case], [job]) as driver:
            self._ended(driver, [case], 0)

    def killed(self, case: Case, job: Job) -> None:
        self.say(f"trains      {case.title} ...")
        with self._driver([case], [job]) as driver:
            if self._landed(driver, case, job):
                driver.kill()
                driver.wait()
        self._again(case, job)

    def told_to_stop(self, case: Case, job: Job) -> None:
        self.say(f"trains      {case.title} ...")
        with self._driver([case], [job]) as driver:
            if self._landed(driver, case, job):
                driver.send_signal(signal.SIGTERM)
                _wait(lambda: storage.exists(join(job.run, STOP)) or driver.poll() is not None, 30)
                storage.write_text(_blow(case).go(job.run), "")
                self._ended(driver, [case], 75)
        self._again(case, job)

    def _again(self, case: Case, job: Job) -> None:
        from dataclasses import replace

        with self._driver([case], [replace(job, resume=True)]) as driver:
            self._ended(driver, [case], 0)

    def _landed(self, driver: subprocess.Popen[str], case: Case, job: Job) -> bool:
        place = _blow(case).landed(job.run)
        _wait(lambda: driver.poll() is not None or storage.exists(place), LAUNCH_S)
        if storage.exists(place):
            return True
        driver.kill()  # it hangs, or has ended: nothing was brought about
        case.problems.append(f"its driver ended before the failure landed: {_last_line(driver)}")
        return False

    def _ended(self, driver: subprocess.Popen[str], of: Sequence[Case], expected: int) -> None:
        try:
            _, error = driver.communicate(timeout=LAUNCH_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            _, error = driver.communicate()
            error = f"no end within {LAUNCH_S:.0f} s\n"
        if driver.returncode != expected:
            line = (error.strip().splitlines() or ["nothing was said"])[-1]
            for case in of:
                case.problems.append(f"its driver ended with {driver.returncode}, not {expected}: {line}")

    @contextlib.contextmanager
    def _driver(self, of: Sequence[Case], jobs: Sequence[Job]) -> Iterator[subprocess.Popen[str]]:
        order = {
            "jobs": [asdict(job) for job in jobs],
            "blows": {job.run: case.blows for case, job in zip(of, jobs, strict=True)},
            "settings": {**asdict(self.settings), "min_workers": of[0].min_workers},
        }
        pipe = subprocess.PIPE
        errors = None if self.settings.verbose else pipe
        command = [sys.executable, "-m", "counterpoise.verify"]
        driver = subprocess.Popen(
            command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=errors, text=True, env=_environment()
        )
        self.pids.append(driver.pid)
        try:
            assert driver.stdin is not None
            driver.stdin.write(json.dumps(order))
            driver.stdin.close()
            driver.stdin = None
            yield driver
        finally:
            if driver.poll() is None:
                driver.kill()
            driver.wait()
            if driver.stderr:
                driver.stderr.close()
        if not self.settings.address:
            left = os.path.join(tempfile.gettempdir(), f"counterpoise-ray-{driver.pid}-*")
            if driver.returncode == 0 and glob.glob(left):
                of[-1].left += glob.glob(left)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_POLL_S)


def _blow(case: Case, number: int = 0) -> Any:
    from counterpoise.launch.rehearsal import Blow

    return Blow(**case.blows[number])


def _last_line(driver: subprocess.Popen[str]) -> str:
    text = driver.communicate()[1] or ""
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def _judge(plan: Sequence[Case], jobs: Mapping[str, Job]) -> None:
    """Fill in what came of every case."""
    reference = _named(plan, "reference")
    for case in plan:
        folder = RunFolder.open(jobs[case.name].run)
        case.finished = folder.state() == "finished"
        if not case.finished:
            case.problems.append(f"the run is {folder.describe()}")
        for number in range(len(case.blows)):
            blow = _blow(case, number)
            if not storage.exists(blow.landed(folder.uri)):
                case.problems.append(f"{blow.name!r} did not land at step {blow.step}, so nothing was shown")
                continue
            landed = json.loads(storage.read_bytes(blow.landed(folder.uri)))
            case.landed.append(landed)
            if storage.exists(blow.back(folder.uri)):
                back = json.loads(storage.read_bytes(blow.back(folder.uri)))
                case.recover_s.append(back["time"] - landed["time"])
            elif case.finished:
                case.problems.append(f"nothing was trained after {blow.name!r}")
        case.left += [name for name in (LOCK, STOP) if storage.exists(folder.at(name))]
        if case.left:
            case.problems.append(f"left behind: {', '.join(case.left)}")
        if case is not reference and case.finished and reference.finished:
            _compare(case, RunFolder.open(jobs[reference.name].run), folder)
    if not _decisions(RunFolder.open(jobs[reference.name].run)):
        reference.problems.append("no decision was made, so none could be compared")


def _compare(case: Case, reference: RunFolder, folder: RunFolder) -> None:
    import torch

    from counterpoise.engine import checkpoint

    one, other = (checkpoint.latest(place.checkpoints) for place in (reference, folder))
    assert one is not None and other is not None, "a finished run has a checkpoint"
    left, right = one.tensors["model"], other.tensors["model"]
    case.decisions_equal = _decisions(reference) == _decisions(folder)
    comparable = left.keys() == right.keys() and all(left[n].shape == right[n].shape for n in left)
    same = comparable and all(torch.equal(left[n], right[n]) for n in left)
    if comparable:
        case.difference = max(float((left[n].double() - right[n].double()).abs().max()) for n in left)
    case.weights = "identical" if same else f"differ by {case.difference:.1e}" if comparable else "of other shapes"
    if case.name == "control":
        if same or (case.difference is not None and case.difference <= ROUNDING):
            case.problems.append("a run of another seed was found equal: the comparison is worth nothing")
        return
    if not case.decisions_equal:
        case.problems.append("decisions differ from those of the undisturbed run")
    if not same and (case.exact or case.difference is None or case.difference > ROUNDING):
        case.problems.append(f"weights {case.weights}, compared with the undisturbed run")


def _decisions(folder: RunFolder) -> list[Any]:
    return [(r["epoch"], r["action"], r["add"]) for r in folder.records() if r["kind"] == "decision"]


def render(result: Mapping[str, Any]) -> str:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "failure", "landed at", "back after", "decisions", "weights"):
        table.add_column(column, no_wrap=column != "failure")
    for case in result["cases"]:
        places = [f"step {b['step']}, rank {b['rank']} on {b['host']}" for b in case["landed"]] or ["-"]
        times = [f"{s:.1f} s" for s in case["recover_s"]] or ["-"]
        compared = bool(case["weights"])
        equal = ("equal" if case["decisions_equal"] else "differ") if compared else "-"
        table.add_row(
            "ok" if case["passed"] else "FAILED",
            case["title"],
            "\n".join(places),
            "\n".join(times),
            equal,
            case["weights"] or "-",
        )
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(table)
    lines = [captured.get().rstrip()]
    lines += [f"{case['title']}: {problem}" for case in result["cases"] for problem in case["problems"]]
    done = "recovered from everything, to the same result" if result["passed"] else "did not pass"
    nodes = f"{result['nodes']} node{'s' if result['nodes'] > 1 else ''}"
    lines.append(f"\n{result['workers']} workers, {nodes}: {done} ({result['seconds']:.0f} s)")
    return "\n".join(lines)


def drive() -> int:
    """A driver: runs the jobs that standard input describes; the exit code is that of `counterpoise train`."""
    from counterpoise.contracts import Interrupted
    from counterpoise.launch.train import run_ray

    order = json.loads(sys.stdin.read())
    settings = Settings(**order["settings"])
    stop = StopRequest()
    try:
        with stop.installed():
            run_ray(
                [Job(**job) for job in order["jobs"]],
                workers=settings.workers,
                min_workers=settings.min_workers,
                use_gpu=str(settings.resolved_device).startswith("cuda"),
                address=settings.address,
                verbose=settings.verbose,
                stop=stop,
                max_failures=4,
                blows=order["blows"],
            )
    except Interrupted as error:
        print(error, file=sys.stderr)
        return stop.exit_code
    except CounterpoiseError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(drive())
