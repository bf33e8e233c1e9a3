import copy
import subprocess
import sys

import pytest
import yaml

from counterpoise.contracts import ConfigError
from counterpoise.data import card as cards
from counterpoise.data.card import load_card, parse_card

from .conftest import CARD


def parsed(change):
    raw = copy.deepcopy(CARD)
    change(raw)
    return parse_card(yaml.safe_dump(raw, sort_keys=False).encode(), "here/corpus.yaml")


def test_a_good_card_is_read():
    card = parsed(lambda raw: None)
    assert card.class_names == ("red", "green", "blue")
    assert card.folder == "here"
    assert tuple(card.modalities) == ("audio", "image", "frames", "text", "vector", "series", "size")


def test_the_defaults_of_audio_are_those_of_the_crema_d_papers():
    assert cards.AudioPreprocess().shape == (1, 257, 188)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(lable="x"), "lable: unknown key, did you mean 'label'?"),
        (lambda r: r["splits"].update(val={"files": "x"}), "splits.val: no such split, did you mean 'valid'?"),
        (lambda r: r["splits"]["train"].update(fils="x"), "splits.train.fils: unknown key, did you mean 'files'?"),
        (lambda r: r["modalities"]["audio"].update(colum="x"), "modalities.audio.colum: unknown key, did you mean"),
        (
            lambda r: r["modalities"]["audio"]["preprocess"].update(sample_rat=1),
            "modalities.audio.preprocess.sample_rat: unknown key, did you mean 'sample_rate'?",
        ),
        (
            lambda r: r["modalities"]["audio"].update(kind="audo"),
            "modalities.audio.kind is 'audo', did you mean 'audio'?",
        ),
        (lambda r: r["modalities"]["image"].pop("preprocess"), "modalities.image.preprocess: missing"),
        (lambda r: r["modalities"]["image"]["preprocess"].update(size=[0, 8]), "each side must lie in 1..4096"),
        (lambda r: r.pop("classes"), "give either classes or num_classes"),
        (lambda r: r.update(classes=["a", "a"]), "a class name is given twice"),
        (lambda r: r.update(classes=[True, False]), "put it in quotes"),
        (lambda r: r["splits"].pop("train"), "splits has no train"),
        (lambda r: r["splits"]["valid"].update(carve={"from": "train"}), "give either files or carve"),
        (lambda r: r["modalities"].update(label=copy.deepcopy(r["modalities"]["text"])), "modalities.label"),
        (lambda r: r["splits"]["train"].update(expected=-1), "splits.train.expected is -1"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ConfigError) as error:
        parsed(change)
    assert str(error.value).startswith("here/corpus.yaml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: &x [1]\nb: *x\n", "aliases are not allowed"),
        (b"name: a\nname: b\n", "key 'name' is given twice"),
        (b"!!python/object/apply:os.mkdir [x]", "not readable as YAML"),
        (b"[1, 2]", "a card is a mapping"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 5000, "nested too deeply"),
        (b" " * 1_000_001, "a card has at most 1000000"),
    ],
)
def test_hostile_text_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_card(text, "corpus.yaml")


def test_unknown_modalities_are_named():
    card = parsed(lambda raw: None)
    with pytest.raises(ConfigError, match="corpus tiny has no modality 'adio', did you mean 'audio'"):
        card.select(["adio"])
    assert list(card.select(["text", "audio"])) == ["text", "audio"]


def test_names_are_looked_up_among_prepared_corpora(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOISE_HOME", str(tmp_path))
    folder = tmp_path / "corpora" / "tiny"
    folder.mkdir(parents=True)
    (folder / "corpus.yaml").write_text(yaml.safe_dump(CARD))
    assert load_card("tiny").folder == str(folder)
    assert cards.prepared_corpora() == ["tiny"]
    with pytest.raises(ConfigError, match="corpus is 'tinny', did you mean 'tiny'"):
        load_card("tinny")
    with pytest.raises(ConfigError, match="run: counterpoise corpora prepare av_digits"):
        load_card("av_digits")
    with pytest.raises(ConfigError, match="no such file"):
        load_card(str(tmp_path / "elsewhere"))


def test_the_default_home_is_the_cache(monkeypatch):
    monkeypatch.delenv("COUNTERPOISE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cards.corpora_home() == "/cache/counterpoise/corpora"


def test_reading_a_card_needs_neither_torch_nor_pyarrow():
    code = (
        "import sys, counterpoise.data.card, counterpoise.data.recipes, counterpoise.data.options;"
        "sys.exit(bool({'torch', 'pyarrow', 'sklearn', 'ray', 'soundfile', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": "platform"}).returncode == 0
