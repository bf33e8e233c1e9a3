"""`counterpoise bench ingest` on few clips: that both sides do the same work, not how fast they are."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.bench.checkout import make_checkout

from counterpoise.bench import epoch, ingest, media
from counterpoise.bench.machine import Side, Spread
from counterpoise.bench.released import ReleasedCremad, chosen_resampler, released_loader
from counterpoise.contracts import ConfigError, DataError, ResourceError
from counterpoise.data.loader import LocalData
from counterpoise.engine import checkpoint

ROWS = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a measurement with its raw download and its shards."""
    place = tmp_path_factory.mktemp("bench")
    raw = media.make_raw(place / f"raw-{ROWS}", ROWS, lambda *_: None)
    media.prepare_cremad(raw, place / f"shards-{ROWS}", 2, lambda *_: None)
    return place


@pytest.fixture
def released(folder: Path) -> Callable[[str], ReleasedCremad]:
    raw = folder / f"raw-{ROWS}"
    lines = (raw / "train.csv").read_text().split()
    clips = [line.split(",")[0] for line in lines]
    return lambda frames: ReleasedCremad(str(raw), clips, [0] * len(clips), frames, "scipy")


def test_the_raw_download_is_made_once_and_always_alike(folder: Path, tmp_path: Path) -> None:
    raw = folder / f"raw-{ROWS}"
    files = {p.relative_to(raw): p.stat().st_mtime_ns for p in raw.rglob("*") if p.is_file()}
    media.make_raw(raw, ROWS, lambda *_: pytest.fail("made again"))
    assert {p.relative_to(raw): p.stat().st_mtime_ns for p in raw.rglob("*") if p.is_file()} == files
    other = media.make_raw(tmp_path / "other", 1, lambda *_: None)
    clip = media.clip_names(1)[0]
    assert (other / f"AudioWAV/{clip}.wav").read_bytes() == (raw / f"AudioWAV/{clip}.wav").read_bytes()


def test_clip_names_are_those_of_the_corpus_and_differ() -> None:
    names = media.clip_names(500)
    assert len(set(names)) == 500
    assert {name.split("_")[2] for name in names} == set(media.EMOTIONS)
    with pytest.raises(ConfigError, match=r"--rows is 100000; give 1 to 71928"):
        media.clip_names(100_000)


def test_both_sides_make_the_same_spectrograms(folder: Path, released: Callable[[str], ReleasedCremad]) -> None:
    """Stored at 22 050 Hz with 16 bits, or resampled at every read: no difference but rounding to 16 bits."""
    data = LocalData(str(folder / f"shards-{ROWS}"), batch_size=4)
    theirs = released("Image-01-FPS")
    ids = data.sample_ids("train")
    for batch in data.batches("train", rows=range(4)):
        for row, sound in zip(batch["row"].tolist(), batch["audio"], strict=True):
            wav, _ = theirs.files(theirs.clips.index(ids[row]))
            expected = np.exp(theirs.spectrogram(wav))
            found = np.exp(sound[0].numpy())
            assert found.shape == expected.shape == (257, 1250)
            assert np.abs(found - expected).max() < 512 * 2**-15  # a window of as many half steps of 16 bits


def test_both_sides_give_tensors_of_the_same_shape(folder: Path, released: Callable[[str], ReleasedCremad]) -> None:
    from counterpoise.data.options import DataOptions

    options = DataOptions.model_validate({"augment": ingest.AUGMENT, "cache": "off"})
    ours = next(iter(LocalData(str(folder / f"shards-{ROWS}"), batch_size=6, options=options).train_batches(1)))
    for frames in ("Image-01-FPS", "Image-01-FPS-jpg"):
        sound, picture, label = next(iter(released_loader(released(frames), 6, 0)))
        assert sound.shape == ours["audio"].shape and sound.dtype == ours["audio"].dtype == torch.float32
        assert picture.shape[1:] == ours["visual"].shape[1:] == (1, 3, 224, 224)
        assert picture.dtype == ours["visual"].dtype and label.dtype == ours["label"].dtype


def test_frames_are_saved_as_the_released_code_does(folder: Path) -> None:
    clip = media.clip_names(ROWS)[0]
    names = sorted(p.name for p in (folder / f"raw-{ROWS}/Image-01-FPS" / clip).iterdir())
    assert names == ["00000.png", "00030.png", "00060.png"]  # 2.5 s at 30 frames per second


def test_every_side_is_measured_in_turns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the sides here: each is a process that imports torch."""
    wanted = {ingest.BASE, "shards, local disk"}
    every = ingest._variants
    monkeypatch.setattr(ingest, "_variants", lambda *args: [side for side in every(*args) if side[0] in wanted])
    result = ingest.ingest_rates(
        rows=ROWS,
        processes=1,
        rounds=3,
        out=str(folder),
        s3=False,
        resampler="scipy",
        waiting=False,
        say=lambda _: None,
    )
    lines = {row["what"]: row for row in result["rows_measured"]}
    assert set(lines) == wanted
    assert result["shapes"] == {"audio": [1, 257, 1250], "visual": [1, 3, 224, 224]}
    tensor_bytes = 4 * (257 * 1250 + 3 * 224 * 224)
    for row in lines.values():
        rate = row["samples_per_s_per_core"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert math.isclose(row["bytes_per_s_per_core"]["median"], rate["median"] * tensor_bytes)
        assert row["peak_memory_bytes"] > 50e6 and row["stored_bytes_per_sample"] > 10_000
    assert lines[ingest.BASE]["ratio_per_core"] == {"median": 1, "low": 1, "high": 1}
    text = ingest.render(result)
    assert all(name in text for name in lines)
    assert f"{ROWS} clips" in text and result["machine"]["processor"] in text
    assert "S3: not measured" in text


def test_ratios_are_formed_within_rounds() -> None:
    """The machine is half as fast in the second round: for both, so the ratio stays 3."""

    def answer(samples_per_cpu_s: float) -> dict[str, float]:
        return {
            "samples": 60,
            "seconds": 120 / samples_per_cpu_s,
            "cpu_s": 60 / samples_per_cpu_s,
            "bytes": 600,
            "stored_bytes": 120,
            "peak_bytes": 1,
        }

    base, ours = ingest.summary({ingest.BASE: [answer(10), answer(5)], "ours": [answer(30), answer(15)]})
    assert base["ratio_per_core"] == {"median": 1, "low": 1, "high": 1}
    assert ours["ratio_per_core"] == ours["ratio_wall"] == {"median": 3, "low": 3, "high": 3}
    assert ours["samples_per_s_per_core"]["median"] == 22.5
    assert ours["samples_per_s"]["median"] == 11.25
    assert ours["bytes_per_s_per_core"]["median"] == 225
    assert ours["stored_bytes_per_sample"] == 2


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5, 1, 4, 2, 3, 8, 7, 6]).to_json() == {"median": 4.5, "low": 3, "high": 7}


def test_a_training_tells_how_long_it_waited(folder: Path) -> None:
    card = media.few_rows_card(str(folder / f"shards-{ROWS}"), ROWS, 5)
    found = ingest.waiting_share("cnn", card, 1, lambda _: None)
    assert 0 < found["waited_s"] < found["seconds"]
    assert found["share"] == found["waited_s"] / found["seconds"]
    assert found["samples"] == 6  # 26 clips with those for test, three of each sentence: two sentences


def test_the_resampler_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    with pytest.raises(ConfigError, match="--resampler is 'libros', did you mean 'librosa'"):
        chosen_resampler("libros")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_resampler("auto") == "scipy"
    with pytest.raises(ResourceError, match="uv run --with librosa"):
        chosen_resampler("librosa")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert chosen_resampler("auto") == "librosa"


def test_epochs_of_both_sides_take_every_clip_once(folder: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    found = epoch.epoch_rates(
        rows=ROWS, batch_size=6, classifiers=2, processes=1, threads=1, rounds=2, device="cpu", compute={}, cache="off",
        against=str(checkout), resampler="scipy", out=str(folder), say=lambda _: None, encoder="cnn", guards=True,
    )  # fmt: skip
    ours, saving, unchecked, theirs = found["rows_measured"]
    assert (ours["what"], theirs["what"]) == (epoch.OURS, epoch.RELEASED) and "times_faster" in ours
    assert "times_as_long" in saving and "times_as_long" in unchecked
    seen = [json.loads(line) for line in (checkout / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 3 * ROWS / 6, "an epoch to warm up, and two"
    assert {tuple(map(str, row[:3])) for row in seen} == {("[6, 257, 1250]", "[6, 3, 1, 224, 224]", "[6, 6]")}
    assert {row[4] for row in seen} == {1}, "one classifier was added"
    assert "18 clips of CREMA-D's shape, cnn twice" in epoch.render(found)


def test_an_epoch_without_checksums_and_with_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """It does not see a page that others refuse, and there is a checkpoint afterwards."""
    corpus = shutil.copytree(folder / f"shards-{ROWS}", tmp_path / "shards")
    for shard in corpus.glob("train-*.parquet"):
        change_a_page(shard)
    with pytest.raises(DataError, match="damaged"):
        LocalData(str(corpus), batch_size=6)
    spec = {"corpus": str(corpus), "encoder": "cnn", "compute": {}, "cache": "off", "classifiers": 1, "batch_size": 6}
    spec |= {"threads": 1, "processes": 1, "device": "cpu", "runs": str(tmp_path), "name": "epoch"}
    spec |= {"saving": True, "unchecked": True}
    with contextlib.closing(Side("unguarded", epoch._ours, spec)) as side:
        assert side.ask(0) > 0
    assert len(checkpoint.committed(str(tmp_path / "epoch" / "checkpoints"))) == 1


def change_a_page(shard: Path) -> None:
    """Change the last letter of a sample's id: pixels and sound stay what they are."""
    import pyarrow.parquet as pq

    columns = pq.read_metadata(shard).row_group(0)
    [column] = [c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "sample_id"]
    data = bytearray(shard.read_bytes())
    data[column.data_page_offset - 1] ^= 1  # where the page of the dictionary ends
    shard.write_bytes(data)
