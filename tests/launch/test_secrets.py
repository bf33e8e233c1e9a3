"""Jobs on a cluster that wants a token, with secrets in every environment: they work, and nothing writes one down."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tests.conftest import settings, write_corpus
from tests.launch.nodes import Nodes, as_client, wait_for

from counterpoise import storage
from counterpoise.contracts import RefusedError
from counterpoise.engine.run import RunFolder
from counterpoise.launch import submit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # servers and clients warn of their own
]

PLANTED = {
    "AWS_ACCESS_KEY_ID": f"AKIA{secrets.token_hex(8).upper()}",
    "AWS_SECRET_ACCESS_KEY": f"planted-aws-{secrets.token_hex(8)}",
    "AWS_SESSION_TOKEN": f"planted-session-{secrets.token_hex(8)}",
    "GRAFANA_TOKEN": f"glsa_{secrets.token_hex(16)}",
    "HF_TOKEN": f"hf_{secrets.token_hex(16)}",
    "WANDB_API_KEY": f"planted-wandb-{secrets.token_hex(8)}",
}
PASSWORD = f"planted-password-{secrets.token_hex(8)}"  # of a server's URL


@dataclass
class Place:
    nodes: Nodes
    bucket: str
    work: Path  # of the researcher: an experiment, and no checkout

    def command(self, *words: str) -> subprocess.Popen[str]:
        """`counterpoise ...` as a person has it started, elsewhere."""
        output = open(self.work / f"said-{uuid.uuid4().hex[:6]}.txt", "w")  # noqa: SIM115
        with output:
            return subprocess.Popen(
                [sys.executable, "-m", "counterpoise", *words],
                env=self.nodes.environment,
                cwd=self.work,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def said(self) -> str:
        """What all commands have printed."""
        return "\n".join(file.read_text() for file in self.work.glob("said-*.txt"))

    def submit(self, *words: str) -> subprocess.Popen[str]:
        return self.command("submit", "--address", self.nodes.dashboard, *words)

    def written(self) -> dict[str, bytes]:
        """Every byte that was written somewhere, and what the cluster says about its jobs."""
        found = {f"printed {file.name}": file.read_bytes() for file in self.work.glob("said-*.txt")}
        for name in storage.list_files(self.bucket):
            found[f"s3 {name}"] = storage.read_bytes(storage.join(self.bucket, name))
        roots = [self.nodes._root, self.nodes.folder]
        for root in roots:
            for file in root.rglob("*"):
                if file.is_file() and not file.is_symlink() and file.name != "token":
                    found[f"ray {file.relative_to(root)}"] = file.read_bytes()
        with as_client(self.nodes):
            client = submit.connect(self.nodes.dashboard)
            for job in submit.submitted(client):
                found[f"api {job.submission_id}"] = job.model_dump_json().encode()
                found[f"log {job.submission_id}"] = client.get_job_logs(job.submission_id).encode()
        return found


@pytest.fixture(scope="module")
def place(moto: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A head and a worker node whose environments hold all secrets, as a bucket does corpus and runs."""
    import fsspec

    root = tmp_path_factory.mktemp("jobs")
    (work := root / "work").mkdir()
    planted = {**PLANTED, "AWS_ENDPOINT_URL_S3": moto, "AWS_DEFAULT_REGION": "us-east-1"}
    planted["AWS_ENDPOINT_URL"] = f"http://planted:{PASSWORD}@127.0.0.1:9"  # that of S3 wins
    planted |= {"AWS_EC2_METADATA_DISABLED": "true", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("AWS_", "COUNTERPOISE_"))]:
            patch.delenv(name)
        for name, value in planted.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket = f"s3://jobs-{uuid.uuid4().hex}"
        storage.filesystem("s3://x")[0].mkdir(bucket.removeprefix("s3://"))
        corpus = write_corpus(root / "corpus")
        for file in Path(corpus).iterdir():
            storage.write_bytes(f"{bucket}/corpus/{file.name}", file.read_bytes())
        content = {**settings(corpus, epochs=4000), "corpus": f"{bucket}/corpus"}
        (work / "mine.yaml").write_text(yaml.safe_dump(content))
        slow = {"RAY_raylet_start_wait_time_s": "120"}  # the machine may be busy
        with Nodes(head=1, workers=(2,), quick=False, environment={**planted, **slow}) as nodes:
            yield Place(nodes, bucket, work)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def run(place: Place) -> tuple[int, RunFolder]:
    """A run that was sent from outside of the checkout and stopped in its second epoch or later: exit code, folder."""
    runs = f"{place.bucket}/runs"
    following = place.submit("--grace", "60", "train", "mine.yaml", "--runs", runs, "--name", "a1")
    wait_for(lambda: "epoch " in place.said() or following.poll() is not None, 300, "for an epoch")
    assert following.poll() is None, place.said() + place.nodes.logs()
    stopping = place.command("jobs", "stop", "a1", "--address", place.nodes.dashboard)
    assert stopping.wait(180) == 0, place.said()
    return following.wait(90), RunFolder.open(f"{runs}/a1")


def test_a_stopped_job_writes_a_checkpoint_and_asks_to_be_continued(place: Place, run: tuple[int, RunFolder]) -> None:
    code, folder = run
    assert code == 75, place.said()
    assert folder.state() == "interrupted"
    assert [r["event"] for r in folder.records() if r["kind"] == "event"][-1] == "interrupted"
    assert "a checkpoint is written, continue with --resume" in place.said()
    assert "by force" not in place.said()


def test_the_code_that_was_sent_has_run(place: Place, run: tuple[int, RunFolder]) -> None:
    assert run[1].manifest["argv"][:2] == ["train", "submitted/mine.yaml"]
    assert run[1].manifest["engine"] == "ray"


def test_a_job_evaluates_the_run_and_ends_with_its_exit_code(place: Place, run: tuple[int, RunFolder]) -> None:
    done = place.submit("--name", "eval", "evaluate", run[1].uri, "--split", "valid")
    failing = place.submit("evaluate", f"{place.bucket}/runs/nothing")
    assert done.wait(300) == 0, place.said()
    # In Ray's own file: where nodes share a machine, Ray reads the logs of drivers from the folder of the head alone.
    # That the log of a driver on another machine is followed: tests/launch/test_nodes.py.
    log = b"".join(data for name, data in place.written().items() if "job-driver-eval-" in name).decode()
    assert re.search(r"a1, epoch \d+, valid of s3://\S+: 60 samples", log), place.said()
    assert storage.exists(run[1].at("evaluation-valid.json"))
    assert failing.wait(300) == 3, "that of a run that is not there"


def test_no_secret_is_written_anywhere(place: Place, run: tuple[int, RunFolder]) -> None:
    token = Path(place.nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    planted = {**PLANTED, "Ray's token": token, "the password in a URL": PASSWORD}
    found = place.written()
    kinds = [name.split()[0] for name in found]
    assert {"s3", "ray", "printed", "api", "log"} <= set(kinds)
    assert any("job-driver-a1" in name for name in found), "Ray's logs of the job are among it"
    assert any(name.endswith("counterpoise/cli.py") for name in found), "what was sent is among it"
    leaks = [f"{what} in {name}" for what, value in planted.items() for name in found if value.encode() in found[name]]
    assert leaks == []


def test_the_search_finds_what_is_planted(place: Place, run: tuple[int, RunFolder]) -> None:
    """The control: a job by Ray's own means carries a secret in its environment and prints another."""
    control, shown = f"control-{secrets.token_hex(8)}", f"shown-{secrets.token_hex(8)}"
    order = submit.Order(["train"], "control", env={"MY_TOKEN": control})
    with pytest.raises(RefusedError, match="MY_TOKEN"):
        submit.refuse_secrets(order)
    storage.write_text(f"{place.bucket}/runs/note.txt", control)
    with as_client(place.nodes):
        client = submit.connect(place.nodes.dashboard)
        job = client.submit_job(entrypoint=f"echo {shown}", runtime_env={"env_vars": {"MY_TOKEN": control}})
        wait_for(lambda: client.get_job_info(job).status.is_terminal(), 60)
        assert client.get_job_info(job).driver_exit_code == 0
    found = place.written()
    where = {name.split()[0] for name in found if control.encode() in found[name]}
    assert {"s3", "api", "ray"} <= where
    where = {re.sub(r"\d.*", "", name) for name in found if shown.encode() in found[name]}
    assert any(name.startswith("ray") for name in where), "Ray's own log of a job"
