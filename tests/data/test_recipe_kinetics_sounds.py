import json

import pytest

from counterpoise.contracts import ConfigError, DataError

from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

TRAIN = "--4-0ihtnBU_000058_000068,10,4\n_6q_33gNew-_000132_000142,10,27\n-00nar1nEPc_000033_000043,10,13\n"
TEST = "-3Mwkq-7TV4_2,10,23\n-74csnCOiUs_0,10,14\n"
DATABASE = {
    "labels": ["dribbling_basketball", "tap_dancing"],
    "database": {
        "--4-0ihtnBU_000058_000068": {"subset": "training", "label": "dribbling_basketball"},
        "_6q_33gNew-_000132_000142": {"subset": "training", "label": "tap_dancing"},
        "-00nar1nEPc_000033_000043": {"subset": "training", "label": "playing_harmonica"},
        "--RVKBMp_2M_79": {"subset": "validation", "label": "singing"},
        "-3Mwkq-7TV4_2": {"subset": "testing", "label": "shoveling_snow"},
        "-74csnCOiUs_0": {"subset": "testing", "label": "playing_keyboard"},
    },
}
KINETICS = (
    "label,youtube_id,time_start,time_end,split,is_cc\n"
    "playing harmonica,-00nar1nEPc,33,43,train,0\n"
    '"abseiling",0wR5jVB-WPk,417,427,train,0\n'
    "tap dancing,_6q_33gNew-,132,142,train,0\n"
)
VIDEOS = (
    "train/dribbling basketball/--4-0ihtnBU_000058_000068.mp4",
    "train/tap dancing/_6q_33gNew-_132_142.mkv",
    "train/abseiling/0wR5jVB-WPk_000417_000427.mp4",
    "val/-3Mwkq-7TV4_000002_000012.mp4",
    "val/-74csnCOiUs_0.mp4",
)


def raw_of(folder, train=TRAIN, test=TEST, database=DATABASE, media=VIDEOS, **more):
    text = database if isinstance(database, str) else json.dumps(database)
    return make_raw(folder, {"my_train.txt": train, "my_test.txt": test, "KS.json": text, **more}, media)


def test_rows_are_clips_found_by_id_and_start_in_any_folder(tmp_path):
    listing = recipe("kinetics_sounds").listing(raw_of(tmp_path))
    check_sound(listing, card("kinetics_sounds"))
    assert by_split(listing) == {
        "train": ["--4-0ihtnBU_000058", "_6q_33gNew-_000132", "-00nar1nEPc_000033"],
        "valid": [],
        "test": ["-3Mwkq-7TV4_000002", "-74csnCOiUs_000000"],
    }
    assert not listing.left and not listing.notes
    assert [(r.label, r.media["audio"].path) for r in listing.rows] == [
        ("dribbling_basketball", VIDEOS[0]),
        ("tap_dancing", VIDEOS[1]),
        ("playing_harmonica", "-00nar1nEPc_000033_000043.mp4"),  # not there: by its usual name
        ("shoveling_snow", VIDEOS[3]),
        ("playing_keyboard", VIDEOS[4]),
    ]
    row = listing.rows[0]
    assert row.columns == {"video_id": "--4-0ihtnBU", "start_s": 58}
    sound, frames = row.media["audio"], row.media["frames"]
    assert sound.path == frames.path
    assert (sound.rate, sound.start_s, sound.seconds) == (35400, 0, 10)
    assert (frames.per_second, frames.seconds, frames.least, frames.size) == (1, 10, 4, 256)


def test_a_database_names_the_same_rows_and_valid(tmp_path):
    raw = raw_of(tmp_path)
    lists, database = (recipe("kinetics_sounds").listing(raw, **o) for o in ({}, {"database": "KS.json"}))
    check_sound(database, card("kinetics_sounds"))
    assert [r for r in database.rows if r.split != "valid"] == list(lists.rows)
    assert by_split(database)["valid"] == ["--RVKBMp_2M_000079"]


def test_each_family_of_lists_has_its_published_counts(tmp_path):
    raw = raw_of(tmp_path, own=KINETICS)
    listing = recipe("kinetics_sounds").listing
    assert listing(raw).expected == {"train": 14799, "test": 2597}
    assert listing(raw, database="KS.json").expected == {"train": 14799, "valid": 1320, "test": 2597}
    assert not listing(raw, train="own").expected


def test_a_list_of_kinetics_gives_its_clips_of_the_classes(tmp_path):
    raw = raw_of(tmp_path, own=KINETICS.replace("\n", "\r\n"))
    listing = recipe("kinetics_sounds").listing(raw, train="own", valid="my_test.txt", test="own")
    check_sound(listing, card("kinetics_sounds"))
    assert [(r.sample_id, r.label) for r in listing.rows if r.split == "train"] == [
        ("-00nar1nEPc_000033", "playing_harmonica"),
        ("_6q_33gNew-_000132", "tap_dancing"),
    ]
    assert by_split(listing)["valid"] == ["-3Mwkq-7TV4_000002", "-74csnCOiUs_000000"]
    assert listing.notes == [
        "Clips of other classes in own: 1.",
        "Clips of other classes in own: 1.",
        "Values of video_id that are in train and in test: 2.",
    ]


def test_of_several_files_of_a_clip_the_largest_is_read(tmp_path):
    raw = raw_of(tmp_path)
    raw.files["again/-74csnCOiUs_000000_000010.mp4"] = 1001
    listing = recipe("kinetics_sounds").listing(raw)
    assert listing.rows[-1].media["audio"].path == "again/-74csnCOiUs_000000_000010.mp4"
    assert listing.notes == ["Clips with several video files: 1; the largest of each is read."]
    inside = recipe("kinetics_sounds").listing(raw, videos="val/")
    assert [r.media["audio"].path for r in inside.rows][::4] == ["val/--4-0ihtnBU_000058_000068.mp4", VIDEOS[4]]


def test_a_clip_that_comes_again_under_another_name_is_a_duplicate(tmp_path):
    listing = recipe("kinetics_sounds").listing(raw_of(tmp_path, train=f"{TRAIN}--4-0ihtnBU_58,10,5\n"))
    check_sound(listing, card("kinetics_sounds"))
    assert reasons(listing) == {
        "--4-0ihtnBU_000058@train:4": (
            "train",
            "duplicate",
            "clip --4-0ihtnBU_000058 is dribbling_basketball in my_train.txt:1, and laughing here",
        )
    }


def test_the_card_has_31_classes_in_the_order_of_the_lists_numbers():
    classes = card("kinetics_sounds").class_names
    assert len(classes) == 31 and list(classes) == sorted(classes)
    assert (classes[0], classes[13], classes[30]) == ("blowing_nose", "playing_harmonica", "tickling")
    shapes = {n: m.preprocess.shape for n, m in card("kinetics_sounds").modalities.items()}
    assert shapes == {"audio": (1, 257, 1003), "visual": (3, 3, 224, 224)}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("-239HZbaZ0M_164,10,31", "the number of the class is 31; it should be 0 to 30"),
        ("-239HZbaZ0M_164,10,-1", "the number of the class is '-1'"),
        ("-239HZbaZ0M_164,ten,1", "the seconds is 'ten'"),
        ("-239HZbaZ0M_164,10", "2 fields between commas; there should be clip, seconds and number"),
        ("-239HZbaZ0M_164 10 1", "1 fields between commas"),
        ("-239HZbaZ0M,10,1", "'-239HZbaZ0M' is not a clip such as"),
        ("../-239HZbaZ0M_164,10,1", "is not a clip"),
        ("/etc/passwd_164.mp4,10,1", "is not a clip"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("kinetics_sounds").listing(raw_of(tmp_path, train=f"{TRAIN}\n{line}\n"))
    assert "my_train.txt:5: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("line", "number", "reason"),
    [
        ("tickling,-00nar1nEP,3,13,train,0", 5, "video id '-00nar1nEP'; a YouTube id has 11"),
        ("tickling,../../etc/p,3,13,train,0", 5, "video id '../../etc/p'"),
        ("tickling,-00nar1nEPc,x,13,train,0", 5, "the start is 'x'"),
        ("tickling,-00nar1nEPc,3,13", 5, "4 fields between commas; the line of names has 6"),
        (None, 1, "there is no column time_start"),
    ],
)
def test_a_wrong_line_in_a_list_of_kinetics_is_named(tmp_path, line, number, reason):
    text = f"{KINETICS}{line}\n" if line else "label,youtube_id\ntickling,-00nar1nEPc\n"
    with pytest.raises(DataError) as error:
        recipe("kinetics_sounds").listing(raw_of(tmp_path, own=text), train="own")
    assert f"own:{number}: " in str(error.value)
    assert reason in str(error.value)


def test_a_list_of_kinetics_without_a_clip_of_the_classes_is_refused(tmp_path):
    text = "label,youtube_id,time_start\nabseiling,0wR5jVB-WPk,417\n"
    with pytest.raises(DataError, match=r"own:1: the list has no clip of the classes blowing_nose"):
        recipe("kinetics_sounds").listing(raw_of(tmp_path, own=text), train="own")


@pytest.mark.parametrize(
    ("database", "reason"),
    [
        ("{", "is not a database of clips"),
        ("[]", "is not a database of clips"),
        ('{"database": {"-3Mwkq-7TV4_2": "testing"}}', "is not a database of clips"),
        ('{"database": {"-3Mwkq-7TV4_2": 1, "-3Mwkq-7TV4_2": 2}}', "the key '-3Mwkq-7TV4_2' comes twice"),
        ('{"database": {"../etc/passwd": {"subset": "testing", "label": "singing"}}}', "entry '../etc/passwd' is not"),
        ('{"database": {"-3Mwkq-7TV4_2": {"subset": "dev", "label": "singing"}}}', "subset is 'dev'; it should be"),
        ('{"database": {"-3Mwkq-7TV4_2": {"subset": [], "label": "singing"}}}', "subset is []"),
        ('{"database": {"-3Mwkq-7TV4_2": {"subset": "testing", "label": "sining"}}}', "did you mean 'singing'"),
        ('{"database": {"-3Mwkq-7TV4_2": {"subset": "training", "label": "singing"}}}', "no clip of subset testing"),
    ],
)
def test_what_is_wrong_in_a_database_is_named(tmp_path, database, reason):
    with pytest.raises(DataError) as error:
        recipe("kinetics_sounds").listing(raw_of(tmp_path, database=database), database="KS.json")
    assert str(error.value).startswith("KS.json") and reason in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0},
        {"per_second": 0.0},
        {"least": 0},
        {"train": ""},
        {"database": "KS.json", "valid": "my_test.txt"},
        {"database": "KS.json", "train": "other.txt"},
    ],
)
def test_a_wrong_option_names_what_would_do(tmp_path, options):
    with pytest.raises(ConfigError, match=f"option {next(iter(options))} is .*give"):
        recipe("kinetics_sounds").listing(raw_of(tmp_path), **options)


def test_a_list_that_is_not_there_is_named(tmp_path):
    for options in ({"test": "nowhere"}, {"database": "nowhere"}):
        with pytest.raises(DataError, match="nowhere"):
            recipe("kinetics_sounds").listing(raw_of(tmp_path), **options)
