import io
import json

import pyarrow.parquet as pq
import pytest
import soundfile

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.recipes import prepare

from .media_files import numbered, tone, write_video
from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

LIST = (
    "---g-f_I2yQ,1,people marching,test\n"
    "--0PQM4-hqg,30,waterfall burbling,train\n"
    '--9O4XZOge4,30,"female speech, woman speaking",train\n'
    "_b-2_000010,7,foghorn,train\n"
    "--0PQM4-hqg,170,sea waves,train\n"
)
VIDEOS = (
    "clips/---g-f_I2yQ_000001.mp4",
    "clips/a/--0PQM4-hqg_000030.mp4",
    "clips/a/--0PQM4-hqg_170.mp4",
    "other/--9O4XZOge4_30.webm",
    "clips/_b-2_000010_000007.mp4",
)


def raw_of(folder, text=LIST, media=VIDEOS, **more):
    return make_raw(folder, {"vggsound.csv": text, **more}, media)


def test_rows_are_clips_with_their_split_start_and_file_wherever_it_is(tmp_path):
    listing = recipe("vggsound").listing(raw_of(tmp_path))
    check_sound(listing, card("vggsound"))
    assert by_split(listing) == {
        "train": ["--0PQM4-hqg_000030", "--9O4XZOge4_000030", "_b-2_000010_000007", "--0PQM4-hqg_000170"],
        "valid": [],
        "test": ["---g-f_I2yQ_000001"],
    }
    assert not listing.left and not listing.notes
    files = {r.sample_id: r.media["frames"].path for r in listing.rows}
    assert files == dict(zip(by_split(listing)["train"], (VIDEOS[i] for i in (1, 3, 4, 2)), strict=True)) | {
        "---g-f_I2yQ_000001": VIDEOS[0]
    }
    row = listing.rows[1]
    assert row.label == "female speech, woman speaking"
    assert row.columns == {"video_id": "--9O4XZOge4", "start_s": 30}
    sound, frames = row.media["audio"], row.media["frames"]
    assert sound.path == frames.path
    assert (sound.rate, sound.start_s, sound.seconds) == (35400, 0, 10)
    assert (frames.per_second, frames.seconds, frames.least, frames.size) == (1, 10, 4, 384)


def test_a_clip_that_is_not_there_is_listed_by_its_usual_name(tmp_path):
    listing = recipe("vggsound").listing(raw_of(tmp_path, media=()), videos="clips/")
    assert listing.rows[-1].media["audio"].path == "clips/---g-f_I2yQ_000001.mp4"


def test_only_the_folder_of_videos_is_looked_at(tmp_path):
    listing = recipe("vggsound").listing(raw_of(tmp_path), videos="clips")
    assert {r.sample_id: r.media["audio"].path for r in listing.rows}["--9O4XZOge4_000030"] == (
        "clips/--9O4XZOge4_000030.mp4"
    )


def test_of_several_files_of_a_clip_the_largest_is_read(tmp_path):
    raw = raw_of(tmp_path)
    raw.files["part2/---g-f_I2yQ_1.mp4"] = 5000
    raw.files["a_page/---g-f_I2yQ_000001.mp4"] = 80
    listing = recipe("vggsound").listing(raw)
    assert listing.rows[-1].media["audio"].path == "part2/---g-f_I2yQ_1.mp4"
    assert listing.notes == ["Clips with several video files: 1; the largest of each is read."]


def test_lists_of_one_split_take_the_place_of_its_rows(tmp_path):
    few = '--9O4XZOge4_000030.mp4,"female speech, woman speaking"\n---g-f_I2yQ_1,people marching\n'
    raw = raw_of(tmp_path, **{"test.csv": few})
    listing = recipe("vggsound").listing(raw, test="test.csv")
    check_sound(listing, card("vggsound"))
    assert by_split(listing)["test"] == ["--9O4XZOge4_000030", "---g-f_I2yQ_000001"]
    assert len(by_split(listing)["train"]) == 4
    assert listing.notes == ["Values of video_id that are in train and in test: 1."]
    both = recipe("vggsound").listing(raw, train="test.csv", test="test.csv", lists="not there.csv")
    assert by_split(both)["train"] == by_split(both)["test"]


def test_rows_of_train_whose_video_is_in_test_can_be_dropped(tmp_path):
    raw = raw_of(tmp_path, f"{LIST}---g-f_I2yQ,50,foghorn,train\n")
    assert recipe("vggsound").listing(raw).notes == ["Values of video_id that are in train and in test: 1."]
    listing = recipe("vggsound").listing(raw, overlap="drop")
    assert reasons(listing) == {
        "---g-f_I2yQ_000050": ("train", "in a later split too", "video_id ---g-f_I2yQ is in test")
    }
    assert len(by_split(listing)["train"]) == 4


def test_a_clip_that_comes_again_is_a_duplicate(tmp_path):
    listing = recipe("vggsound").listing(raw_of(tmp_path, f"{LIST}--0PQM4-hqg,030,foghorn,train\n"))
    check_sound(listing, card("vggsound"))
    assert reasons(listing) == {
        "--0PQM4-hqg_000030@train:6": (
            "train",
            "duplicate",
            "clip --0PQM4-hqg_000030 is waterfall burbling in vggsound.csv:2, and foghorn here",
        )
    }


def test_a_mark_and_windows_line_ends_change_nothing(tmp_path):
    plain = recipe("vggsound").listing(raw_of(tmp_path / "a"))
    marked = b"\xef\xbb\xbf" + LIST.replace("\n", "\r\n").removesuffix("\r\n").encode()
    assert recipe("vggsound").listing(raw_of(tmp_path / "b", marked)).rows == plain.rows


def test_the_card_has_the_classes_in_sorted_order():
    classes = card("vggsound").class_names
    assert len(classes) == 309 and list(classes) == sorted(classes)
    assert classes[0] == "air conditioning noise" and classes[-1] == "zebra braying"
    assert sum("," in name for name in classes) == 23
    assert {"eletric blender running", "bee, wasp, etc. buzzing", "police car (siren)"} <= set(classes)


def test_the_published_counts_and_the_spectrogram_are_those_of_the_papers(tmp_path):
    assert recipe("vggsound").listing(raw_of(tmp_path)).expected == {"train": 183730, "test": 15446}
    assert card("vggsound").splits["test"].expected == 15446
    shapes = {n: m.preprocess.shape for n, m in card("vggsound").modalities.items()}
    assert shapes == {"audio": (1, 257, 2006), "visual": (1, 3, 384, 384)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--0PQM4-hqh,3,foghron,train", "unknown class 'foghron', did you mean 'foghorn'"),
        ("--0PQM4-hqh,3,foghorn", "3 fields between commas; there should be id, start, label and split"),
        ("--0PQM4-hqh,3,female speech, woman speaking,train", "5 fields between commas"),
        ('--0PQM4-hqh,3,"foghorn,train', "not fields between commas"),
        ("--0PQM4-hqh,3,foghorn,valid", "the split is 'valid'"),
        ("--0PQM4-hqh,-3,foghorn,train", "the start is '-3'"),
        ("--0PQM4-hqh,2.5,foghorn,train", "the start is '2.5'"),
        ("--0PQM4-hq,3,foghorn,train", "video id '--0PQM4-hq'; a YouTube id has 11"),
        ("../../../et,3,foghorn,train", "video id '../../../et'"),
        ("/etc/passwd,3,foghorn,train", "video id '/etc/passwd'"),
        ("--0PQM4-hqh_3,3,foghorn,train", "video id '--0PQM4-hqh_3'"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("vggsound").listing(raw_of(tmp_path, f"{LIST}\n{line}\n"))
    assert "vggsound.csv:7: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("---g-f_I2yQ,1,people marching,test", "4 fields between commas; there should be a clip and a label"),
        ("---g-f_I2yQ.mp4,people marching", "'---g-f_I2yQ.mp4' is not a clip such as"),
        ("../---g-f_I2yQ_000001.mp4,people marching", "is not a clip"),
        ("---g-f_I2yQ_000001.mp4,people", "unknown class 'people'"),
    ],
)
def test_a_wrong_line_in_a_list_of_one_split_is_named(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("vggsound").listing(raw_of(tmp_path, **{"test.csv": line}), test="test.csv")
    assert "test.csv:1: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("silent", ["drop", "keep"])
def test_clips_without_sound_are_dropped_or_kept_as_silence(tmp_path, silent):
    (tmp_path / "raw").mkdir()
    names = {"-_000000000_000000": True, "-_000000001_000001": False, "-_000000002_000002": True}
    rows = [f"{n[:11]},{int(n[12:])},foghorn,{s}" for n, s in zip(names, ("train", "train", "test"), strict=True)]
    (tmp_path / "raw/vggsound.csv").write_text("\n".join(rows))
    for name, heard in names.items():
        write_video(tmp_path / f"raw/{name}.mp4", numbered(20), 4, tone(5, rate=44100) if heard else None)
    out = tmp_path / "out"
    prepare("vggsound", str(out), raw=str(tmp_path / "raw"), silent=silent, rate=8000, size=32)
    mute = json.loads((out / "ledger.jsonl").read_text().splitlines()[1])
    manifest = json.loads((out / "manifest.json").read_text())
    said = "Rows that are kept with a remark in ledger.jsonl: 1."
    if silent == "drop":
        assert (mute["kept"], mute["reason"]) == (False, "no such stream")
        assert said not in manifest["notes"]
        return
    assert mute["kept"] and mute["remarks"] == ["-_000000001_000001.mp4 has no audio; silence is stored"]
    assert said in manifest["notes"]
    cells = pq.read_table(next(out.glob("train-*.parquet")), columns=["audio"])["audio"].to_pylist()
    heard, silence = (soundfile.read(io.BytesIO(cell))[0] for cell in cells)
    assert heard.any() and silence.shape == (80_000,) and not silence.any()


@pytest.mark.parametrize(
    "options", [{"overlap": "x"}, {"silent": "zero"}, {"rate": 0}, {"per_second": 0.0}, {"least": 0}]
)
def test_a_wrong_option_names_what_would_do(tmp_path, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"option {name} is .*give"):
        recipe("vggsound").listing(raw_of(tmp_path), **options)


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        recipe("vggsound").listing(raw_of(tmp_path), lists="nowhere.csv")
