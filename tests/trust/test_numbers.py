"""Numbers that are none, memory that runs out, clocks that jump, workers that come and go."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import SMALL_AUG
from tests.conftest import new_folder, settings
from tests.trust.faults import Aim, chance, count, differences, digests, job_of, keep, train

from counterpoise.config import resolve
from counterpoise.contracts import CounterpoiseError
from counterpoise.engine import checkpoint, local, loop, memory
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.local import WorkersDied, run_local
from counterpoise.engine.run import RunFolder

BATCHES = 8  # of an epoch


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("whole")
    uri, experiment = start(corpus, place)
    assert train(job_of(experiment, uri), place).codes == [0]
    return digests(uri)


def start(corpus: str, place: Path, **changes: Any) -> tuple[str, Any]:
    experiment, provenance = resolve(settings(corpus, **{"method": SMALL_AUG, **changes}))
    return new_folder(place, experiment, provenance).uri, experiment


# --- numbers that are none


def broken_gradient(step: int, modality: str, value: float, note: Path) -> Callable[[int], None]:
    """A gradient of one encoder becomes `value` in one step, while the loss is as it was."""

    def also(rank: int) -> None:
        whole = SingleComm.sum_gradients
        trainers: list[loop.Trainer] = []
        begin = loop.Trainer._begin

        def _begin(self: loop.Trainer) -> None:
            trainers.append(self)
            begin(self)

        def sum_gradients(self: Any, parameters: Any, extra: Any) -> Any:
            found = whole(self, parameters, extra)
            if trainers[0].progress.step == step and not note.exists():
                given = [p for p in trainers[0].net.encoders[modality].parameters() if p.grad is not None]
                if given:
                    given[0].grad.view(-1)[3] = value
                    note.write_text(json.dumps({"step": step, "modality": modality, "value": str(value)}))
            return found

        loop.Trainer._begin = _begin  # type: ignore[method-assign]
        SingleComm.sum_gradients = sum_gradients  # type: ignore[method-assign]

    return also


def poisoned(uri: str) -> list[str]:
    """Checkpoints, best epochs included, that hold numbers that are none."""
    folder = RunFolder.open(uri)
    found = []
    for place in (folder.checkpoints, folder.best):
        for name in checkpoint.committed(place):
            tensors = checkpoint.load(f"{place}/{name}").tensors
            if any(not v.isfinite().all() for t in tensors.values() for v in t.values() if v.is_floating_point()):
                found.append(f"{place}/{name}")
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["within an epoch", "in the last step of an epoch"])
def test_a_broken_gradient_is_noticed_within_a_step_and_kept_nowhere(
    value: float, when: str, corpus: str, whole: dict[str, str], tmp_path: Path
) -> None:
    for trial in range(count(1, 5)):
        rng = chance("gradient", value, when, trial)
        step = rng.randrange(1, 2 * BATCHES - 1) if when == "within an epoch" else rng.choice([1, 2]) * BATCHES - 1
        step += when == "within an epoch" and step % BATCHES == BATCHES - 1
        modality = rng.choice(["strong", "weak"])
        place = tmp_path / str(trial)
        place.mkdir()
        uri, experiment = start(corpus, place)
        note = place / "note"
        ended = train(job_of(experiment, uri), place, every=1, also=broken_gradient(step, modality, value, note))
        where = json.loads(note.read_text()) if note.exists() else None
        said = re.search(
            r"NonFiniteLossError: .* is not finite in epoch \d, step (\d+).*first seen in ([^;.]*)", ended.said[0]
        )
        assert ended.codes == [1] and said is not None, ended.said
        in_time = int(said[1]) - step in (0, 1) and modality in said[2]
        again = train(job_of(experiment, uri, resume=True), place)
        wrong = differences(uri, whole) if again.codes == [0] else again.said
        keep("10 NaN", f"{value} in a gradient, {when}", where, in_time and not poisoned(uri) and not wrong)
        assert in_time, ended.said
        assert not poisoned(uri) and not wrong


def test_weights_that_nobody_looks_at_would_be_kept(corpus: str, tmp_path: Path) -> None:
    """The control: without the look before a checkpoint, one with numbers that are none is found."""
    uri, experiment = start(corpus, tmp_path)
    note = tmp_path / "note"

    def also(rank: int) -> None:
        broken_gradient(BATCHES - 1, "weak", math.nan, note)(rank)
        loop.Trainer._check_weights = lambda self: None  # type: ignore[method-assign]
        loop.math = type("", (), {**vars(math), "isnan": staticmethod(lambda x: False)})  # type: ignore[assignment]

    train(job_of(experiment, uri), tmp_path, every=1, also=also)
    where = json.loads(note.read_text()) if note.exists() else None
    found = poisoned(uri)
    keep("10 NaN", "control: nobody looks at weights", where, not found, control=True)
    assert any("/best/" in name for name in found)


# --- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit is set from what the process has now")
def test_a_run_that_needs_too_much_memory_says_how_much_and_what_to_change(corpus: str, tmp_path: Path) -> None:
    wide = {m: {"name": "mlp", "hidden": 400_000, "width": 8} for m in ("strong", "weak")}
    uri, experiment = start(corpus, tmp_path, method="joint", modalities=wide, batch_size=240)

    def limit(rank: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 400 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    ended = train(job_of(experiment, uri), tmp_path, also=limit)
    said = re.search(
        r"OutOfMemoryError: out of memory in .*: ([\d.]+) MiB more could not be had, this process has used up to "
        r"[\d.]+ [MG]iB of this machine\. Try a smaller batch_size \(now 240\), compute\.parts=4.*or data\.cache=off",
        ended.said[0],
    )
    keep("13 out of memory", "RLIMIT_AS", {"limit": "400 MiB more"}, bool(said) and ended.codes == [4])
    assert said is not None and ended.codes == [4], ended.said
    assert float(said[1]) == pytest.approx(400_000 * 240 * 4 / 2**20, rel=0.5)
    assert RunFolder.open(uri).state() == "failed"


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
         "allocate 384000000 bytes. Error code 12 (Cannot allocate memory)", 384_000_000),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB", 2_684_354_560),
        ("Unable to allocate 1.50 GiB for an array with shape (1, 2) and data type float64", 1_610_612_736),
        ("std::bad_alloc", None),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_read_from_the_message(text: str, asked: int | None) -> None:
    assert memory.is_out_of_memory(RuntimeError(text)) or "Unable" in text
    assert memory.asked_bytes(RuntimeError(text)) == asked


def test_other_errors_are_not_taken_for_memory() -> None:
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert memory.is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("places", "allowed", "attempts", "said"),
    [
        ([(7, 7), (7, 7), (9, 9)], 5, 2, "twice at the same step"),
        ([(7, 7), (8, 8), (9, 9)], 1, 2, "--max-failures is 1"),
        ([(7, 7), (8, 8)], 2, 3, None),
    ],
    ids=["same step", "too often", "goes on"],
)
def test_workers_that_die_twice_at_the_same_step_are_not_started_a_third_time(
    places: list[tuple[int, ...]],
    allowed: int,
    attempts: int,
    said: str | None,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, experiment = start(corpus, tmp_path)
    RunFolder.open(uri).write_status({"state": "running"})
    calls: list[tuple[bool, str]] = []

    def spawn(jobs: Any, workers: int, stop: Any, summaries: list[Any], after: str) -> None:
        calls.append((jobs[0].resume, after))
        if len(calls) <= len(places):
            raise WorkersDied("worker 1 was killed", places[len(calls) - 1])
        summaries.append({"run": "r"})

    monkeypatch.setattr(local, "_spawn", spawn)
    told: list[str] = []
    if said is None:
        assert run_local([job_of(experiment, uri)], 2, max_failures=allowed, tell=told.append) == [{"run": "r"}]
    else:
        with pytest.raises(CounterpoiseError, match=said):
            run_local([job_of(experiment, uri)], 2, max_failures=allowed, tell=told.append)
    assert len(calls) == attempts and [resume for resume, _ in calls] == [False] + [True] * (attempts - 1)
    assert [after for _, after in calls[1:]] == ["worker 1 was killed"] * (attempts - 1)
    assert len(told) == attempts - 1
    keep("13 out of memory", f"deaths at {places}, {allowed} allowed", {"attempts": len(calls)}, True)


# --- clocks


def jumping(seed: int, step_s: float) -> Callable[[int], None]:
    """A wall clock that is off by another hour or so whenever it is asked, and a time zone that changes."""

    def also(rank: int) -> None:
        true, rng, asked = time.time, random.Random(seed), itertools.count()

        def now() -> float:
            if next(asked) % 7 == 0:
                os.environ["TZ"] = rng.choice(["UTC", "Asia/Kathmandu", "America/St_Johns"])
                time.tzset()
            return true() + rng.uniform(-step_s, step_s)

        time.time = now

    return also


def times(value: Any, key: str = "") -> list[tuple[str, float]]:
    """Every duration in records and status, with its name."""
    if isinstance(value, dict):
        return [found for name, item in value.items() for found in times(item, name)]
    if isinstance(value, list):
        return [found for item in value for found in times(item, key)]
    named = (key.endswith("_s") and not key.endswith("per_s")) or key in ("seconds", "eta_s", "wall_s")
    return [(key, value)] if named and isinstance(value, int | float) else []


def test_a_clock_that_jumps_changes_nothing(corpus: str, whole: dict[str, str], tmp_path: Path) -> None:
    for trial in range(count(2, 20)):
        rng = chance("clock", trial)
        place = tmp_path / str(trial)
        place.mkdir()
        uri, experiment = start(corpus, place)
        aim = Aim("kill", "step", rng.randrange(5, 3 * BATCHES))
        ended = train(job_of(experiment, uri), place, aims=[aim], also=jumping(trial, 3600))
        assert ended.codes == [-9], ended.said
        status = RunFolder.open(uri).read_status()
        again = train(job_of(experiment, uri, resume=True), place, also=jumping(trial + 1000, 3600))
        wrong: Any = differences(uri, whole) if again.codes == [0] else again.said
        folder = RunFolder.open(uri)
        records = folder.records()
        stamps = [record["time"] for record in records]
        measured = [*times(records), *times(status), *times(folder.read_json("summary.json"))]
        negative = [pair for pair in measured if pair[1] < 0 or pair[1] > 600]
        resumed = [r["step"] for r in records if r.get("event") == "resumed"]
        at = aim.landed(place)
        late = at is not None and at["step"] - resumed[0] > 4
        keep("19 clock", "± 1 h at every look, time zones", at, not wrong and not negative and not late)
        assert not wrong and len(measured) >= 8 and not negative
        assert stamps != sorted(stamps), "the clock has to jump to prove anything"
        assert not late, "the newest checkpoint is the one of the last step, whatever its time says"


# --- workers that come and go


def noting(place: Path) -> Callable[[int], None]:
    """Write down which rows every rank trains on in every step, and the loss over all of them."""

    def also(rank: int) -> None:
        train_batch, watch = loop.Trainer.train_batch, loop.Trainer._watch

        def note(**facts: Any) -> None:
            with open(place / f"rows-{rank}.jsonl", "a") as file:
                file.write(json.dumps(facts) + "\n")

        def noted(self: loop.Trainer, batch: Any) -> None:
            note(step=self.progress.step, rows=batch["row"].tolist())
            train_batch(self, batch)

        def watched(self: loop.Trainer, values: torch.Tensor, *more: Any) -> None:
            if rank == 0:
                note(step=self.progress.step, loss=float(values.double().sum()), phase=more[-1])
            watch(self, values, *more)

        loop.Trainer.train_batch, loop.Trainer._watch = noted, watched  # type: ignore[method-assign]

    return also


def noted_by(place: Path, world: int) -> tuple[dict[int, list[int]], dict[Any, float]]:
    rows: dict[int, dict[int, list[int]]] = {}
    losses: dict[Any, float] = {}
    for rank in range(world):
        path = place / f"rows-{rank}.jsonl"
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if "rows" in line:
                rows.setdefault(line["step"], {})[rank] = line["rows"]
            else:
                losses[line["step"], line["phase"]] = line["loss"]
    return {step: [row for r in sorted(parts) for row in parts[r]] for step, parts in rows.items()}, losses


def test_every_sample_comes_once_and_in_the_same_order_when_workers_come_and_go(corpus: str, tmp_path: Path) -> None:
    (alone := tmp_path / "alone").mkdir()
    calm = {"optim": {"lr": 0.01}}
    uri, experiment = start(corpus, alone, **calm)
    assert train(job_of(experiment, uri), alone, also=noting(alone)).codes == [0]
    rows, losses = noted_by(alone, 1)
    for trial in range(count(1, 5)):
        draw = chance("elastic", trial)
        first = draw.randrange(5, 2 * BATCHES - 1)
        # An epoch ends between the two, so that the one worker has written a checkpoint.
        second = draw.randrange(first + BATCHES + 1, 3 * BATCHES)
        place = tmp_path / str(trial)
        place.mkdir()
        uri, experiment = start(corpus, place, **calm)
        aims = [Aim("first", "step", first, 1), Aim("second", "step", second, 0)]
        for attempt, world in enumerate((2, 1, 2)):
            # What was done before the kill and is done again is noted again, by the workers of now.
            (now := place / str(attempt)).mkdir()
            job = job_of(experiment, uri, resume=attempt > 0)
            ended = train(job, place, world, aims, also=noting(now))
        assert ended.codes == [0, 0], ended.said
        found: dict[int, list[int]] = {}
        lost: dict[Any, float] = {}
        for attempt, world in enumerate((2, 1, 2)):
            more_rows, more_losses = noted_by(place / str(attempt), world)
            whole_steps = {s: r for s, r in more_rows.items() if len(r) == len(rows[s])}
            found, lost = found | whole_steps, lost | more_losses
        same = found == rows
        apart = max(abs(lost[key] - loss) / abs(loss) for key, loss in losses.items())
        records = RunFolder.open(uri).records()
        said = [(r["workers_before"], r["workers"]) for r in records if r.get("event") == "resumed"]
        fine = same and apart < 1e-5 and said == [(2, 1), (1, 2)]
        for aim in aims:
            where = aim.landed(place)
            keep("17 elastic", "2 -> 1 -> 2 workers", {**where, "apart": apart} if where else None, fine)
        assert same and apart < 1e-5, (same, apart)
        assert said == [(2, 1), (1, 2)]
        for epoch in range(3):
            seen = sorted(r for step in range(epoch * BATCHES, (epoch + 1) * BATCHES) for r in found[step])
            assert seen == list(range(240))


# --- what a checkpoint knows


KNOWN = {"net": "model", "optimizer": "optimizer", "method": "method"}  # attribute -> file or key of a checkpoint


def unknown_states(trainer: loop.Trainer) -> list[str]:
    """Names of what the trainer holds that has a state which no checkpoint keeps."""
    found = []
    for name, value in vars(trainer).items():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for item in inside:
            if isinstance(item, torch.nn.Parameter):
                continue  # of the network
            if callable(getattr(item, "state_dict", None)) and name not in KNOWN:
                found.append(name)
    return found


def test_everything_with_a_state_is_in_the_checkpoint(corpus: str, tmp_path: Path) -> None:
    from counterpoise.engine.job import open_data

    uri, experiment = start(corpus, tmp_path)
    data = open_data(experiment)
    with RunFolder.open(uri) as folder:
        trainer = loop.Trainer(experiment, data, SingleComm(), folder, loop.RunOptions())
        assert unknown_states(trainer) == []
        assert all(hasattr(getattr(trainer, name), "state_dict") for name in KNOWN)
        trainer._save()
        found = checkpoint.latest(folder.checkpoints)
        assert found is not None
        assert {*found.tensors, *found.state} >= set(KNOWN.values())
        assert set(found.tensors["model"]) == set(trainer.net.state_dict())
        schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(trainer.net.parameters(), 0.1), 2)
        trainer.averages = {"of weights": torch.optim.swa_utils.AveragedModel(trainer.net)}  # type: ignore[attr-defined]
        trainer.schedule = schedule  # type: ignore[attr-defined]
        assert unknown_states(trainer) == ["averages", "schedule"], "the control: what was forgotten is named"
    data.close()
    keep("2 states", "control: a forgotten schedule", {"attribute": "schedule"}, False, control=True)
