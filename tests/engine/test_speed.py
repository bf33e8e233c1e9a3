"""What makes steps fast and starts quick, as far as it can be seen without a clock."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.cases import SMALL
from tests.conftest import settings
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoise.config import resolve
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import open_data
from counterpoise.engine.loop import RunOptions, Trainer
from counterpoise.engine.run import RunFolder

# OPM draws what it drops from a probability that is a number; MAIE asks which modality is ahead.
READ_NUMBERS = {"opm", "maie"}


class _Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers that are read, tensors whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_reads_no_number_from_the_device_but_where_the_rule_is_made_of_numbers(
    name: str, corpus: str, tmp_path: Any
) -> None:
    experiment = resolve(settings(corpus, method=SMALL[name]))[0]
    data = open_data(experiment)
    folder = RunFolder.create(str(tmp_path), name, experiment_text="", provenance={}, manifest={})
    folder.acquire()
    trainer = Trainer(experiment, data, SingleComm(), folder, RunOptions())
    trainer._begin()
    trainer.method.begin_epoch(trainer.net, trainer._context())
    trainer.device = torch.device("meta")  # no CPU: there a loss that is not finite is looked for after every step
    batch = next(iter(data.train_batches(1)))
    trainer.train_batch(batch)
    with _Reads() as reads:
        trainer.train_batch(batch)
    data.close()
    folder.release()
    assert bool(reads.seen) == (name in READ_NUMBERS), reads.seen


def test_training_imports_neither_torchs_compiler_nor_pandas_before_the_first_step(corpus: str, tmp_path: Any) -> None:
    """Each takes longer than all of this package."""
    code = f"""
import sys
from counterpoise.engine.loop import Trainer
step = Trainer.train_batch
def watched(self, batch):
    step(self, batch)
    found = [name for name in ("torch._dynamo", "pandas", "sklearn", "ray", "transformers") if name in sys.modules]
    print("after a step:", found)
    raise SystemExit(0)
Trainer.train_batch = watched
from counterpoise.cli import main
sys.argv = ["counterpoise", "train", "{tmp_path}/e.yaml", "--runs", "{tmp_path}/runs", "--device", "cpu"]
main()
"""
    (tmp_path / "e.yaml").write_text(f"corpus: {corpus}\nmethod: joint\nepochs: 1\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "after a step: []" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.parametrize(("device", "tuned", "again"), [("cpu", "", 0), ("cpu", "131072", 10), ("cuda", "", 10)])
def test_a_step_on_a_cpu_gets_the_memory_of_those_before(device: str, tuned: str, again: int) -> None:
    """Pages that the system gave for ten blocks of 64 MiB, each freed before the next. Users' own tuning holds."""
    code = f"""
import resource, torch
from counterpoise.engine.memory import reuse_memory
reuse_memory("{device}")
def ten_blocks():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.full((2**24,), 1.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**26
ten_blocks()
print(ten_blocks())
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"MALLOC_TRIM_THRESHOLD_": tuned} if tuned else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert float(done.stdout) == pytest.approx(again, abs=1), done.stdout + done.stderr
