from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from counterpoise.config import (
    CHANGEABLE,
    HARMLESS,
    Experiment,
    changed_fields,
    check_changes,
    parse_set,
    parse_yaml,
    read_yaml,
    resolve,
)
from counterpoise.contracts import ConfigError, RefusedError
from counterpoise.methods import METHODS
from counterpoise.wording import flatten

ROOT = Path(__file__).resolve().parents[1]
PLAIN: dict[str, Any] = {
    "corpus": "somewhere",
    "modalities": {"audio": "cnn", "visual": {"name": "cnn", "width": 64}},
    "method": {"name": "aug", "lam": 0.2},
    "optim": {"lr": 0.02},
    "epochs": 7,
}


def problems(data: dict[str, Any], *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(data, sets, "folder/my.yaml")
    return str(caught.value)


# --- precedence and where values come from


def test_command_line_beats_file_beats_default() -> None:
    experiment, provenance = resolve(PLAIN, ["optim.lr=0.5", "seed=3"], "folder/my.yaml")
    assert (experiment.optim.lr, experiment.seed) == (0.5, 3)
    assert (experiment.epochs, experiment.method.lam) == (7, 0.2)
    assert (experiment.optim.momentum, experiment.batch_size) == (0.9, 64)
    assert provenance["optim.lr"] == {"value": 0.5, "origin": "command line"}
    assert provenance["epochs"] == {"value": 7, "origin": "file my.yaml"}
    assert provenance["optim.momentum"] == {"value": 0.9, "origin": "default"}


def test_every_value_has_an_origin() -> None:
    experiment, provenance = resolve(PLAIN, ["optim.schedule={name: step, every: 5}", "data.cache=off"], "my.yaml")
    assert set(provenance) == {key for key, _ in flatten(experiment.to_json())}
    given = {key for key, entry in provenance.items() if entry["origin"] == "file my.yaml"}
    assert given == {
        "corpus",
        "modalities.audio.name",
        "modalities.visual.name",
        "modalities.visual.width",
        "method.name",
        "method.lam",
        "optim.lr",
        "epochs",
    }
    typed = {key for key, entry in provenance.items() if entry["origin"] == "command line"}
    assert typed == {"optim.schedule.name", "optim.schedule.every", "data.cache"}


@pytest.mark.parametrize("text", ["method=joint", "method.name=joint", "method={name: joint}"])
def test_another_method_drops_the_settings_of_the_old_one(text: str) -> None:
    experiment, provenance = resolve(PLAIN, [text])
    assert experiment.method_name == "joint"
    assert provenance["method.name"]["origin"] == "command line"
    assert provenance["method.head"] == {"value": "concat", "origin": "default"}


def test_the_same_method_keeps_its_settings() -> None:
    assert resolve(PLAIN, ["method.name=aug"])[0].method.lam == 0.2
    assert resolve(PLAIN, ["method.name=joint", "method.head=sum"])[0].method.head == "sum"


def test_a_mapping_on_the_command_line_replaces_the_section() -> None:
    experiment, provenance = resolve(PLAIN, ["method={name: aug, tau: 0.1}"])
    assert (experiment.method.lam, experiment.method.tau) == (0.5, 0.1)
    assert provenance["method.lam"]["origin"] == "default"
    assert provenance["method.tau"]["origin"] == "command line"


def test_short_forms_open_up() -> None:
    experiment, provenance = resolve(PLAIN, ["modalities.audio.width=32", "optim.schedule.name=cosine"])
    assert experiment.modalities["audio"].width == 32 and experiment.modalities["audio"].name == "cnn"
    assert experiment.optim.schedule.name == "cosine"
    assert provenance["modalities.audio.name"]["origin"].startswith("file")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1e-3", 0.001),
        ("a=3", 3),
        ("a=[1, 2]", [1, 2]),
        ("a={b: x}", {"b": "x"}),
        ("a=", None),
        ("a=b=c", "b=c"),
        (" a =true", True),
        ("a='12'", "12"),
    ],
)
def test_values_on_the_command_line_are_yaml(text: str, value: Any) -> None:
    assert parse_set(text) == ("a", value)


@pytest.mark.parametrize("text", ["lr", "=3", "a={", "a=[1", "a=2020-13-45", "a=0x_", "a=\x00"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_set(text)


# --- problems


def test_all_problems_are_named_at_once_with_what_would_do() -> None:
    text = problems({"corpus": "x", "method": "aug", "optim": {"momentun": 0.9, "lr": -1}, "epoch": 3, "seed": "one"})
    assert text.startswith("folder/my.yaml: 4 problems\n")
    assert "  epoch: unknown key, did you mean 'epochs'?" in text
    assert "  optim.momentun: unknown key, did you mean 'momentum'?" in text
    assert "  optim.lr: Input should be greater than 0, got -1  [file my.yaml]" in text
    assert "  seed: " in text and "got 'one'" in text


def test_settings_of_a_method_are_checked_one_by_one() -> None:
    text = problems({"corpus": "x", "method": {"name": "aug", "lamda": 1, "tau": -1, "objectives": {"al": True}}})
    assert "method.lamda: unknown key, did you mean 'lam'?" in text
    assert "method.tau: Input should be greater than or equal to 0, got -1" in text
    assert "method.objectives.al: unknown key, did you mean 'all'?" in text


def test_unknown_names_come_with_the_nearest_known_one() -> None:
    assert "unknown method 'agu', did you mean 'aug'? (known: agm, aug, " in problems(PLAIN | {"method": "agu"})
    text = problems(PLAIN | {"modalities": {"audio": "resnet81"}})
    assert "unknown encoder 'resnet81', did you mean 'resnet18'?" in text
    assert "modalities.audio.widht: unknown key, did you mean 'width'?" in problems(PLAIN, "modalities.audio.widht=3")
    assert "optim.schedule.evry: unknown key, did you mean 'every'?" in problems(PLAIN, "optim.schedule.evry=3")


def test_what_is_missing_is_named() -> None:
    text = problems({})
    assert "corpus: is missing" in text and "method: is missing" in text
    assert "modality: is missing" in problems({"corpus": "x", "method": "unimodal"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modalities": ["audio"]}, "give a mapping from modality to encoder"),
        ({"method": 3}, "give a name and settings"),
        ({"method": {"lam": 1}}, "give a name and settings"),
        ({"method": {"name": ["aug"]}}, "unknown method"),
        ({"optim": None}, "optim"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"lr": float("inf")}}, "optim.lr"),
        ({"optim": {"weight_decay": float("nan")}}, "optim.weight_decay"),
        ({"data": {"augment": {"image": ["flop"]}}}, "data.augment.image.0"),
    ],
)
def test_wrong_shapes_are_explained(data: dict[str, Any], message: str) -> None:
    assert message in problems(PLAIN | data)


def test_on_and_off_need_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("corpus: x\nmethod: joint\ndata: {cache: off}\n")
    experiment, _ = resolve(read_yaml(tmp_path / "a.yaml"))
    assert experiment.data.cache == "off"
    assert resolve(PLAIN, ["data.cache=on"])[0].data.cache == "on"


def test_a_single_value_has_no_settings_below_it() -> None:
    assert "'epochs' is a single value" in problems(PLAIN, "epochs.warmup=3")


# --- files


def test_files_that_are_no_experiments_are_refused(tmp_path: Path) -> None:
    cases = {
        "list.yaml": b"- 1\n",
        "broken.yaml": b"a: [1\n",
        "alias.yaml": b"a: &x 1\nb: *x\n",
        "python.yaml": b"a: !!python/object/apply:os.system [ls]\n",
        "bytes.yaml": b"\xff\xfe\x00a",
        "date.yaml": b"a: 2020-13-45\n",
        "large.yaml": b"#" * 1_000_001,
        "deep.yaml": b"a: " + b"[" * 1500,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            read_yaml(tmp_path / name)


def test_a_missing_file_comes_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "cremad.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"no experiment file .*; did you mean .*cremad\.yaml\?"):
        read_yaml(tmp_path / "crema.yaml")
    with pytest.raises(ConfigError, match="no experiment file"):
        read_yaml(tmp_path)


EXPERIMENTS = sorted((ROOT / "trainables" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_of_the_tree_resolves(path: Path) -> None:
    experiment, _ = resolve(read_yaml(path), source=str(path))
    again, _ = resolve(experiment.to_json())
    assert again == experiment and again.digest == experiment.digest
    for method in METHODS:
        more = ["method.modality=audio"] if method == "unimodal" else []
        assert resolve(read_yaml(path), [f"method.name={method}", *more])[0].method_name == method


# --- identity


def test_the_digest_stays_what_it_is() -> None:
    """Saved runs are compared by it."""
    assert resolve(PLAIN)[0].digest == "f1cdc935df7f91bf"


def test_a_protocol_is_in_the_digest_once_it_is_set() -> None:
    plain, under = resolve(PLAIN)[0], resolve(PLAIN, ["protocol=valid-v1"])[0]
    assert "protocol" not in plain.to_json()
    assert under.to_json()["protocol"] == "valid-v1"
    assert under.digest != plain.digest
    assert changed_fields(plain, under) == {"protocol": (None, "valid-v1")}


def test_settings_of_encoders_that_came_later_are_in_the_digest_once_they_are_set() -> None:
    unset = resolve(PLAIN, ["modalities.audio.weights=null", "modalities.audio.model=null"])[0]
    assert unset.digest == "f1cdc935df7f91bf"
    assert "weights" not in unset.to_json()["modalities"]["audio"]
    plain = resolve(PLAIN, ["modalities.audio=resnet18"])[0]
    loaded = resolve(PLAIN, ["modalities.audio={name: resnet18, weights: a.pt}"])[0]
    assert loaded.to_json()["modalities"]["audio"]["weights"] == "a.pt"
    assert loaded.digest != plain.digest
    assert changed_fields(plain, loaded) == {"modalities.audio.weights": (None, "a.pt")}
    assert resolve(loaded.to_json())[0].digest == loaded.digest


def test_the_digest_knows_values_and_not_how_they_were_written() -> None:
    reordered = dict(reversed(PLAIN.items())) | {"batch_size": 64, "modalities": PLAIN["modalities"]}
    assert resolve(reordered)[0].digest == resolve(PLAIN)[0].digest
    assert resolve(PLAIN, ["seed=1"])[0].digest != resolve(PLAIN)[0].digest
    assert resolve(PLAIN, ["seed=1"])[0].group == resolve(PLAIN)[0].group
    assert resolve(PLAIN, ["epochs=8"])[0].group != resolve(PLAIN)[0].group


def test_how_data_is_read_is_no_part_of_the_digest() -> None:
    other = ["data.cache=off", "data.cache_limit_gib=1", "data.decode_threads=7", "data.prefetch=9"]
    other.append("track=[tensorboard]")  # nor is how it is watched
    assert {text.partition("=")[0] for text in other} == set(HARMLESS)
    changed, before = resolve(PLAIN, other)[0], resolve(PLAIN)[0]
    assert changed.digest == before.digest and changed_fields(before, changed) == {}


# --- continuing a run


def test_changes_need_to_be_named_and_possible() -> None:
    old = resolve(PLAIN)[0]
    new = resolve(PLAIN, ["optim.lr=0.1", "optim.schedule.name=step"])[0]
    with pytest.raises(RefusedError, match=r"optim.lr: 0.02 -> 0.1  \(say --allow-change optim.lr") as caught:
        check_changes(old, new, ["optim.schedule"])
    assert "schedule" not in str(caught.value)
    assert check_changes(old, new, ["optim.lr", "optim.schedule"]) == [
        "optim.lr: 0.02 -> 0.1",
        "optim.schedule.name: 'constant' -> 'step'",
    ]
    assert check_changes(old, old, []) == []
    with pytest.raises(RefusedError, match=r"seed: 0 -> 1  \(makes it another run"):
        check_changes(old, resolve(PLAIN, ["seed=1"])[0], ["seed"])
    with pytest.raises(RefusedError, match=r"method\.lam"):
        check_changes(old, resolve(PLAIN, ["method.lam=0.9"])[0], ["method.lam"])


# Fields that make another run when they change; a new field must be put here, in HARMLESS or in CHANGEABLE.
FIXED = {
    "corpus",
    "protocol",
    "preprocess",
    "modalities",
    "method",
    "optim.name",
    "optim.momentum",
    "optim.betas",
    "optim.legacy_zero_grad_step",
    "batch_size",
    "seed",
    "batch_norm",
    "data.shuffle_window",
    "data.shuffle_mib",
    "data.transforms",
    "data.augment",
}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if f"{prefix}{name}" in CHANGEABLE:
                yield f"{prefix}{name}"
            else:
                yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_field_is_harmless_changeable_or_fixed_on_purpose() -> None:
    found = list(fields(Experiment))
    assert sorted(found) == sorted([*HARMLESS, *CHANGEABLE, *FIXED])


# --- anything at all

KEYS = [key for key in fields(Experiment)] + [
    "method.name",
    "method.lam",
    "method.objectives",
    "method.objectives.all",
    "method.classifiers.audio",
    "modalities.audio",
    "modalities.audio.name",
    "modalities.audio.channels",
    "optim.schedule",
    "optim.schedule.name",
    "data",
    "optim",
    "method",
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["aug", "joint", "cnn", "mlp", "cosine", "off", date(2020, 1, 2), b"x", 10**400]),
)
NAMES = st.one_of(
    st.sampled_from(sorted({part for key in KEYS for part in key.split(".")})),
    st.text(max_size=4),
    st.integers(),
    st.booleans(),
    st.dates(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
VALUES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["{name: aug, 1: 2}", "{1: 2}", "[aug]", "{name: [x]}", ".nan", "1e999", "2020-01-01", "{a: {b: 1}}"]
    ),
)
SETS = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), VALUES)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.dictionaries(NAMES, TREES, max_size=5), sets=st.lists(SETS, max_size=3), whole=st.booleans())
@example(data={}, sets=["method={name: aug, 1: 2}"], whole=True)
@example(data={"method": {"name": ["aug"]}}, sets=[], whole=True)
@example(data={date(2020, 1, 1): 1}, sets=[], whole=True)
@example(data={"modalities": {"a": {"name": {}}}}, sets=[], whole=True)
@example(data={}, sets=["modalities={1: cnn}"], whole=True)
@example(data={}, sets=["corpus=2020-01-01"], whole=True)
def test_whatever_is_given_is_an_experiment_or_a_config_error(data: Any, sets: list[str], whole: bool) -> None:
    try:
        experiment, provenance = resolve((PLAIN | data) if whole else data, sets)
    except ConfigError as error:
        assert str(error)
    else:
        assert isinstance(experiment, Experiment) and provenance
        assert resolve(experiment.to_json())[0].digest == experiment.digest


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab:-[]{}!&*#'\"\n 0123\t\x00é|>?,%@x_"), max_size=40))
def test_whatever_text_is_read_is_a_mapping_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(parse_yaml(text, "x"), dict)
    except ConfigError as error:
        assert str(error).startswith("x: ")
