"""Whatever is given as settings: an experiment or one clear error; and a resumed run never drifts unseen."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypotheses
from hypothesis import strategies as st
from pydantic import BaseModel
from tests.conftest import Done, Run, settings
from tests.test_config import FIXED, KEYS, NAMES, PLAIN, SETS, TREES, fields
from tests.trust.faults import count, keep

from counterpoise.cli import main
from counterpoise.config import CHANGEABLE, HARMLESS, Experiment, check_changes, parse_yaml, resolve
from counterpoise.contracts import ConfigError, RefusedError
from counterpoise.start import reopen

CASES = count(500, 10_000)
took: list[float] = []

LONG = [
    "k" * 1_000_000,
    "ключ-鍵-🔑" * 50,
    "a\nb",
    "\x00\x1b[31m",
    "__class__",
    "method.name.x",
    "model_config",
    "model_fields",
]
ODD = st.one_of(
    TREES,
    st.sampled_from([10**5000, -(10**400), "v" * 1_000_000, float("nan"), [[[[[[[[]]]]]]]], {"name": {"name": {}}}]),
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=1), max_leaves=60),
)
WHERE = st.one_of(st.sampled_from([key for key in KEYS]), st.sampled_from(LONG), NAMES.map(str))


def lines_of(error: ConfigError) -> list[str]:
    """A first line that names the source; below it every problem with its key, none longer than a screen."""
    first, *below = str(error).split("\n")
    assert first and all(line.startswith("  ") and ": " in line for line in below), str(error)[:500]
    assert all(len(line) < 2500 for line in (first, *below))
    return below


@hypotheses(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.dictionaries(WHERE, ODD, max_size=4),
    sets=st.lists(SETS, max_size=3),
    whole=st.booleans(),
    text=st.booleans(),
)
@example(data={"epochs": 10**5000}, sets=[], whole=True, text=False)
@example(data={"epochs": 10**5000}, sets=[], whole=True, text=True)
@example(data={"k" * 1_000_000: 1}, sets=[], whole=True, text=False)
@example(data={"a\nb": 1}, sets=[], whole=True, text=False)
@example(data={}, sets=["epochs.a\nb=1"], whole=True, text=False)
@example(data={"method": "v" * 1_000_000}, sets=[], whole=True, text=False)
def test_anything_is_an_experiment_or_an_error_with_key_and_source(
    data: dict[str, Any], sets: list[str], whole: bool, text: bool
) -> None:
    given_ = (PLAIN | data) if whole else data
    began = time.perf_counter()
    try:
        if text:  # as a file has it
            try:
                given_ = parse_yaml(yaml.safe_dump(given_, allow_unicode=True), "my.yaml")
            except ValueError as error:  # PyYAML cannot write 10**5000 either
                if not isinstance(error, ConfigError):
                    return
                raise
        began = time.perf_counter()
        experiment, _ = resolve(given_, sets, "folder/my.yaml")
    except ConfigError as error:
        lines_of(error)
        assert "my.yaml" in str(error) or "--set" in str(error)
    else:
        saved = yaml.safe_dump(experiment.to_json(), sort_keys=False)
        again, _ = resolve(parse_yaml(saved, "saved"))
        assert again == experiment and again.digest == experiment.digest
    finally:
        took.append(time.perf_counter() - began)


def test_an_answer_comes_at_once() -> None:
    if not took:
        pytest.skip("of the test before, which another process has run")
    keep("22 settings", "any settings", {"cases": len(took), "median_ms": 1000 * statistics.median(took)}, True)
    assert statistics.median(took) <= 0.050


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "a: &x 1\nb: *x",
        "\t",
        "a: b: c",
        "{" * 3000,
        "? [a]\n: b",
        "!!set {a}",
        "corpus: 1\n" * 2,
        "%YAML 9.9\n---\n",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_file_that_is_no_experiment_ends_the_command_with_one_line(
    text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(tmp_path / "my.yaml"), "--runs", str(tmp_path / "runs")])
    said = capfd.readouterr().err
    assert caught.value.code == 2 and "my.yaml" in said and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


# --- a run that is resumed


def other(key: str, old: Experiment) -> Any:
    """A value of a field that is another one and allowed."""
    known = {
        "corpus": "elsewhere",
        "protocol": "valid-v1",
        "preprocess": {"audio": {"seconds": 1}},
        "modalities": {"audio": "cnn", "visual": {"name": "cnn", "width": 32}},
        "method": {"name": "aug", "lam": 0.9},
        "optim.betas": [0.5, 0.9],
        "optim.schedule": {"name": "cosine"},
        "compute": {"precision": "bf16"},
        "data.augment": {"visual": ["flip"]},
        "data.shuffle_window": 3,
        "data.bad_samples": 0.5,
        "track": ["tensorboard"],
    }
    if key in known:
        return known[key]
    value: Any = old
    kind: Any = None
    for part in key.split("."):
        kind, value = type(value).model_fields[part].annotation, getattr(value, part)
    if isinstance(value, str):
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 0.5 if value else 0.5


def changed(key: str, value: Any) -> Experiment:
    *sections, name = key.split(".")
    tree: dict[str, Any] = {name: value}
    for section in reversed(sections):
        tree = {section: {**PLAIN.get(section, {}), **tree}}
    return resolve(PLAIN | tree)[0]


@pytest.mark.parametrize("key", sorted(fields(Experiment)))
def test_a_field_that_changed_is_harmless_allowed_by_name_or_refused(key: str) -> None:
    old = resolve(PLAIN)[0]
    new = changed(key, other(key, old))
    assert new != old
    if key in HARMLESS:
        assert check_changes(old, new, []) == [] and new.digest == old.digest
        survived = True
    else:
        assert new.digest != old.digest
        with pytest.raises(RefusedError) as caught:
            check_changes(old, new, [])
        assert key.split(".")[-1] in str(caught.value) and "->" in str(caught.value), "the change is shown"
        if key in CHANGEABLE:
            assert f"say --allow-change {key}" in str(caught.value)
            lines = check_changes(old, new, [key])
            survived = bool(lines) and all(line.startswith(key) and " -> " in line for line in lines)
        else:
            assert key in FIXED
            with pytest.raises(RefusedError, match="makes it another run"):
                check_changes(old, new, [key])
            survived = True
    keep("15 drift", key, {"field": key}, survived)
    assert survived


def test_a_field_that_nobody_has_classified_is_noticed() -> None:
    """The control: an experiment with one more field."""

    class More(Experiment):
        surprise: int = 1

    assert isinstance(More, type) and issubclass(More, BaseModel)
    known = {*HARMLESS, *CHANGEABLE, *FIXED}
    assert set(fields(Experiment)) == known
    keep("15 drift", "control: a new field", {"field": "surprise"}, set(fields(More)) == known, control=True)
    assert set(fields(More)) - known == {"surprise"}


def test_a_resumed_run_refuses_a_change_and_writes_down_one_that_is_allowed(
    corpus: str, run_experiment: Run, tmp_path: Path
) -> None:
    done: Done = run_experiment(settings(corpus, epochs=1))
    done.folder.write_status({"state": "interrupted"}, force=True)
    root, name = done.folder.uri.rsplit("/", 1)
    with pytest.raises(RefusedError, match=r"epochs: 1 -> 2  \(say --allow-change epochs"):
        reopen(root, name, settings(corpus, epochs=2), "e.yaml", [], [])
    with pytest.raises(RefusedError, match=r"seed: 0 -> 1  \(makes it another run"):
        reopen(root, name, settings(corpus, epochs=1), "e.yaml", ["seed=1"], ["seed"])
    _, resolved, lines = reopen(root, name, settings(corpus, epochs=2), "e.yaml", [], ["epochs"])
    assert lines == ["epochs: 1 -> 2"] and resolved.epochs == 2
