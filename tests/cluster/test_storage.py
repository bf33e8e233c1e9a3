"""The policies for object storage: enough for what we do, and for nothing else. moto grants what they say."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fsspec
import pytest
import yaml
from botocore.exceptions import ClientError
from moto.core.authorization import enable_iam_authentication
from moto.server import ThreadedMotoServer

from counterpoise import storage
from counterpoise.config import resolve
from counterpoise.contracts import CounterpoiseError
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.job import Job, execute
from counterpoise.engine.run import RunFolder

pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("default")]  # servers and clients warn of their own

POLICIES = Path(__file__).resolve().parents[2] / "cluster" / "storage"
BUCKETS = ("my-corpora", "my-runs", "my-raw", "another")


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch, corpus: str) -> Iterator[Callable[[str], None]]:
    """granted(name): from now on the credentials in the environment have that policy and no other right.

    Every bucket holds the corpus in `corpus/`.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "before",
        "AWS_SECRET_ACCESS_KEY": "before",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3")
    for bucket in BUCKETS:
        s3.create_bucket(Bucket=bucket)
        for file in Path(corpus).iterdir():
            s3.put_object(Bucket=bucket, Key=f"corpus/{file.name}", Body=file.read_bytes())
    iam = boto3.client("iam", endpoint_url=endpoint)

    with contextlib.ExitStack() as ending:

        def grant(policy: str) -> None:
            user = f"{policy}-{uuid.uuid4().hex[:8]}"
            iam.create_user(UserName=user)
            text = (POLICIES / f"{policy}.json").read_text()
            iam.put_user_policy(UserName=user, PolicyName=policy, PolicyDocument=text)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            ending.enter_context(enable_iam_authentication())

        yield grant
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_run_needs_no_more_than_its_policy_allows(granted: Callable[[str], None]) -> None:
    granted("s3-policy")
    content = {
        "corpus": "s3://my-corpora/corpus",
        "modalities": {m: {"name": "mlp", "hidden": 8, "width": 8} for m in ("strong", "weak")},
        "method": {"name": "aug", "hidden": 8, "check_every": 1},
        "batch_size": 48,
        "epochs": 2,
    }
    experiment, provenance = resolve(content)
    text = yaml.safe_dump(experiment.to_json())
    folder = RunFolder.create("s3://my-runs", "a", experiment_text=text, provenance=provenance, manifest={"run": "a"})
    assert execute(Job(experiment.to_json(), folder.uri), SingleComm()) is not None
    assert folder.state() == "finished"


@pytest.mark.parametrize(
    ("policy", "place", "allowed"),
    [
        ("s3-policy", "s3://my-corpora/corpus/corpus.yaml", "read"),
        ("s3-policy", "s3://my-runs/x", "read write delete"),
        ("s3-policy", "s3://another/corpus/corpus.yaml", ""),
        ("s3-ingest-policy", "s3://my-raw/corpus/corpus.yaml", "read"),
        ("s3-ingest-policy", "s3://my-corpora/x", "read write delete"),
        ("s3-ingest-policy", "s3://my-runs/x", ""),
    ],
)
def test_a_policy_allows_what_it_should_and_nothing_else(
    granted: Callable[[str], None], policy: str, place: str, allowed: str
) -> None:
    granted(policy)
    done = []
    for deed in (write, read, delete):
        with contextlib.suppress(CounterpoiseError, PermissionError):
            deed(place)
            done.append(deed.__name__)
    assert sorted(done) == sorted(allowed.split())


def write(place: str) -> None:
    storage.write_bytes(place, b"x")


def read(place: str) -> None:
    storage.read_bytes(place)


def delete(place: str) -> None:
    """One object: moto asks for other rights to delete several at once than AWS does, which asks for these."""
    bucket, key = place.removeprefix("s3://").split("/", 1)
    try:
        boto3.Session().client("s3").delete_object(Bucket=bucket, Key=key)
    except ClientError as error:
        raise PermissionError from error


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.json")), ids=lambda path: path.stem)
def test_no_policy_allows_everything(path: Path) -> None:
    for statement in json.loads(path.read_text())["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action], "every action is named"
        if statement.get("Resource") == "*":
            assert all(action.startswith("ec2:Describe") for action in actions)
            assert statement["Condition"], "what names no resource names a region"
