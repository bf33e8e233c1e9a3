"""Files of Ray's autoscaler, loaded by Ray itself and held against what the clouds' interfaces describe."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import googleapiclient
import jsonschema
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from tests.cluster.shipped import CLUSTER, read

FILES = ("aws.yaml", "gcp.yaml", "on-premise.yaml")


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_it(file: str) -> None:
    prepared = prepare_config(read(file))
    validate_config(prepared)
    slip = prepare_config({**read(file), "max_worker": 3})
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(slip)


@pytest.mark.parametrize("file", FILES)
def test_the_head_does_no_work_and_nobody_stays_for_nothing(file: str) -> None:
    content = read(file)
    if "available_node_types" in content:
        head = content["available_node_types"].pop(content["head_node_type"])
        assert head["resources"] == {"CPU": 0}
        assert all(kind["min_workers"] == 0 for kind in content["available_node_types"].values())
    else:
        assert "--num-cpus=0" in content["head_start_ray_commands"][-1]
    assert 0 < content["idle_timeout_minutes"] <= 30
    assert content["max_workers"] > 0


@pytest.mark.parametrize("file", FILES)
def test_the_token_goes_to_every_node_and_is_private_there(file: str) -> None:
    content = read(file)
    (place,) = [remote for remote, local in content["file_mounts"].items() if local == "~/.ray/auth_token"]
    assert place.endswith("/.ray/auth_token"), "where Ray looks for it"
    assert re.search(r"chmod 600 [^;]*~/\.ray/auth_token", content["setup_commands"][0])


# --- AWS


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """aws.yaml in an account that has what it names."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    content = read("aws.yaml")
    region = content["provider"]["region"]
    with mock_aws():
        ec2 = boto3.client("ec2", region_name=region)
        vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        zone = content["provider"]["availability_zone"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
        group = ec2.create_security_group(GroupName="ray", Description="ray", VpcId=vpc)["GroupId"]
        iam = boto3.client("iam")
        iam.create_instance_profile(InstanceProfileName="counterpoise")
        iam.create_instance_profile(InstanceProfileName="counterpoise-head")
        text = json.dumps(content).replace("subnet-CHANGE", subnet).replace("sg-CHANGE", group)
        yield json.loads(text.replace("111122223333", "123456789012"))


def test_ray_starts_machines_on_aws_as_the_file_says(
    cloud: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes a key for SSH there
    (tmp_path / ".ssh").mkdir()
    prepared = prepare_config(cloud)
    ec2 = boto3.resource("ec2", region_name=cloud["provider"]["region"])
    groups = {group.id for group in ec2.security_groups.all()}
    ready = bootstrap_aws(copy.deepcopy(prepared))
    assert {group.id for group in ec2.security_groups.all()} == groups, "Ray's own group lets in SSH from everywhere"
    assert not list(boto3.resource("iam").roles.all()), "Ray's own role may do anything with EC2 and S3"
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, kind in ready["available_node_types"].items():
        tags = {"ray-node-name": name, "ray-node-type": "head", "ray-launch-config": "x", "ray-user-node-type": name}
        started = provider.create_node(kind["node_config"], tags, 1)
        (machine,) = [ec2.Instance(key) for key in started]
        assert machine.state["Name"] in ("pending", "running")
        profile = "counterpoise-head" if name == "head" else "counterpoise"
        assert machine.iam_instance_profile["Arn"].endswith(f"/{profile}")
        assert {group["GroupId"] for group in machine.security_groups} <= groups
        assert {"Key": "ray-cluster-name", "Value": "counterpoise"} in machine.tags, "ec2-head-policy.json asks for it"
        config = kind["node_config"]
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
        assert ("InstanceMarketOptions" in config) == (name != "head"), "the head is not a spot machine"


def test_accounts_and_regions_are_the_same_everywhere() -> None:
    content = read("aws.yaml")
    texts = [(CLUSTER / "aws.yaml").read_text(), (CLUSTER / "kuberay" / "common.yaml").read_text()]
    texts += [path.read_text() for path in (CLUSTER / "storage").glob("*.json")]
    assert {account for text in texts for account in re.findall(r"(?<!\d)\d{12}(?!\d)", text)} == {"111122223333"}
    regions = {region for text in texts for region in re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", text)}
    assert regions == {content["provider"]["region"]}
    policy = json.loads((CLUSTER / "storage" / "ec2-head-policy.json").read_text())
    tags = {
        value
        for statement in policy["Statement"]
        for key, value in statement.get("Condition", {}).get("StringEquals", {}).items()
        if key.endswith("ray-cluster-name")
    }
    assert tags == {content["cluster_name"]}


# --- Google Cloud


def described(schemas: dict[str, Any], name: str, value: Any, place: str = "") -> Iterator[str]:
    """Where a value does not fit the description of Compute Engine's interface."""
    fields = schemas[name]["properties"]
    for key, found in value.items():
        if key not in fields:
            yield f"{place}{key} is unknown"
            continue
        items = fields[key].get("items", {}) if isinstance(found, list) else fields[key]
        if (fields[key].get("type") == "array") != isinstance(found, list):
            yield f"{place}{key}: a list, or not"
        for one in found if isinstance(found, list) else [found]:
            if "$ref" in items:
                yield from described(schemas, items["$ref"], one, f"{place}{key}.")
            elif "enum" in items and one not in items["enum"]:
                yield f"{place}{key} is {one}"


def test_machines_on_google_cloud_are_as_its_interface_describes_them() -> None:
    folder = Path(googleapiclient.__file__).parent / "discovery_cache" / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]
    for kind in read("gcp.yaml")["available_node_types"].values():
        assert list(described(schemas, "Instance", kind["node_config"])) == []
    assert list(described(schemas, "Instance", {"disk": []})) == ["disk is unknown"]
    assert list(described(schemas, "Instance", {"scheduling": {"provisioningModel": "SPOTTY"}})) != []


def test_the_project_has_what_rays_autoscaler_calls() -> None:
    for package in ("boto3", "google-api-python-client", "google-auth"):
        assert metadata.version(package)
