"""`counterpoise submit` and `jobs`, against a job server that speaks as Ray's does, on loopback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.launch.jobserver import JobServer, job_server, sent
from typer.main import get_command

from counterpoise import cli, storage
from counterpoise import jobs as planning
from counterpoise.contracts import ConfigError, DataError, RefusedError, ResourceError
from counterpoise.launch import submit as cluster

pytestmark = pytest.mark.filterwarnings("default")  # of Ray's client

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = "trainables/experiments/av_digits.yaml"
TRAIN = ("train", EXPERIMENT, "--name", "a1")


@pytest.fixture(scope="module")
def one_server() -> Iterator[JobServer]:
    with job_server() as server:
        yield server


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one: ours takes a moment to pack, and what lies about in it is not known."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("platform/counterpoise", "trainables/experiments", "cluster", "tests", ".git", "datasets/x"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "cluster/runtime_env.yaml", root / "cluster")
    shutil.copy(ROOT / EXPERIMENT, root / EXPERIMENT)
    for name in (".env", "server.pem", "tests/a.py", ".git/config", "datasets/x/a.parquet", "datasets/x/corpus.yaml"):
        (root / name).write_text("x")
    (root / "platform/counterpoise/cli.py").write_text("x")
    return root


@pytest.fixture
def server(one_server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkout: Path) -> JobServer:
    """As new, and nothing of this machine's environment."""
    one_server.__init__(url=one_server.url)  # type: ignore[misc]
    for name in list(os.environ):
        if name.startswith(("RAY_", "AWS_", "COUNTERPOISE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(planning, "checkout", lambda: checkout)
    monkeypatch.setattr(storage, "exists", lambda uri: False)  # of runs in the buckets that are named below
    return one_server


@pytest.fixture
def submit(server: JobServer, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """submit("train", ..., flags=[...]) -> exit code, standard output, standard error."""

    def call(*words: str, flags: tuple[str, ...] = (), runs: bool = True) -> tuple[int, str, str]:
        capfd.readouterr()
        place = ("--runs", "s3://bucket/runs") if runs else ()
        with pytest.raises(SystemExit) as ended:
            cli.main(["submit", "--address", server.url, *flags, "--", *words, *place])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def plan(*words: str, **options: Any) -> cluster.Order:
    options.setdefault("say", lambda text: None)
    return planning.plan(planning.parse(get_command(cli.app), words), **options)


def contents(server: JobServer) -> zipfile.ZipFile:
    (package,) = server.packages.values()
    return zipfile.ZipFile(io.BytesIO(package))


# --- what is sent


def test_a_job_is_the_command_with_a_name_and_time_to_stop(submit: Any, server: JobServer) -> None:
    code, out, err = submit("train", EXPERIMENT, "--workers", "4", flags=("--name", "a1", "--grace", "90"))
    assert code == 0, err
    assert out == "one\ntwo\n"
    job = sent(server)
    words = f"train {EXPERIMENT} --workers 4 --runs s3://bucket/runs --name a1 --engine ray"
    assert job["entrypoint"] == f"python -m counterpoise {words}"
    assert job["submission_id"].startswith("a1-")
    assert job["metadata"] == {"job_name": "a1", "place": "s3://bucket/runs/a1", "grace_s": "90"}
    wanted = yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())["env_vars"]
    assert job["runtime_env"]["env_vars"] == {**wanted, "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    assert f"counterpoise {words}" in err
    assert "exit code 0" in err


def test_the_checkout_is_sent_without_what_nodes_do_not_need(submit: Any, server: JobServer) -> None:
    assert submit(*TRAIN)[0] == 0
    found = {name for name in contents(server).namelist() if not name.startswith("cluster/")}
    assert found == {EXPERIMENT, "platform/counterpoise/cli.py", "datasets/x/corpus.yaml"}


def test_our_own_checkout_is_small_enough_to_send(tmp_path: Path) -> None:
    runtime_env = yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())
    order = cluster.Order(["train"], "a1", folder=ROOT, code=False, runtime_env=runtime_env)
    assert cluster.pack(order, tmp_path / "code.zip") < 20 * 2**20
    names = zipfile.ZipFile(tmp_path / "code.zip").namelist()
    assert {"platform/counterpoise/cli.py", "trainables/train.py", "datasets/cremad/corpus.yaml"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", ".git/", ".venv/"))]


def test_files_from_elsewhere_travel_beside_the_checkout(submit: Any, server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "base.yaml").write_text((ROOT / EXPERIMENT).read_text())
    sweep = {"experiment": "../base.yaml", "vary": {"optim.lr": [0.1, 0.2]}, "seeds": [0]}
    (tmp_path / "sweeps/lr.yaml").write_text(yaml.safe_dump(sweep))
    assert submit("sweep", str(tmp_path / "sweeps/lr.yaml"), "--name", "lr")[0] == 0
    assert "counterpoise sweep submitted/sweeps/lr.yaml --name lr" in sent(server)["entrypoint"]
    found = contents(server)
    assert found.read("submitted/base.yaml") == (tmp_path / "base.yaml").read_bytes()
    assert "platform/counterpoise/cli.py" in found.namelist()


def test_an_installed_package_sends_itself(server: JobServer, tmp_path: Path) -> None:
    """As `pip install` leaves it: no checkout, the package's folders copied into it."""
    site = tmp_path / "site"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "platform/counterpoise", site / "counterpoise", ignore=skipped)
    shutil.copytree(ROOT / "datasets", site / "counterpoise/recipes", ignore=skipped)
    shutil.copy(ROOT / "cluster/runtime_env.yaml", site / "counterpoise/launch")
    shutil.copy(ROOT / EXPERIMENT, tmp_path / "mine.yaml")
    words = ["--address", server.url, "train", "mine.yaml", "--runs", "/mnt/runs", "--name", "a1"]
    done = subprocess.run(
        [sys.executable, "-m", "counterpoise", "submit", "--shared", *words],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = contents(server).namelist()
    assert {"counterpoise/cli.py", "counterpoise/recipes/cremad/corpus.yaml", "submitted/mine.yaml"} <= set(names)
    assert all(name.startswith(("counterpoise/", "submitted/")) for name in names)
    assert not [name for name in names if name.endswith(".pyc")]
    assert "PYTHONPATH" not in sent(server)["runtime_env"]["env_vars"], "the folder that is sent is on the path"


def test_the_wheel_holds_the_runtime_environment() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert '"cluster/runtime_env.yaml" = "counterpoise/launch/runtime_env.yaml"' in project


def test_what_is_too_large_is_named_before_it_is_sent(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "big.bin").write_bytes(os.urandom(2 * 2**20))
    shutil.copy(ROOT / EXPERIMENT, tmp_path / "e.yaml")
    monkeypatch.setattr(cluster, "MAX_PACKAGE_BYTES", 2**20)
    work = ("--working-dir", str(tmp_path))
    code, _, err = submit("train", str(tmp_path / "e.yaml"), flags=work)
    assert code == 6
    assert "MiB would be sent, and a cluster takes 1 at most" in err
    assert "big.bin (2 MiB)" in err
    assert not server.jobs


def test_another_folder_is_sent_with_this_package(submit: Any, server: JobServer, tmp_path: Path) -> None:
    shutil.copy(ROOT / EXPERIMENT, tmp_path / "e.yaml")
    (tmp_path / "part.parquet").write_text("x")
    assert submit("train", str(tmp_path / "e.yaml"), "--name", "a1", flags=("--working-dir", str(tmp_path)))[0] == 0
    assert "counterpoise train e.yaml" in sent(server)["entrypoint"]
    names = contents(server).namelist()
    assert {"e.yaml", "part.parquet", "counterpoise/cli.py", "counterpoise/recipes/cremad/corpus.yaml"} <= set(names)


def test_variables_of_this_shell_become_flags(submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPOISE_RUNS", "s3://mine/runs")
    monkeypatch.setenv("COUNTERPOISE_HOME", "s3://mine/home")
    assert submit(*TRAIN, runs=False)[0] == 0
    assert "--runs s3://mine/runs" in sent(server)["entrypoint"]
    assert sent(server)["runtime_env"]["env_vars"]["COUNTERPOISE_HOME"] == "s3://mine/home"


def test_a_dry_run_sends_nothing(submit: Any, server: JobServer) -> None:
    code, out, err = submit(*TRAIN, flags=("--dry-run",))
    assert (code, out) == (0, "")
    assert "nothing was sent" in err
    assert not server.jobs
    assert not server.packages


def test_a_detached_job_prints_its_id(submit: Any, server: JobServer) -> None:
    code, out, err = submit(*TRAIN, flags=("--detach",))
    assert code == 0
    assert out.strip() == sent(server)["submission_id"]
    assert f"counterpoise jobs logs -f {out.strip()}" in err


def test_evaluation_gets_a_cpu_because_the_driver_does_it(submit: Any, server: JobServer) -> None:
    code, _, err = submit("evaluate", "s3://bucket/runs/a1", "--split", "valid", runs=False)
    assert code == 0, err
    assert sent(server)["entrypoint"] == "python -m counterpoise evaluate s3://bucket/runs/a1 --split valid"
    assert sent(server)["entrypoint_num_cpus"] == 1


# --- what is refused here, before a cluster is asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", EXPERIMENT], "did you mean 'train'"),
        (["train", "trainables/experiments/av_digit.yaml", "--runs", "s3://b/r"], "did you mean"),
        (["train", EXPERIMENT], "--runs is missing"),
        (["train", EXPERIMENT, "--runs", "out"], "--runs is 'out', on one machine"),
        (["train", EXPERIMENT, "--runs", "/mnt/runs"], "say --shared"),
        (["train", EXPERIMENT, "--runs", "s3://b/r", "--address", "auto"], "--address belongs before the command"),
        (["train", EXPERIMENT, "--runs", "s3://b/r", "--set", "optim.lr=-1"], "optim.lr"),
        (["train", EXPERIMENT, "--runs", "s3://b/r", "--set", "corpus=/data/mine"], "a place of this machine"),
        (["train", "--runs", "s3://b/r"], "takes a file"),
        (["sweep", "--runs", "s3://b/r", "--name", "x"], "takes a file"),
        (["evaluate", "runs/a1"], "RUN of evaluate is 'runs/a1'"),
        (["corpora", "prepare", "cremad", "--raw", "/data", "--out", "s3://b/c"], "--raw is '/data'"),
        (["corpora", "prepare", "av_digits"], "--out is missing"),
        (["predict", "s3://b/m", "s3://b/d", "--out", "found"], "--out is 'found'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_only_this_machine_can_reach_is_refused(server: JobServer, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        plan(*words)


def test_a_mounted_folder_is_taken_if_it_is_said_to_be_one(server: JobServer) -> None:
    order = plan(*TRAIN, "--runs", "/mnt/runs", shared=True)
    assert order.place == "/mnt/runs/a1"


def test_a_card_in_the_checkout_whose_files_lie_in_a_bucket_is_taken(
    server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    card = yaml.safe_load((ROOT / "datasets/av_digits/corpus.yaml").read_text())
    for split in card["splits"].values():
        split["files"] = "s3://bucket/digits/x-*.parquet"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/corpus.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.chdir(tmp_path)
    planning._check_corpus("./mine", tmp_path, False, False, print)
    with pytest.raises(ConfigError):
        planning._check_corpus("./mine", ROOT, False, False, print)


def test_options_of_the_command_are_checked_by_the_command(submit: Any, server: JobServer) -> None:
    code, _, err = submit("train", EXPERIMENT, "--wrokers", "4")
    assert code == 2
    assert "--wrokers" in err
    assert not server.requests


def test_a_run_that_exists_is_continued_with_resume(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: set[str] = {"s3://bucket/runs/a1/run.json"}
    monkeypatch.setattr(storage, "exists", lambda uri: uri in there)
    code, _, err = submit(*TRAIN)
    assert code == 6
    assert "continue it with --resume" in err
    assert submit("train", "--resume", "--name", "a1")[0] == 0
    assert sent(server)["entrypoint"].endswith("train --resume --name a1 --runs s3://bucket/runs --engine ray")
    there.clear()
    assert submit("train", "--resume", "--name", "a1")[0] == DataError.exit_code


def test_a_bucket_that_cannot_be_seen_from_here_stops_nothing(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(uri: str) -> bool:
        raise ResourceError("no credentials")

    monkeypatch.setattr(storage, "exists", denied)
    code, _, err = submit(*TRAIN)
    assert code == 0
    assert "note: not looked whether s3://bucket/runs/a1 exists (no credentials)" in err


def test_two_jobs_do_not_write_one_run(submit: Any, server: JobServer) -> None:
    first = server.start_job(metadata={"place": "s3://bucket/runs/a1", "job_name": "a1"})
    code, _, err = submit(*TRAIN)
    assert code == 6
    assert f"job {first} is writing s3://bucket/runs/a1 already" in err
    server.jobs[first]["status"] = "STOPPED"
    assert submit(*TRAIN)[0] == 0


# --- secrets


@pytest.mark.parametrize(
    "words",
    [
        ["--env", "AWS_SECRET_ACCESS_KEY=abc"],
        ["--env", "AWS_SECRET_ACCESS_KEY=/keys/may/begin/with/a/slash"],
        ["--env", "WANDB_API_KEY=0123456789"],
        ["--env", "AWS_ENDPOINT_URL_S3=http://user:pw@minio:9000"],
        ["--env", "NOTE=glsa_0123456789abcdefghij"],
        ["--", "train", EXPERIMENT, "--name", "a1", "--set", "corpus=s3://me:pw@bucket/c"],
        ["--", "train", EXPERIMENT, "--name", "a1", "--set", "modalities.audio.token=hf_0123456789abcdefghij"],
        ["--", "train", EXPERIMENT, "--name", "canary-value-7431"],
    ],
    ids=lambda words: words[-1],
)
def test_secrets_are_refused_before_anything_is_sent(
    submit: Any, server: JobServer, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFANA_TOKEN", "canary-value-7431")
    flags = words[:-1] if "--" not in words else []
    command = words[words.index("--") + 1 :] if "--" in words else list(TRAIN)
    code, _, err = submit(*command, flags=(*flags, words[-1]) if flags else ())
    assert code in (2, 6), err
    assert not server.requests, "not even asked"
    assert "pw@" not in err
    assert "glsa_0" not in err


def test_paths_of_secrets_are_no_secrets(submit: Any, server: JobServer) -> None:
    code, _, err = submit(*TRAIN, flags=("--env", "AWS_SHARED_CREDENTIALS_FILE=/run/secrets/aws"))
    assert code == 0, err


@pytest.mark.parametrize("where", ["variable", "token file"])
def test_a_file_that_holds_a_known_secret_is_not_sent(
    submit: Any, server: JobServer, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(ROOT / EXPERIMENT, work / "e.yaml")
    (work / "notes.txt").write_text("remember /canary-value-7431")
    if where == "variable":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/canary-value-7431")
    else:
        (tmp_path / "token").write_text("canary-value-7431\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    code, _, err = submit("train", str(work / "e.yaml"), flags=("--working-dir", str(work)))
    assert code == 6
    assert "notes.txt would be sent" in err
    assert "7431" not in err
    assert not server.packages
    (work / ".rayignore").write_text("notes.txt\n")
    assert submit("train", str(work / "e.yaml"), flags=("--working-dir", str(work)))[0] == 0


# --- the way to the cluster


def test_a_token_is_sent_only_to_a_cluster_that_asks(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef\n")
    assert submit(*TRAIN)[0] == 0
    assert {given for *_, given in server.requests} == {""}
    server.requests.clear()
    server.token = "0123456789abcdef"
    assert submit(*TRAIN)[0] == 0
    assert {given for _, path, given in server.requests if path != "/api/authentication_mode"} == {
        "Bearer 0123456789abcdef"
    }
    assert {p.rsplit("/", 1)[-1] for _, p, _ in server.requests} >= {"version", "tail"}, "the log too"


def test_a_missing_and_a_wrong_token_are_told_apart(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "0123456789abcdef"
    code, _, err = submit(*TRAIN)
    assert code == 4
    assert "asks for a token, and there is none here" in err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token-here")
    code, _, err = submit(*TRAIN)
    assert code == 4
    assert "does not accept the token of RAY_AUTH_TOKEN" in err
    assert "wrong-token" not in err
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    assert "there is no such file" in submit(*TRAIN)[2]


def test_an_old_cluster_is_refused(submit: Any, server: JobServer) -> None:
    server.version = "2.9.3"
    code, _, err = submit(*TRAIN)
    assert code == 4
    assert "runs Ray 2.9.3" in err
    assert cluster.RAY_NEEDED in err


def test_the_version_needed_is_that_of_the_package() -> None:
    assert f"ray[default,data,train,tune]{cluster.RAY_NEEDED}" in (ROOT / "pyproject.toml").read_text()


def test_no_cluster_and_something_else_are_told_apart(server: JobServer, moto: str) -> None:
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at http://127.0.0.1:9 \(Connection refused\)"):
        cluster.connect("http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="is no dashboard of Ray"):
        cluster.connect(moto)


def test_the_flag_wins_over_the_environment(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    assert cluster.address_of(None) == "http://10.0.0.1:8265"
    assert cluster.connect(server.url).get_address() == server.url
    assert os.environ["RAY_ADDRESS"] == "http://10.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is '10.0.0.1:6379'.*dashboard"):
        cluster.address_of(None)
    with pytest.raises(ConfigError, match="holds a user or password"):
        cluster.address_of("http://me:pw@head:8265")


# --- following


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 75}, 75),
        ({"status": "FAILED", "driver_exit_code": 130}, 130),
        ({"status": "FAILED", "driver_exit_code": 3}, 3),
        ({"status": "FAILED", "driver_exit_code": -9}, 137),
        ({"status": "FAILED", "error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "no\nspace"}, 1),
        ({"status": "STOPPED"}, 75),
    ],
    ids=lambda value: json.dumps(value),
)
def test_the_exit_code_is_that_of_the_job(submit: Any, server: JobServer, ends: dict[str, Any], code: int) -> None:
    server.ends = ends
    found, out, err = submit(*TRAIN)
    assert found == code
    assert out == "one\ntwo\n"
    assert ("--resume" in err.splitlines()[-1]) == (code in (75, 130))
    assert ("RUNTIME_ENV_SETUP_FAILURE no space" in err) == ("message" in ends)


def test_a_log_that_broke_off_goes_on_where_it_was(submit: Any, server: JobServer) -> None:
    server.log = [f"line {i}\n" for i in range(6)]
    server.cut = [2, 5]
    code, out, err = submit(*TRAIN)
    assert code == 0
    assert out == "".join(server.log), "nothing twice, nothing lost"
    assert err.count("connected again") >= 1


def test_the_last_lines_are_printed_even_if_the_stream_ends_before_them(submit: Any, server: JobServer) -> None:
    server.log = [f"line {i}\n" for i in range(6)]
    server.unsent = 2
    code, out, _ = submit(*TRAIN)
    assert code == 0 and out == "".join(server.log)


def test_a_cluster_that_has_forgotten_the_job_says_how_to_go_on(
    submit: Any, server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cut = [1]
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: server.jobs.clear())
    code, _, err = submit(*TRAIN)
    assert code == 4
    assert "does not know job a1-" in err
    assert "--resume" in err


def test_a_cluster_that_stays_away_is_given_up(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster.connect(server.url)
    job = server.start_job()
    server.cut = [1] * 1000
    said: list[str] = []
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: None)
    with pytest.raises(ResourceError, match=f"counterpoise jobs logs -f {job}"):
        cluster.follow(client, job, said.append, lambda text: None, patience_s=0.2)
    assert said == ["one\n"]


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back(submit: Any, server: JobServer) -> None:
    server.on_chunk = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has in the background
    try:
        code, _, err = submit(*TRAIN)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    job = sent(server)
    assert job["status"] == "RUNNING"
    assert "stopped" not in job
    assert f"counterpoise jobs logs -f {job['submission_id']}" in err
    assert f"counterpoise jobs stop {job['submission_id']}" in err


# --- looking at jobs, stopping them


@pytest.fixture
def jobs(server: JobServer, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(["jobs", *words, "--address", server.url])
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


def test_jobs_are_listed_and_shown(jobs: Any, server: JobServer) -> None:
    done = {"status": "FAILED", "driver_exit_code": 75, "end_time": 1_700_000_090_000}
    server.start_job(submission_id="a1-1", metadata={"job_name": "a1"}, start_time=1.7e12, **done)
    server.start_job(submission_id="a1-2", metadata={"job_name": "a1", "place": "s3://b/a1"}, start_time=1.8e12)
    _, out, _ = jobs("list")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["ID", "a1-2", "a1-1"], "the newest first"
    assert rows[2][1:3] == ["failed", "75"]
    assert "1m30s" in rows[2]
    shown = json.loads(jobs("status", "a1", "--json")[1])
    assert (shown["id"], shown["state"], shown["exit_code"]) == ("a1-2", "running", None)
    assert shown["place"] == "s3://b/a1"
    code, _, err = jobs("status", "a1-3")
    assert code == 3
    assert "did you mean 'a1-" in err


def test_logs_are_printed_or_followed_to_the_exit_code(jobs: Any, server: JobServer) -> None:
    server.start_job(submission_id="a1-1")
    server.ends = {"status": "FAILED", "driver_exit_code": 3}
    assert jobs("logs", "a1-1")[:2] == (0, "one\ntwo\n")
    assert jobs("logs", "-f", "a1-1")[:2] == (3, "one\ntwo\n")


def test_stopping_waits_for_the_checkpoint(jobs: Any, server: JobServer) -> None:
    server.start_job(submission_id="a1-1", metadata={"grace_s": "60"})
    server.stopping_s = 1.0
    code, _, err = jobs("stop", "a1-1")
    assert code == 0
    assert server.jobs["a1-1"]["status"] == "STOPPED"
    assert "killed after 60 s" in err
    assert "ended after" in err
    assert "by force" not in err
    assert "has ended already (stopped)" in jobs("stop", "a1-1")[2]


def test_a_job_that_needed_force_is_said_to_go_on_from_an_older_checkpoint(jobs: Any, server: JobServer) -> None:
    server.start_job(submission_id="a1-1", metadata={"grace_s": "1"})
    server.stopping_s = 1.2
    assert "by force: it goes on from an older checkpoint" in jobs("stop", "a1-1")[2]


def test_a_refused_variable_is_named_without_its_value(server: JobServer) -> None:
    with pytest.raises(RefusedError, match=r"variable HF_TOKEN \(--env, or env_vars\)"):
        plan(*TRAIN, "--runs", "s3://b/r", env=["HF_TOKEN=hf_x"])
