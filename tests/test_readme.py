"""What the README shows must exist: commands with their options, the card, the method, the files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from counterpoise.cli import app
from counterpoise.config import resolve
from counterpoise.data.card import parse_card
from counterpoise.engine import run as run_module
from counterpoise.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[w.index("counterpoise") + 1 :] for w in words if "counterpoise" in w]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_and_option_exists(words: list[str]) -> None:
    if words[0] == "submit":  # what follows is a command line of its own
        words = words[1:]
    command = get_command(app)
    context = command.make_context("counterpoise", [], resilient_parsing=True)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    used = {w.split("=")[0] for w in words if w.startswith("-")}
    assert used <= options | {"--help"}, f"{context.command_path} has no {used - options}"
    for word in words:
        if word.startswith("trainables/"):
            assert (ROOT / word).exists()


def test_the_experiment_and_the_card_are_valid() -> None:
    experiment, card = blocks("yaml")
    assert resolve(yaml.safe_load(experiment))[0].method_name == "aug"
    assert set(parse_card(card.encode(), "corpus.yaml").modalities) == {"audio", "visual"}


def test_the_method_shown_is_the_method_shipped() -> None:
    shown = next(block for block in blocks("python") if "class Late(" in block)
    shipped = (ROOT / "platform/counterpoise/methods/late.py").read_text()
    body = shown.split('"""')[-1].split("return {")[1].strip()
    assert body in shipped


def test_the_table_of_methods_names_all_there_are() -> None:
    table = README.split("## Methods")[1].split("\n## ")[0]
    named = {name for row in table.splitlines() if row.startswith("| `") for name in re.findall("`([a-z_]+)`", row)}
    assert named == set(METHODS)


def test_pictures_and_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in ("records.jsonl", "status.json", "summary.json", "predictions.parquet", "ledger.jsonl", "run.json"):
        assert name in README
        source = Path(run_module.__file__).read_text() + (ROOT / "platform/counterpoise/engine/job.py").read_text()
        assert name in source


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = next(line for block in blocks("bash") for line in block.splitlines() if "poe test" in line)
    run = command.split("&&")[1].split("#")[0].strip()
    assert run in (ROOT / ".ci/run").read_text()
