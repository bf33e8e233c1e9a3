import gzip
import struct

import numpy as np
import pytest

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus
from counterpoise.data.index import open_splits
from counterpoise.data.loader import LocalData
from counterpoise.data.recipes import prepare, recipe_names, recipe_options, recipes

from .conftest import wav_bytes

SMALL = {"train": 60, "valid": 20, "test": 30}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return prepare("av_digits", str(tmp_path_factory.mktemp("corpora") / "av_digits"), **SMALL)


def content(folder):
    from pathlib import Path

    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def column(card, name):
    import pyarrow.parquet as pq

    return {s: {v for f in i.files for v in pq.read_table(f)[name].to_pylist()} for s, i in open_splits(card).items()}


def test_the_recipe_is_listed():
    assert "av_digits" in recipe_names()
    (recipe,) = (r for r in recipes() if r.name == "av_digits")
    assert recipe.card.title and recipe.card.licence
    assert recipe_options("av_digits")["train"] == 2000


def test_the_prepared_corpus_is_sound(small):
    card = load_card(small)
    report = check_corpus(card)
    assert report.ok, report.lines()
    assert {s: r.rows for s, r in report.splits.items()} == SMALL
    assert set(report.splits["test"].classes.values()) == {3}
    for name in ("voice", "image_id"):
        values = column(card, name)
        assert not values["train"] & values["test"] and not values["train"] & values["valid"]
        assert not values["valid"] & values["test"]
    batch = next(LocalData(card, batch_size=20).train_batches(1))
    assert batch["audio"].shape == (20, 1, 40, 41) and batch["visual"].shape == (20, 1, 28, 28)


def test_the_same_seed_gives_the_same_bytes(small, tmp_path):
    again = prepare("av_digits", str(tmp_path / "again"), **SMALL)
    assert content(again) == content(small)
    other = prepare("av_digits", str(tmp_path / "other"), seed=1, **SMALL)
    assert content(other)["test-00000-of-00001.parquet"] != content(small)["test-00000-of-00001.parquet"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    prepare("av_digits", str(tmp_path / "out"), train=10, valid=10, test=10)
    assert load_card(str(tmp_path / "out")).name == "av_digits"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_prepared_corpus_is_kept(small):
    before = content(small)
    said = []
    assert prepare("av_digits", small, progress=lambda *step: said.append(step[2]), **SMALL) == small
    assert said == [f"already prepared in {small}"]
    with pytest.raises(ConfigError, match="already holds a corpus made in another way"):
        prepare("av_digits", small, seed=5, **SMALL)
    assert content(small) == before


def test_wrong_names_and_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no corpus is called 'avdigits', did you mean 'av_digits'"):
        prepare("avdigits")
    with pytest.raises(ConfigError, match="no option 'sed', did you mean 'seed'"):
        prepare("av_digits", str(tmp_path / "x"), sed=1)
    with pytest.raises(ConfigError, match="train is 5; give at least 10"):
        prepare("av_digits", str(tmp_path / "x"), train=5)
    with pytest.raises(ConfigError, match="option train of corpus av_digits is 'many'; give an int"):
        prepare("av_digits", str(tmp_path / "x"), train="many")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        prepare("av_digits", str(tmp_path / "full"))
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def write_idx(path, array, compress=False):
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)


@pytest.fixture
def real(tmp_path):
    """Tiny folders in the forms of the Free Spoken Digit Dataset and of MNIST."""
    rng = np.random.default_rng(0)
    audio, images = tmp_path / "audio", tmp_path / "mnist"
    audio.mkdir()
    images.mkdir()
    for speaker in ("ann", "bob", "cyd"):
        for digit in range(10):
            for take in range(2):
                (audio / f"{digit}_{speaker}_{take}.wav").write_bytes(wav_bytes(rng.uniform(-0.5, 0.5, 4000)))
    for part, count, compress in (("train", 400, True), ("t10k", 40, False)):
        end = ".gz" if compress else ""
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(images / f"{part}-images-idx3-ubyte{end}", rng.integers(0, 255, (count, 28, 28), np.uint8), compress)
        write_idx(images / f"{part}-labels-idx1-ubyte{end}", labels, compress)
    return audio, images


def test_real_recordings_and_images_are_taken(real, tmp_path):
    audio, images = real
    card = load_card(prepare("av_digits", str(tmp_path / "out"), audio_dir=str(audio), images_dir=str(images)))
    assert {s: len(i) for s, i in open_splits(card).items()} == {"train": 20, "valid": 20, "test": 20}
    voices = column(card, "voice")
    assert all(len(v) == 1 for v in voices.values()) and len(set.union(*voices.values())) == 3
    assert check_corpus(card).errors == []
    assert "recordings" in card.licence
    assert all(i.startswith("mnist-test-") for i in column(card, "image_id")["test"])


def test_one_speaker_is_split_by_recording(real, tmp_path):
    audio, images = real
    for file in audio.glob("*_bob_*"):
        file.unlink()
    card = load_card(prepare("av_digits", str(tmp_path / "out"), audio_dir=str(audio), images_dir=str(images)))
    assert {s: len(i) for s, i in open_splits(card).items()} == {"train": 20, "valid": 10, "test": 10}
    sounds = column(card, "audio")
    assert not sounds["train"] & sounds["test"]


def test_folders_that_do_not_fit_are_named(real, tmp_path):
    audio, images = real

    def message(**options):
        with pytest.raises((ConfigError, DataError)) as error:
            prepare("av_digits", str(tmp_path / "out"), **options)
        return str(error.value)

    assert "nowhere: no such folder" in message(audio_dir=str(tmp_path / "nowhere"))
    assert "no .wav files" in message(audio_dir=str(images))
    assert "nowhere: no such folder" in message(images_dir=str(tmp_path / "nowhere"), **SMALL)
    (audio / "seven.wav").write_bytes(b"")
    assert "seven.wav: the name is not {digit}_{speaker}_{number}.wav" in message(audio_dir=str(audio))
    (images / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x28")
    assert "t10k-labels-idx1-ubyte: 0 bytes, its header promises 40" in message(images_dir=str(images), **SMALL)
    (images / "t10k-labels-idx1-ubyte").unlink()
    assert "neither t10k-labels-idx1-ubyte nor" in message(images_dir=str(images), **SMALL)
    assert not (tmp_path / "out").exists()
