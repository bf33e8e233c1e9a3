"""docs/adding-a-method.md shows the code that is shipped, every hook, and commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests import test_readme

from counterpoise.methods import METHODS, Method

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/adding-a-method.md").read_text()
SHIPPED = ROOT / "platform/counterpoise/methods"
HOOKS = {name: value for name, value in vars(Method).items() if not name.startswith("_") and hasattr(value, "__get__")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def table() -> list[tuple[str, list[str]]]:
    """Every row of the table of hooks: the hook, and the methods to look at."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", GUIDE, re.MULTILINE)
    return [(hook, re.findall(r"`(\w+)`", methods)) for hook, methods in rows]


def test_the_complete_file_is_the_shipped_one() -> None:
    (shown,) = (block for block in blocks("python") if "class MMCosine(" in block)
    assert shown == (SHIPPED / "mmcosine.py").read_text()


def test_other_code_is_quoted_from_the_files_it_names() -> None:
    files = [SHIPPED / "__init__.py", ROOT / "tests/cases.py", ROOT / "tests/methods/test_mmcosine.py"]
    texts = [file.read_text() for file in files]
    rows, cases, tests = (block for block in blocks("python") if "class MMCosine(" not in block)
    for shown, text in zip((rows, cases), texts, strict=False):
        assert all(line in text.splitlines() for line in shown.splitlines())
    assert all(test.strip() in texts[2] for test in tests.split("\n\n\n"))


def test_the_table_lists_every_hook_in_the_order_of_the_class() -> None:
    assert [hook for hook, _ in table()] == list(HOOKS)


@pytest.mark.parametrize(("hook", "methods"), table(), ids=[hook for hook, _ in table()])
def test_the_methods_to_look_at_override_the_hook(hook: str, methods: list[str]) -> None:
    assert methods
    for name in methods:
        assert getattr(METHODS[name], hook) != getattr(Method, hook) or hook == "uses", f"{name} has no {hook}"
        own = [kind for kind in METHODS[name].__mro__ if issubclass(kind, Method) and kind is not Method]
        assert any(hook in vars(kind) for kind in own)


@pytest.mark.parametrize(
    "line", [line for block in blocks("bash") for line in block.splitlines() if "counterpoise" in line]
)
def test_every_command_and_option_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    test_readme.test_every_command_and_option_exists(words[words.index("counterpoise") + 1 :])


def test_named_files_and_names_exist() -> None:
    for name in re.findall(r"`((?:platform|tests|docs)/[\w/.]+|CHANGELOG.md)`", GUIDE):
        assert (ROOT / name).exists() or name == "tests/methods", name
    base = (SHIPPED / "base.py").read_text()
    for name in ("local_rows", "global_rows", "evaluating"):
        assert f"`{name}" in GUIDE and f"def {name}(" in base
    cases = (ROOT / "tests/cases.py").read_text()
    for name in ("SMALL", "CASES", "ALONE", "STOPS", "MOVING_OBJECTIVE", "PICTURES"):
        assert f"`{name}`" in GUIDE and name in cases
