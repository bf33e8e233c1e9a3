"""Who may import whom, and what must stay unimported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "platform" / "counterpoise"
BASE = {"contracts", "functional", "hub", "plain", "storage", "wording"}
# What each part sees besides itself. What is started by hand (cli, start, demo, ...) may see everything.
SEES = {
    "contracts": set(),
    "wording": set(),
    "plain": set(),
    "functional": {"contracts"},
    "storage": {"contracts"},
    "hub": {"contracts", "storage"},
    "data": BASE,
    "telemetry": BASE,
    "reports": BASE,
    "dashboards": BASE | {"telemetry", "reports"},
    "models": BASE,
    "methods": BASE | {"models"},
    "config": BASE | {"models", "methods", "data"},
    "engine": BASE | {"models", "methods", "data", "config"},
    "launch": BASE | {"models", "methods", "data", "config", "engine", "telemetry"},
}
HEAVY = ("torch", "torchvision", "ray", "sklearn", "scipy", "matplotlib", "pyarrow", "transformers", "numpy", "s3fs")


def modules() -> Iterator[tuple[str, Path]]:
    """(part, file) of every module; a part is a folder or a single module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_down() -> None:
    wrong = []
    for part, path in modules():
        if part not in SEES:
            continue
        for name in imports(path):
            own = name.split(".")
            if own[0] != "counterpoise" or len(own) < 2 or own[1] == "__version__":
                continue
            if own[1] not in SEES[part] | {part}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_launch_alone_imports_ray() -> None:
    found = {part for part, path in modules() if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert found <= {"launch", "doctor"}, "doctor only looks whether it is there"


def loaded(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `code`."""
    tail = "\nimport sys\nprint('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_loop_does_not_know_ray() -> None:
    assert "ray" not in loaded("import counterpoise.engine.loop, counterpoise.engine.local, counterpoise.start")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"]], ids=" ".join)
def test_help_is_quick_because_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from counterpoise.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass"
    assert not loaded(code) & set(HEAVY)


def test_the_folder_platform_does_not_hide_the_standard_library() -> None:
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport platform\nassert platform.machine()"
    loaded(code)
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "datasets" / "__init__.py").exists()
