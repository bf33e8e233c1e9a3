"""Hours of training, kills, resumes and comparisons, watching what grows: `uv run poe soak --hours 8`.

Every round trains a run in a process that is killed at a random step, goes on with it here, compares two methods, and
looks at what this process holds: memory, file descriptors, threads, shared memory, processes and temporary files. At
the end it prints what each grew by per hour after a warm-up, and fails if one of them keeps growing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HERE), str(HERE / "platform")]

WARM = 0.25  # of the rounds: caches fill, allocators settle
MARGIN_MIB = 8.0  # an allocator's moods in a short soak
PER_HOUR = 0.01  # of the memory, as a slope that is too much


@dataclass(frozen=True)
class Look:
    """What this process held after a round."""

    hours: float
    rss_mib: float
    descriptors: int
    threads: int
    shared: int  # files in /dev/shm of this user
    children: int
    temporary: int  # entries of the folder for temporary files


def look(began: float, folder: str) -> Look:
    import psutil

    gc.collect()
    process = psutil.Process()
    shared = Path("/dev/shm")
    mine = [p for p in shared.iterdir() if _is_ours(p)] if shared.is_dir() else []
    return Look(
        (time.monotonic() - began) / 3600,
        process.memory_info().rss / 2**20,
        process.num_fds(),
        process.num_threads(),
        len(mine),
        len(process.children(recursive=True)),
        len(os.listdir(folder)),
    )


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid() and path.name.startswith(("torch_", "psm_", "counterpoise"))
    except OSError:
        return False


def slope(looks: Sequence[Look], name: str) -> float:
    """Growth per hour by least squares."""
    times = [one.hours for one in looks]
    values = [float(getattr(one, name)) for one in looks]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - middle) ** 2 for t in times)
    return sum((t - middle) * (v - mean) for t, v in zip(times, values, strict=True)) / spread if spread else 0.0


def _of(looks: Sequence[Look], name: str) -> list[Any]:
    return [getattr(one, name) for one in looks]


def verdict(looks: Sequence[Look]) -> tuple[list[str], list[str]]:
    """Lines to print, and what is wrong."""
    settled = looks[int(len(looks) * WARM) :]
    third = max(1, len(settled) // 3)
    lines, wrong = [f"{'':12}{'first':>10}{'last':>10}{'per hour':>12}"], []
    for name in ("rss_mib", "descriptors", "threads", "shared", "children", "temporary"):
        first, last, growth = getattr(settled[0], name), getattr(settled[-1], name), slope(settled, name)
        lines.append(f"{name:12}{first:10.1f}{last:10.1f}{growth:+12.2f}")
        if name == "rss_mib":
            if growth > PER_HOUR * first and last - first > MARGIN_MIB:
                wrong.append(f"memory grows by {growth / first:.1%} an hour")
        elif (least := min(_of(settled[-third:], name))) > (most := max(_of(settled[:third], name))):
            wrong.append(f"{name} grew from {most} to {least}")
    if settled[-1].children:
        wrong.append(f"{settled[-1].children} processes are left behind")
    return lines, wrong


def one_round(number: int, seed: str, root: Path, corpus: str) -> dict[str, Any]:
    """What happened in a round; raises if a run does not end as the undisturbed one."""
    import random
    import shutil

    import yaml
    from tests.cases import SMALL_AUG
    from tests.conftest import new_folder, settings
    from tests.trust.faults import Aim, differences, digests, job_of, train

    from counterpoise.compare import compare
    from counterpoise.config import resolve
    from counterpoise.engine.local import run_local
    from counterpoise.start import Settings

    rng = random.Random(f"{seed}/{number}")
    place = root / "round"
    place.mkdir()
    content = settings(corpus, method=SMALL_AUG, seed=number % 5)
    experiment, provenance = resolve(content)
    whole, hit = (new_folder(place, experiment, provenance).uri for _ in range(2))
    run_local([job_of(experiment, whole)])
    aim = Aim("kill", "step", rng.randrange(3, 24))
    killed = train(job_of(experiment, hit), place, 1, [aim])
    where = aim.landed(place)
    if where is None or killed.codes != [-9]:
        raise AssertionError(f"the kill did not land: {killed.said}")
    run_local([job_of(experiment, hit, resume=True)])
    if wrong := differences(hit, digests(whole)):
        raise AssertionError(f"round {number}, killed at step {where['step']}: {wrong}")
    file = place / "small.yaml"
    file.write_text(yaml.safe_dump({**content, "epochs": 1}))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        fine = compare(
            experiment=str(file),
            methods="joint,late",
            settings=Settings(device="cpu", threads=1),
            runs=str(place),
            name="compared",
            seeds=1,
        )
    if not fine:
        raise AssertionError(said.getvalue())
    shutil.rmtree(place)
    return {"round": number, "step": where["step"]}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--hours", type=float, default=8.0)
    options.add_argument("--seed", default="0")
    options.add_argument("--log", help="a file for what every round found, as JSON lines")
    asked = options.parse_args()
    from tests.conftest import write_corpus

    began, looks = time.monotonic(), list[Look]()
    with tempfile.TemporaryDirectory(prefix="counterpoise-soak-") as folder:
        temporary = Path(folder) / "temporary"  # of this process and all it starts, so that what stays is seen
        temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        os.environ.setdefault("COUNTERPOISE_TRUST_LOG", str(Path(folder) / "faults.jsonl"))
        corpus = write_corpus(Path(folder) / "corpus")
        number = 0
        while time.monotonic() - began < 3600 * asked.hours or len(looks) < 4:
            happened = one_round(number, asked.seed, Path(folder), corpus)
            looks.append(look(began, str(temporary)))
            if asked.log:
                with open(asked.log, "a") as file:
                    file.write(json.dumps({**happened, **asdict(looks[-1])}) + "\n")
            if number % 20 == 0:
                now = looks[-1]
                print(
                    f"round {number}: {now.rss_mib:.0f} MiB, {now.descriptors} descriptors, {now.threads} threads",
                    flush=True,
                )
            number += 1
        lines, wrong = verdict(looks)
    print(f"\n{len(looks)} rounds in {looks[-1].hours:.2f} h; after the first {WARM:.0%} of them:")
    print("\n".join(lines))
    print("\n".join(f"TOO MUCH: {text}" for text in wrong) or "nothing keeps growing")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
