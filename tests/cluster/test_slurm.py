"""The Slurm script, executed: with stand-ins for Slurm's commands that run things on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cluster.shipped import CLUSTER, ROOT, read

SCRIPT = CLUSTER / "slurm" / "counterpoise.sbatch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = [SCRIPT, *sorted(CLUSTER.rglob("*.sh"))]
PATIENCE_S = 60

# srun OPTIONS COMMAND: options begin with "--", and the command runs here.
SRUN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS/srun"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' a1 a2; else echo "$*" >>"$CALLS/scontrol"; fi
"""
# Ray that starts nothing: `ray start --block` stays until it is told to go.
RAY = """#!/usr/bin/env bash
stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$CALLS/token-mode"
echo "$RAY_AUTH_MODE $*" >>"$CALLS/ray"
trap 'exit 0' TERM
while true; do sleep 0.05; done
"""
# The program that is run: leaves a run as training would, and waits for a signal if it is to.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path

calls = Path(os.environ["CALLS"])
with open(calls / "train", "a") as file:
    print(*sys.argv[1:], file=file)
name = sys.argv[sys.argv.index("--name") + 1]
folder = Path("runs") / name
folder.mkdir(parents=True, exist_ok=True)
(folder / "run.json").write_text("{}")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(calls / "ready").touch()
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")))
"""


class Job:
    """A checkout and a Slurm in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        for sub in ("calls", "bin", "home", "venv/bin", "checkout/trainables", "checkout/cluster"):
            (folder / sub).mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            self._program(folder / "bin" / name, text)
        self._program(folder / "venv" / "bin" / "ray", RAY)
        # What asks Ray whether all nodes have joined comes by standard input.
        python = f'#!/usr/bin/env bash\nif [[ $1 == - ]]; then exit "${{JOINED:-0}}"; fi\nexec {sys.executable} "$@"\n'
        self._program(folder / "venv" / "bin" / "python", python)
        (folder / "checkout/trainables/train.py").write_text(PROGRAM)
        (folder / "checkout/platform").symlink_to(ROOT / "platform")
        (folder / "checkout/cluster/again.py").symlink_to(CLUSTER / "again.py")

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAY_", "AWS_"))}
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env={
                **kept,
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "HOME": str(self.folder / "home"),
                "CALLS": str(self.calls),
                "COUNTERPOISE_VENV": str(self.folder / "venv"),
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NAME": "work",
                "SLURM_JOB_NODELIST": "a[1-2]",
                "SLURM_SUBMIT_DIR": str(self.folder / "checkout"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output

    def noted(self, name: str) -> list[str]:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_until_it_trains(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while not (self.calls / "ready").exists():
            assert time.monotonic() < end, "the command did not start"
            time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_content(script: Path) -> None:
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_head_and_workers_are_started_and_ended_around_the_command(job: Job) -> None:
    code, output = job.run("trainables/train.py", "a.yaml", "--workers", "4")
    assert code == 0, output
    assert job.noted("train") == ["--name work-7 --auto-resume a.yaml --workers 4"]
    head, workers = sorted(job.noted("ray"), key=lambda line: "--head" not in line)
    assert "token start --block" in head
    assert "--dashboard-host=127.0.0.1" in head
    address = re.search(r"--node-ip-address=(\S+) --port=(\d+)", head)
    assert address
    assert f"--address={address[1]}:{address[2]}" in workers
    started = [line for line in job.noted("srun") if "ray start" in line]
    assert any("--nodelist=a1" in line for line in started)
    assert any("--exclude=a1" in line and "--ntasks=1 " in line for line in started)
    assert job.noted("scontrol") == [], "what is done is not queued again"
    assert "rm -rf /tmp/ray-7" in job.noted("srun")[-1]


def test_the_token_is_private_and_gone_afterwards(job: Job) -> None:
    job.run("trainables/train.py")
    assert set(job.noted("token-mode")) == {"600"}
    assert list((job.folder / "home").iterdir()) == []
    assert not any(re.search("[0-9a-f]{64}", line) for name in ("srun", "ray", "train") for line in job.noted(name))


def test_time_that_is_up_ends_in_a_checkpoint_and_a_requeue_that_resumes(job: Job) -> None:
    process = job.start("trainables/train.py", "a.yaml", "--wait")
    job.wait_until_it_trains()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, output
    assert job.noted("scontrol") == ["requeue 7"]
    code, output = job.run("trainables/train.py", "a.yaml", SLURM_RESTART_COUNT="1")
    assert code == 0, output
    assert job.noted("train")[-1] == "--name work-7 --auto-resume a.yaml", "the same command, on the same run"


def test_a_sweep_is_resumed_when_it_is_there(job: Job) -> None:
    (job.folder / "checkout/trainables/sweep.py").write_text(PROGRAM)
    job.run("trainables/sweep.py", "a.yaml")
    (job.folder / "checkout/runs/work-7/sweep.json").write_text("{}")
    job.run("trainables/sweep.py", "a.yaml", SLURM_RESTART_COUNT="1")
    assert job.noted("train") == ["--name work-7 a.yaml", "--name work-7 a.yaml --resume"]


def test_a_job_that_is_stopped_for_good_does_not_come_back(job: Job) -> None:
    process = job.start("trainables/train.py", "--wait")
    job.wait_until_it_trains()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output
    assert job.noted("scontrol") == []


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_error_is_the_jobs_own_and_is_not_repeated(job: Job, code: int) -> None:
    found, output = job.run("trainables/train.py", CODE=str(code))
    assert found == code, output
    assert job.noted("scontrol") == []
    assert "/tmp/ray-7 on every node" in output
    assert list((job.folder / "home").iterdir()) == [], "the token goes in any case"


def test_nodes_that_do_not_join_end_the_job(job: Job) -> None:
    code, _ = job.run("trainables/train.py", JOINED="1")
    assert code == 4
    assert job.noted("train") == []


def test_what_is_missing_is_said_at_once(job: Job) -> None:
    code, output = job.run("trainables/training.py")
    assert code == 2
    assert "trainables/training.py is not in" in output
    code, output = job.run("trainables/train.py", COUNTERPOISE_VENV="/nowhere")
    assert code == 4
    assert "no Ray in /nowhere" in output
    assert job.noted("srun") == []


def test_nodes_have_the_settings_of_the_runtime_environment() -> None:
    set_here = dict(re.findall(r"\b([A-Z]\w+)=(\S+)", SCRIPT.read_text()))
    for name, value in read("runtime_env.yaml")["env_vars"].items():
        if name not in ("PYTHONPATH", "RAY_JOB_STOP_WAIT_TIME_S"):  # of jobs that are submitted
            assert set_here[name] == value


# --- going on


def again(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text("import sys; print(*sys.argv[1:])")
    command = [sys.executable, CLUSTER / "again.py", "program.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_sweep_that_is_there_already_is_resumed(tmp_path: Path) -> None:
    assert again(tmp_path, "--name", "a", "--runs", "there").stdout == "--name a --runs there\n"
    (tmp_path / "there" / "a").mkdir(parents=True)
    (tmp_path / "there" / "a" / "sweep.json").write_text("{}")
    assert again(tmp_path, "--name", "a", "--runs", "there").stdout == "--name a --runs there --resume\n"
    assert again(tmp_path, "--name=a", "--runs=there").stdout == "--name=a --runs=there --resume\n"
    assert again(tmp_path, "--name", "b", "--runs", "there").stdout == "--name b --runs there\n"


def test_a_sweep_without_a_name_cannot_be_found_again(tmp_path: Path) -> None:
    done = again(tmp_path, "a.yaml")
    assert done.returncode == 1
    assert "--name" in done.stderr
