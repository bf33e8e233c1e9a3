"""Small raw downloads of real media, made into shards by the recipes of this folder's lists, and read as a corpus."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from counterpoise.data.card import load_card
from counterpoise.data.check import check_corpus
from counterpoise.data.loader import LocalData
from counterpoise.data.recipes import prepare

from .media_files import LFS, PAGE, moving, tone, write_picture, write_video
from .training import tiny_bert, two_epochs

RNG = np.random.default_rng(0)
TWEETS = "index\ta\tb\tc\tc\n"


def photo(path, kind="JPEG", height=300, width=280):
    write_picture(path, RNG.integers(0, 255, (height, width, 3), dtype=np.uint8), kind)


def twitter(raw):
    folder = raw / "absa_data/twitter2015"
    folder.mkdir(parents=True)
    for split, first in (("train", 0), ("dev", 10), ("test", 20)):
        rows = "".join(f"{i}\t{i % 3}\t{first + i}.jpg\t$T$ is tweet {first + i}\tit\n" for i in range(1, 7))
        (folder / f"{split}.tsv").write_text(TWEETS + rows)
        for i in range(1, 7):
            photo(raw / f"twitter2015_images/{first + i}.jpg", "PNG" if i == 2 else "JPEG")
    (raw / "twitter2015_images/3.jpg").write_bytes(PAGE)
    (raw / "twitter2015_images/4.jpg").unlink()
    return {"train": {"HTML page": 1, "missing file": 1}}


def sarcasm(raw):
    (raw / "text").mkdir(parents=True)
    for split, name in ((1, "train"), (2, "valid2"), (3, "test2")):
        ids = [f"{split}{i}" for i in range(4)]
        human = ", 1" if split > 1 else ""
        lines = [f"['{n}', 'the text of {n}', {i % 2}{human and f', {i % 2}'}]\r\n" for i, n in enumerate(ids)]
        (raw / f"text/{name}.txt").write_text("".join(lines) + (f"['{split}9', 'irony', 1]\r\n" if split == 1 else ""))
        for n in ids:
            photo(raw / f"images/{n}.jpg")
    (raw / "images/10.jpg").write_bytes(LFS)
    return {"train": {"git-LFS pointer": 1, "word that gives the label away": 1}}


def ucf101(raw):
    lists = raw / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n37 HandstandPushups\n")
    clips = [("ApplyEyeMakeup", "ApplyEyeMakeup"), ("HandstandPushups", "HandStandPushups")]
    for split, groups in (("train", ("08", "09", "10", "11", "12", "13")), ("test", ("01",))):
        rows = [f"{c}/v_{c}_g{g}_c01.avi" for c, _ in clips for g in groups]
        (lists / f"{split}list01.txt").write_text("\n".join(rows) + "\n")
        for folder, stem in clips:
            for g in groups:
                write_video(raw / f"UCF-101/{folder}/v_{stem}_g{g}_c01.avi", moving(27), fps=25)
                for i, part in enumerate("uv"):
                    for frame in (1, 2, 27):
                        grey = np.full((64, 96), 100 + 50 * i, np.uint8)
                        write_picture(raw / f"tvl1_flow/{part}/v_{stem}_g{g}_c01/frame{frame:06}.jpg", grey)
    return {}


def nvgesture(raw):
    for split, subjects in (("train", (1, 2, 3, 4, 6, 7, 11, 12)), ("test", (5,))):
        rows = []
        for label in (1, 2):
            for subject in subjects:
                clip = f"Video_data/class_{label:02}/subject{subject}_r0"
                windows = " ".join(f"{s}:{f}:3:9" for s, f in (("depth", "sk_depth"), ("color", "sk_color")))
                rows.append(f"path:./{clip} {windows} duo_left:duo_left:4:11 label:{label} \n")
                for name in ("sk_color", "sk_depth"):
                    write_video(raw / f"{clip}/{name}.avi", moving(8 if (subject, label) == (3, 2) else 12))
        (raw / f"nvgesture_{split}_correct_cvpr2016_v2.lst").write_text("".join(rows))
    return {"train": {"too short": 1}}


def ave(raw):
    for split, first in (("train", 0), ("val", 10), ("test", 20)):
        rows = [(c, f"-_{first + i:09}", 1, 3) for i, c in enumerate(("Church bell", "Cat", "Race car, auto racing"))]
        extra = [("Cat", rows[0][1], 0, 4), ("Cat", "zzzzzzzzzzz", 5, 5)] if split == "train" else []
        text = "".join(f"{c}&{v}&good&{a}&{b}\n" for c, v, a, b in [*rows, *extra])
        (raw / f"{split}Set.txt").parent.mkdir(parents=True, exist_ok=True)
        (raw / f"{split}Set.txt").write_text(text)
        for _, v, _, _ in rows:
            write_video(raw / f"AVE/{v}.mp4", moving(40), sound=tone(4, 300 + 20 * first, 44100))
    return {"train": {"duplicate": 1, "too short": 1}}


def clip(path, seconds=5, hertz=300, silent=False):
    write_video(path, moving(10 * seconds), sound=None if silent else tone(seconds, hertz, 44100))


def vggsound(raw):
    names = ["bee, wasp, etc. buzzing", "hail", "raining", "foghorn", "skiing", "sailing", "thunder", "swimming"]
    rows = []
    for split, first in (("train", 0), ("test", 20)):
        for i, name in enumerate(names, first):
            rows.append(f'-_{i:09},{i},"{name}",{split}\n')
            clip(raw / f"videos/{split}/-_{i:09}_{i:0{6 if i % 2 else 1}}.mp4", hertz=300 + 20 * i)
    (raw / "vggsound.csv").write_text("".join(rows))
    clip(raw / "videos/train/-_000000001_000001.mp4", silent=True)
    clip(raw / "videos/test/-_000000020_20.mp4", seconds=2)
    (raw / "videos/test/-_000000021_000021.mp4").write_bytes(LFS)
    return {"train": {"no such stream": 1}, "test": {"git-LFS pointer": 1, "too short": 1}}


def kinetics_sounds(raw):
    database = {}
    for subset, first, key in (
        ("training", 0, "{}_{:06}_{:06}"),
        ("validation", 10, "{}_{}"),
        ("testing", 20, "{}_{}"),
    ):
        for i, name in enumerate(("blowing_nose", "tap_dancing", "tickling", "singing"), first):
            database[key.format(f"-_{i:09}", i, i + 10)] = {"subset": subset, "label": name}
            clip(raw / f"{name.replace('_', ' ')}/-_{i:09}_{i:06}_{i + 10:06}.mp4", hertz=300 + 20 * i)
    (raw / "KS_train_val.json").write_text(json.dumps({"labels": [], "database": database}))
    (raw / "singing/-_000000013_000013_000023.mp4").unlink()
    (raw / "tap dancing/-_000000021_000021_000031.mp4").write_bytes(b"")
    return {"valid": {"missing file": 1}, "test": {"zero bytes": 1}}


CASES = {
    "twitter15": (twitter, {}, {"text": (128,), "image": (3, 224, 224)}),
    "sarcasm": (sarcasm, {}, {"text": (128,), "image": (3, 224, 224)}),
    "ucf101": (ucf101, {}, {"rgb": (3, 3, 224, 224), "flow": (3, 2, 224, 224)}),
    "nvgesture": (
        nvgesture,
        {"least": 6, "size": 64},
        {"rgb": (64, 3, 224, 224), "flow": (64, 2, 224, 224), "depth": (64, 1, 224, 224)},
    ),
    "ave": (ave, {}, {"audio": (1, 257, 1004), "visual": (3, 3, 224, 224)}),
    "vggsound": (vggsound, {}, {"audio": (1, 257, 2006), "visual": (1, 3, 384, 384)}),
    "kinetics_sounds": (
        kinetics_sounds,
        {"database": "KS_train_val.json"},
        {"audio": (1, 257, 1003), "visual": (3, 3, 224, 224)},
    ),
}


# what makes the papers' settings quick: smaller inputs and batches, weights that need no download
CLIPS = ["preprocess.audio.seconds=1", "preprocess.visual.size=[32, 32]", "batch_size=4"]
TWEET = ["preprocess.image.size=[32, 32]", "modalities.image=resnet18", "batch_size=4"]
SMALLER = {
    "twitter15": TWEET,
    "sarcasm": TWEET,
    "ucf101": ["preprocess.rgb.size=[32, 32]", "preprocess.flow.size=[32, 32]", "batch_size=8"],
    "nvgesture": [f"preprocess.{m}.{x}" for m in ("rgb", "flow", "depth") for x in ("size=[64, 64]", "num_frames=4")],
    "ave": [*CLIPS, "select=last"],
    "vggsound": [*CLIPS, "protocol=aug-v1"],  # no row of 16 classes can be spared for valid
    "kinetics_sounds": CLIPS,
}


@pytest.mark.parametrize("name", CASES)
def test_a_small_download_becomes_a_sound_corpus_that_trains(tmp_path, name):
    make, options, shapes = CASES[name]
    dropped = make(tmp_path / "raw")
    out = prepare(name, str(tmp_path / "out"), raw=str(tmp_path / "raw"), **options)
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    assert {s: c["dropped"] for s, c in manifest["counts"].items() if c["dropped"]} == dropped
    card = load_card(out)
    report = check_corpus(card)
    assert not report.undecodable and sum(s.rows for s in report.splits.values()) > 6
    assert not [e for e in report.errors if "share samples" not in e]
    batch = next(LocalData(card, batch_size=2).train_batches(1))
    assert {m: tuple(batch[m].shape[1:]) for m in shapes} == shapes, sorted(batch)
    if name in ("twitter15", "sarcasm"):
        pytest.importorskip("transformers")
        bert = tiny_bert(tmp_path / "bert")
        sets = [f"preprocess.text.tokenizer={bert}", f"modalities.text.model={bert}"]
    else:
        sets = []
    summary = two_epochs(name, out, tmp_path, *SMALLER[name], *sets)
    counts = manifest["counts"]
    assert summary["test"]["samples"] == counts["test"]["kept"]
    assert summary["modalities"] == list(shapes)
    assert summary["decisions"], "AUG looks at the scores after the first epoch"


def test_flow_reaches_the_network_as_u_and_v(tmp_path):
    ucf101(tmp_path / "raw")
    stored = prepare("ucf101", str(tmp_path / "stored"), raw=str(tmp_path / "raw"))
    flow = next(LocalData(load_card(stored), batch_size=2).train_batches(1))["flow"]
    u, v = (flow[:, :, i].mean().item() * 255 for i in (0, 1))
    assert (round(u), round(v)) == (100, 150)
    computed = prepare("ucf101", str(tmp_path / "computed"), raw=str(tmp_path / "raw"), flow="computed")
    cells = pq.read_table(next(Path(computed).glob("train-*.parquet")), columns=["flow"])["flow"].to_pylist()
    assert {len(cell) for cell in cells} == {2}, "one for each picture"
    flow = next(LocalData(load_card(computed), batch_size=2).train_batches(1))["flow"]
    right, down = (((flow[:, :, i, 80:144, 80:144].median() * 255 - 128) * 20 / 127).item() for i in (0, 1))
    assert abs(right - 2) < 0.3 and abs(down) < 0.3, "the texture moves 2 pixels to the right per frame"


def test_a_split_that_too_few_rows_leave_nothing_for_is_left_out_of_the_card(tmp_path):
    vggsound(tmp_path / "raw")  # one row of every class: none can be carved for valid
    out = prepare("vggsound", str(tmp_path / "out"), raw=str(tmp_path / "raw"))
    card = load_card(out)
    assert {name: split.expected for name, split in card.splits.items()} == {"train": 7, "test": 6}
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    assert manifest["notes"] == ["Split valid is left out: train has too few rows to carve it out of them."]
    assert not check_corpus(card).errors
