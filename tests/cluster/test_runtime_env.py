"""What `ray job submit --runtime-env cluster/runtime_env.yaml --working-dir .` sends to a cluster."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv
from tests.cluster.shipped import ROOT, read

from counterpoise.launch import cluster

MOST_BYTES = 10 * 2**20


def test_ray_accepts_it_and_it_names_no_secret() -> None:
    content = read("runtime_env.yaml")
    RuntimeEnv(**content)
    assert not [name for name in content["env_vars"] if name.startswith(("AWS_", "RAY_AUTH"))]


def test_workers_get_the_settings_that_a_command_gives_itself() -> None:
    given = read("runtime_env.yaml")["env_vars"]
    for name, value in cluster._ALWAYS.items():
        assert given.get(name, value) == value
    for name in ("RAY_DATA_USE_DATASOURCE_V2", "RAY_CHDIR_TO_TRIAL_DIR", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        assert name in given, "read in workers, which do not inherit from the command"


@pytest.fixture
def sent(tmp_path: Path) -> dict[str, int]:
    """Bytes of every file that is sent, from a checkout with things in it that should stay at home."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("platform", "trainables", "datasets", "cluster", "pyproject.toml", ".gitignore"):
        (checkout / name).symlink_to(ROOT / name)
    for private in (".git/config", ".venv/x", ".env", "runs/a/run.json", "corpora/a/train.parquet", "key.pem"):
        (checkout / private).parent.mkdir(parents=True, exist_ok=True)
        (checkout / private).write_text("secret")
    (checkout / "corpora" / "a" / "corpus.yaml").write_text("name: a")
    package = tmp_path / "sent.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=read("runtime_env.yaml")["excludes"])
    with zipfile.ZipFile(package) as content:
        return {info.filename: info.file_size for info in content.infolist() if not info.is_dir()}


def test_code_and_cards_are_sent_and_data_is_not(sent: dict[str, int]) -> None:
    for name in ("trainables/train.py", "platform/counterpoise/cli.py", "datasets/av_digits/corpus.yaml",
                 "corpora/a/corpus.yaml", "cluster/again.py"):  # fmt: skip
        assert name in sent
    for name in sent:
        assert not name.startswith((".git/", ".venv/", "runs/", "cluster/secrets/"))
        assert not name.endswith((".env", ".pem", ".parquet"))
    assert sum(sent.values()) < MOST_BYTES


def test_every_yaml_of_the_folder_can_be_read() -> None:
    for path in (ROOT / "cluster").rglob("*.yaml"):
        assert list(yaml.safe_load_all(path.read_text()))
