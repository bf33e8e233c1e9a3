import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from counterpoise.contracts import ConfigError
from counterpoise.data import card as cards
from counterpoise.data.card import load_card, parse_card
from counterpoise.data.index import fingerprint, open_splits
from counterpoise.data.recipes import card_of, recipes, recipes_root

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


def test_a_spectrum_of_another_kind_is_in_the_facts_of_a_corpus_only_if_it_is_asked_for():
    plain = cards.AudioPreprocess().model_dump(mode="json")
    assert "spectrum" not in plain and "standardize" not in plain
    assert plain == cards.AudioPreprocess(spectrum="magnitude", standardize=False).model_dump(mode="json")
    other = cards.AudioPreprocess(spectrum="density", standardize=True)
    assert cards.AudioPreprocess.model_validate(other.model_dump(mode="json")) == other
    assert other.shape == (1, 257, 186), "windows lie within the clip: 1 + (66150 - 512) // 353"


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
        (
            lambda r: r["modalities"]["audio"]["preprocess"].update(spectrum="density", hop_length=200),
            "hop_length 200 is more than a window of n_fft 128 samples",
        ),
        (
            lambda r: r["modalities"]["audio"]["preprocess"].update(spectrum="density", seconds=0.01),
            "seconds 0.01 is shorter than a window of n_fft 128 samples",
        ),
        (
            lambda r: r["modalities"]["audio"]["preprocess"].update(standardize=True, mean=-4.0),
            "standardize takes mean and deviation of each clip; leave mean and std out",
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
        (b" " * 200_001, "a card has at most 200000"),
    ],
)
def test_hostile_text_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_card(text, "corpus.yaml")


def with_protocols(**protocols):
    return parsed(lambda raw: raw.update(protocols={n.replace("_", "-"): p for n, p in protocols.items()}))


def test_a_protocol_changes_preprocessing_and_nothing_else():
    card = with_protocols(short_v1={"description": "d", "preprocess": {"audio": {"seconds": 0.1, "mel": None}}})
    under = card.under("short-v1")
    assert under.modalities["audio"].preprocess.seconds == 0.1
    assert under.modalities["audio"].preprocess.mel is None
    assert under.modalities["audio"].preprocess.sample_rate == card.modalities["audio"].preprocess.sample_rate
    assert under.modalities["image"] == card.modalities["image"]
    assert (under.splits, under.selects_on, under.location) == (card.splits, "valid", card.location)
    assert card.under() == card


def test_an_experiment_changes_preprocessing_on_top_of_the_protocol():
    card = with_protocols(short_v1={"description": "d", "preprocess": {"audio": {"seconds": 0.1, "n_fft": 64}}})
    audio = card.under("short-v1", {"audio": {"seconds": 0.15}}).modalities["audio"].preprocess
    assert (audio.seconds, audio.n_fft) == (0.15, 64)


def test_a_protocol_that_selects_on_test_has_all_of_train_and_test_in_the_place_of_valid():
    card = parsed(
        lambda raw: raw.update(
            splits={"train": {"files": "train.parquet"}, "valid": {"carve": {}}, "test": {"files": "test.parquet"}},
            protocols={"paper-v1": {"description": "d", "select_on": "test"}},
        )
    )
    under = card.under("paper-v1")
    assert under.selects_on == "test"
    assert under.splits["valid"] == under.splits["test"] == card.splits["test"]
    assert not any(split.carve for split in under.splits.values())


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        ({"preprocess": {"audoi": {}}}, "preprocess.audoi: corpus tiny has no modality 'audoi', did you mean 'audio'"),
        ({"preprocess": {"audio": {"secs": 1}}}, "preprocess.audio: unknown key 'secs', did you mean 'seconds'"),
        ({"preprocess": {"audio": {"seconds": -1}}}, "preprocess.audio: seconds: Input should be greater than 0"),
        ({"splits": {"train": {}}}, "give either files or carve"),
        ({"select_on": "test", "splits": {"valid": {"files": "x"}}}, "leave splits.valid out"),
        ({"select_on": "train"}, "select_on"),
    ],
)
def test_mistakes_in_a_protocol_are_named(protocol, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_protocols(odd_v1={"description": "d", **protocol})


def test_a_protocol_has_a_version():
    with pytest.raises(ConfigError, match="protocols"):
        with_protocols(paper={"description": "d"})


def test_unknown_protocols_are_named():
    with pytest.raises(ConfigError, match="corpus tiny has no protocol 'shirt-v1', did you mean 'short-v1'"):
        with_protocols(short_v1={"description": "d"}).under("shirt-v1")


def test_every_corpus_of_the_papers_has_a_protocol_of_the_paper_and_one_that_selects_on_valid():
    for recipe in recipes():
        if recipe.name != "av_digits":
            kinds = [recipe.card.under(name).selects_on for name in recipe.card.protocols]
            assert "valid" in kinds, recipe.name
            assert len(kinds) >= 2, recipe.name


def test_speakers_of_a_protocol_by_speaker_are_in_one_split_only(tiny):
    content = yaml.safe_load(Path(tiny.location).read_text())

    def carve():
        return {"carve": {"group": "speaker", "fraction": 0.2, "stratify": False}}

    files = ["train*.parquet", "test*.parquet"]
    content["protocols"] = {
        "speakers-v1": {"description": "d", "splits": {"train": {"files": files}, "valid": carve(), "test": carve()}}
    }
    card = parse_card(yaml.safe_dump(content).encode(), tiny.location).under("speakers-v1")
    speakers = {}
    for name, index in open_splits(card, counted=False).items():
        numbers = [int(key[-3:]) // 6 % 7 for key in index.sample_ids]
        speakers[name] = set(numbers)
    assert sorted(speakers) == ["test", "train", "valid"]
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values())) == 7


def test_unknown_modalities_are_named():
    card = parsed(lambda raw: None)
    with pytest.raises(ConfigError, match="corpus tiny has no modality 'adio', did you mean 'audio'"):
        card.select(["adio"])
    assert list(card.select(["text", "audio"])) == ["text", "audio"]


def test_a_card_may_name_the_modality_that_joint_training_leaves_behind():
    assert parsed(lambda raw: None).weak is None
    card = parsed(lambda raw: raw.update(weak="image"))
    weak = [line for line in cards.card_lines(card) if line.endswith(", weak in joint training")]
    assert card.weak == "image" and len(weak) == 1 and weak[0].startswith("modality image: image,")
    with pytest.raises(ConfigError, match="weak: corpus tiny has no modality 'imge', did you mean 'image'"):
        parsed(lambda raw: raw.update(weak="imge"))


def test_the_weak_modality_is_not_in_the_fingerprint_of_a_corpus(tiny):
    raw = yaml.safe_load(Path(tiny.location).read_text())
    found = []
    for weak in (None, "audio", "text"):
        card = parse_card(yaml.safe_dump(raw | {"weak": weak}).encode(), tiny.location)
        found.append(fingerprint(card, open_splits(card)))
    assert card.weak == "text" and len(set(found)) == 1


def test_a_corpus_prepared_before_cards_named_the_weak_modality_has_it_from_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOISE_HOME", str(tmp_path))
    assert card_of("av_digits").weak == "visual", "of the recipe, as long as nothing is prepared"
    folder = tmp_path / "corpora" / "av_digits"
    folder.mkdir(parents=True)
    recipe = yaml.safe_load((recipes_root() / "av_digits" / "corpus.yaml").read_text())
    old = {key: value for key, value in recipe.items() if key != "weak"}
    (folder / "corpus.yaml").write_text(yaml.safe_dump(old))
    assert card_of("av_digits").weak == "visual" and card_of("av_digits").folder == str(folder)
    for changed, weak in (
        (old | {"weak": "audio"}, "audio"),
        (old | {"modalities": {"audio": old["modalities"]["audio"]}}, None),
        (old | {"name": "mine"}, None),
    ):
        (folder / "corpus.yaml").write_text(yaml.safe_dump(changed))
        assert card_of(str(folder)).weak == weak


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
