"""Processes that are killed, or told to end, at a planned place: the run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cases import SMALL
from tests.conftest import new_folder
from tests.trust.faults import (
    Aim,
    Armed,
    Ended,
    chance,
    count,
    differences,
    digests,
    forked,
    full,
    job_of,
    keep,
    recovered_s,
    saving_every,
    signalled,
    train,
    warm,
)

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.engine import checkpoint, loop
from counterpoise.engine.job import Job
from counterpoise.engine.run import RunFolder
from counterpoise.methods.aug import AUG
from counterpoise.start import Settings, run_jobs

Experiments = dict[str, dict[str, Any]]
EVERY = 4  # steps between two checkpoints
# With two workers, so that there are kills of each rank; of the quick set: every kind of state there is to lose.
QUICK = ["aug", "reconboost", "local-batch-norm"]
KILLED = list(
    dict.fromkeys([*QUICK, *SMALL, "aug-of-three-learned-weights", "adam-cosine", "gradient_boosting-search"])
)


@pytest.fixture(scope="module")
def whole(experiments: Experiments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], dict[str, Any]]:
    """whole(name, world): the undisturbed run, made once; its digests, and at which steps there is something to hit."""
    made: dict[tuple[str, int], dict[str, Any]] = {}

    def one(name: str, world: int) -> dict[str, Any]:
        if (name, world) not in made:
            place = tmp_path_factory.mktemp("whole")
            uri = start(experiments[name], place)[0]
            ended = train(job_of(resolve(experiments[name])[0], uri), place, world, every=EVERY)
            assert ended.codes == [0] * world, ended.said
            records = RunFolder.open(uri).records()
            stages = [r["epoch"] for r in records if r["kind"] == "epoch"]
            made[name, world] = {
                "digests": digests(uri),
                "steps": records[0]["batches"] * len(stages),
                "batches": records[0]["batches"],
                "epochs": len(stages),
                "decided": [r["epoch"] for r in records if r["kind"] == "decision"],
            }
        return made[name, world]

    return one


def start(content: dict[str, Any], place: Path) -> tuple[str, Any]:
    experiment, provenance = resolve(content)
    return new_folder(place, experiment, provenance).uri, experiment


def last_step(uri: str) -> int:
    """The step of the newest checkpoint; -1 without one."""
    names = checkpoint.committed(RunFolder.open(uri).checkpoints)
    return int(names[-1].split("-")[1]) if names else -1


def go_on(
    content: dict[str, Any],
    place: Path,
    aims: list[Aim],
    world: int,
    also: Callable[[int], None] | None = None,
    sync: bool = False,
) -> tuple[str, list[tuple[Aim, int]], Ended]:
    """Start a run and start it again until all aims have landed and it ends; for each aim the checkpoint it left."""
    uri, experiment = start(content, place)
    seen: list[tuple[Aim, int]] = []
    for attempt in range(len(aims) + 2):
        job = job_of(experiment, uri, resume=attempt > 0)
        ended = train(job, place, world, aims, EVERY, also, sync=sync)
        seen += [(aim, last_step(uri)) for aim in aims if aim not in dict(seen) and aim.landed(place)]
        if not any(ended.codes):
            break
        if not any(code < 0 for code in ended.codes):
            break  # no kill, but an error
    return uri, seen, ended


@pytest.mark.parametrize("name", KILLED if full() else QUICK)
@pytest.mark.timeout(900)
def test_a_killed_rank_changes_nothing(
    name: str, experiments: Experiments, whole: Callable[[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    world, facts = 2, whole(name, 2)
    rng, kills = chance("rank", name), count(4, 5)
    steps = sorted(rng.sample(range(EVERY + 1, facts["steps"]), kills - 1 - (name == "aug")))
    aims = [Aim(f"step-{at}", "step", at, rng.randrange(world)) for at in steps]
    if facts["decided"]:  # after a new classifier is there, before anything says so
        aims.append(Aim("applied", "applied", rng.choice(facts["decided"]), rng.randrange(world)))
        aims.append(Aim("decide", "decide", rng.choice(facts["decided"]), 0))
    else:
        aims.append(Aim("stage", "evaluate", rng.randrange(1, facts["epochs"]), rng.randrange(world)))
    uri, seen, ended = go_on(experiments[name], tmp_path, aims, world)
    assert ended.codes == [0, 0], ended.said
    wrong = differences(uri, facts["digests"])
    left = dict((aim.name, step) for aim, step in seen)
    for aim in aims:
        where = aim.landed(tmp_path)
        recover = recovered_s(tmp_path, where, where["clock"]) if where else None
        keep("1 kill a rank", f"SIGKILL, {name}", where, not wrong, recover_s=recover)
        assert where is not None
        assert where["step"] - left[aim.name] <= EVERY + 1, "no more is lost than lies between two checkpoints"
    assert not wrong
    assert sum(step >= 0 for _, step in seen) >= 0.8 * len(seen), "kills before the first checkpoint prove little"


def no_optimizer(rank: int) -> None:
    loop.load_optimizer_state = lambda *_: None  # type: ignore[assignment]


def no_method_state(rank: int) -> None:
    AUG.load_state_dict = lambda *_: None  # type: ignore[method-assign]


def no_stage(rank: int) -> None:
    """The place in the plan of stages is forgotten."""
    read = loop.Progress.from_json.__func__  # type: ignore[attr-defined]

    def forgetful(kind: Any, data: Any) -> Any:
        found = read(kind, data)
        found.epoch = max(1, found.epoch - 1)
        return found

    loop.Progress.from_json = classmethod(forgetful)  # type: ignore[assignment, method-assign]


def own_randomness(rank: int) -> None:
    """Seeds that depend on how often somebody asked, and not on the step."""
    calls = itertools.count()
    loop.derived_seed = lambda *_: next(calls)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (no_optimizer, "aug"),
        (no_method_state, "aug-learned-weights"),
        (no_stage, "reconboost"),
        (own_randomness, "dropout"),
    ],
    ids=["optimizer", "method", "stage", "randomness"],
)
def test_what_is_not_restored_is_noticed(
    broken: Callable[[int], None],
    name: str,
    experiments: Experiments,
    whole: Callable[[str, int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    """The control: the test above finds a checkpoint that forgets."""
    if broken is own_randomness:
        place = tmp_path / "undisturbed"
        place.mkdir()
        uri, experiment = start(experiments[name], place)
        assert train(job_of(experiment, uri), place, 1, every=EVERY, also=broken).codes == [0]
        expected = digests(uri)
    else:
        expected = whole(name, 1)["digests"]
    aim = Aim("late", "step", 15 if name != "reconboost" else 37)
    uri, _, ended = go_on(experiments[name], tmp_path, [aim], 1, also=broken)
    wrong = ended.codes != [0] or bool(differences(uri, expected))
    keep("1 kill a rank", f"control: {broken.__name__}", aim.landed(tmp_path), not wrong, control=True)
    assert wrong


# --- inside the writing of a checkpoint


def operations_of(experiments: Experiments, name: str, place: Path) -> list[str]:
    """What a run does to files for its checkpoints, from start to end."""
    uri, experiment = start(experiments[name], place)
    noted = place / "operations.json"

    def also(rank: int) -> None:
        before, done = checkpoint._before, []

        def _before(operation: str) -> None:
            done.append(operation)
            noted.write_text(json.dumps(done))
            before(operation)

        checkpoint._before = _before

    assert train(job_of(experiment, uri), place, every=EVERY, also=also).codes == [0]
    return list(json.loads(noted.read_text()))


def test_a_kill_inside_the_writing_of_a_checkpoint_changes_nothing(
    experiments: Experiments, whole: Callable[[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL before each file operation of one save of a run that goes on, best epochs and tidying up included."""
    (tmp_path / "counted").mkdir()
    done = operations_of(experiments, "aug", tmp_path / "counted")
    begins = [i for i, operation in enumerate(done) if operation == "make"]
    points = list(range(begins[2], begins[5]))  # saves in the middle: one of an epoch, one of the best, one between
    rng = chance("file")
    chosen = points if full() else sorted(rng.sample(points, 5))
    for at in chosen:
        place = tmp_path / f"at-{at}"
        place.mkdir()
        aim = Aim("file", "file", at)
        uri, _, ended = go_on(experiments["aug"], place, [aim], 1, sync=True)
        where = aim.landed(place)
        wrong = ended.codes != [0] or differences(uri, whole("aug", 1)["digests"])
        recover = recovered_s(place, where, where["clock"]) if where else None
        keep("3 kill in a save", f"SIGKILL before {done[at]}", where, not wrong, recover_s=recover)
        assert not wrong, (done[at], wrong, ended.said)


def marker_first(rank: int) -> None:
    def save(folder_uri: str, name: str, tensors: Any, text: bytes) -> str:
        final = storage.join(folder_uri, checkpoint._unused(folder_uri, name))
        files = dict(checkpoint._payloads(tensors, text))
        manifest = checkpoint._manifest({f: checkpoint.hashlib.sha256(d).hexdigest() for f, d in files.items()})
        marker = checkpoint._marker(manifest, {f: len(d) for f, d in files.items()})
        for file, data in [(checkpoint.COMMITTED, marker), (checkpoint.MANIFEST, manifest), *files.items()]:
            checkpoint._before(f"write {file}")
            storage.write_bytes(storage.join(final, file), data)
        return final

    checkpoint._save_local = save


def test_a_marker_that_is_written_first_is_noticed(experiments: Experiments, tmp_path: Path) -> None:
    """The control: somebody believes a checkpoint that is not whole, and says so when he goes on."""
    aim = Aim("file", "file", 18)
    uri, _, ended = go_on(experiments["aug"], tmp_path, [aim], 1, also=marker_first)
    records = RunFolder.open(uri).records()
    noticed = any(r.get("event") == "checkpoint_fallback" for r in records) or ended.codes != [0]
    keep("3 kill in a save", "control: marker first", aim.landed(tmp_path), not noticed, control=True)
    assert noticed


# --- signals


def commanded(job: Job, aim: Aim, place: Path) -> Ended:
    """A launch as the command does it, which turns signals into wishes."""
    warm(job)

    def call() -> Any:
        loop.CONTROL_INTERVAL_S = 0.0
        Armed([aim], place, 0)
        saving_every(EVERY)
        return run_jobs([job], Settings(hang_s=None), show=False)

    return forked([call], place)


SIGNALS = [
    (number, point) for number in (signal.SIGTERM, signal.SIGINT, "twice") for point in ("step", "evaluate", "file")
]
SOME = [(signal.SIGTERM, "step"), (signal.SIGTERM, "evaluate"), (signal.SIGTERM, "file"), (signal.SIGINT, "step")]


@pytest.mark.parametrize(("number", "point"), SIGNALS if full() else [*SOME, ("twice", "file")])
def test_a_signal_leaves_a_checkpoint_and_the_code_for_it(
    number: Any,
    point: str,
    experiments: Experiments,
    whole: Callable[[str, int], dict[str, Any]],
    tmp_path: Path,
) -> None:
    facts = whole("aug", 1)
    wanted = {signal.SIGTERM: {75}, signal.SIGINT: {130}, "twice": {143}}[number]
    for trial in range(count(1, 3)):
        rng = chance("signal", number, point, trial)
        at = {
            "step": rng.randrange(3, facts["steps"] - 3),
            "evaluate": rng.randrange(1, facts["epochs"]),
            "file": rng.randrange(8, 40),
        }[point]
        place = tmp_path / str(trial)
        place.mkdir()
        uri, experiment = start(experiments["aug"], place)

        def twice() -> None:
            signalled(signal.SIGTERM)()
            signalled(signal.SIGTERM)()

        aim = Aim("signal", point, at, 0, twice if number == "twice" else signalled(number))

        ended = commanded(job_of(experiment, uri), aim, place)
        where = aim.landed(place)
        seconds = ended.seconds
        again = commanded(job_of(experiment, uri, resume=True), aim, place)
        wrong = differences(uri, facts["digests"]) if again.codes == [0] else again.said
        in_time = ended.codes[0] in wanted and seconds < 10
        recover = recovered_s(place, where, where["clock"]) if where else None
        what = f"{number if isinstance(number, str) else number.name} during {point}"
        keep("4 signals", what, where, not wrong and in_time, recover_s=recover)
        assert ended.codes[0] in wanted, ended.said
        assert seconds < 10 and not wrong
        if number != "twice":
            assert last_step(uri) >= 0
