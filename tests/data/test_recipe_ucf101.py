import pytest

from counterpoise.contracts import ConfigError, DataError

from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

CLASSES = "1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n37 HandstandPushups\r\n"
TRAIN = (
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n"
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi 1\n"
    "ApplyLipstick/v_ApplyLipstick_g09_c01.avi 2\n"
    "HandstandPushups/v_HandstandPushups_g10_c01.avi 37\n"
)
TEST = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nHandstandPushups/v_HandstandPushups_g01_c01.avi\n"
CLIPS = (
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01",
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02",
    "ApplyLipstick/v_ApplyLipstick_g09_c01",
    "HandstandPushups/v_HandStandPushups_g10_c01",  # other spelling than in the lists
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01",
    "HandstandPushups/v_HandStandPushups_g01_c01",
)
FLOW = tuple(
    f"tvl1_flow/{part}/{clip.rpartition('/')[2]}/frame{i:06}.jpg"
    for clip in CLIPS
    for part in "uv"
    for i in range(1, 56)
)
MEDIA = (*(f"UCF-101/{clip}.avi" for clip in CLIPS), *FLOW)


def raw_of(folder, train=TRAIN, test=TEST, classes=CLASSES, media=MEDIA, split=1):
    texts = {"classInd.txt": classes, f"trainlist0{split}.txt": train, f"testlist0{split}.txt": test}
    return make_raw(folder, {f"ucfTrainTestlist/{name}": text for name, text in texts.items()}, media)


def test_clips_are_listed_with_their_group_video_and_stored_flow(tmp_path):
    listing = recipe("ucf101").listing(raw_of(tmp_path))
    check_sound(listing, card("ucf101"))
    assert by_split(listing) == {
        "train": [
            "v_ApplyEyeMakeup_g08_c01", "v_ApplyEyeMakeup_g08_c02", "v_ApplyLipstick_g09_c01",
            "v_HandstandPushups_g10_c01",
        ],
        "valid": [],
        "test": ["v_ApplyEyeMakeup_g01_c01", "v_HandstandPushups_g01_c01"],
    }  # fmt: skip
    assert not listing.left and not listing.notes
    assert {r.columns["group"] for r in listing.rows if r.split == "train"} == {
        "ApplyEyeMakeup_g08", "ApplyLipstick_g09", "HandstandPushups_g10",
    }  # fmt: skip
    first = listing.rows[0]
    assert first.label == "ApplyEyeMakeup"
    assert first.media["rgb"].path == "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
    assert first.media["rgb"].per_second == 1
    folder = "tvl1_flow/{}/v_ApplyEyeMakeup_g08_c01/frame0000{}.jpg"
    assert first.media["flow"].u == tuple(folder.format("u", i) for i in ("01", "26", "51"))
    assert first.media["flow"].v == tuple(folder.format("v", i) for i in ("01", "26", "51"))


def test_the_card_has_the_published_order_of_classes():
    classes = card("ucf101").class_names
    assert len(classes) == 101
    assert classes[0] == "ApplyEyeMakeup" and classes[36] == "HandstandPushups" and classes[100] == "YoYo"
    assert classes[34:36] == ("Hammering", "HammerThrow"), "by number, not by alphabet"


def test_files_are_found_in_either_spelling_and_clips_keep_one_name(tmp_path):
    one = recipe("ucf101").listing(raw_of(tmp_path / "1"))
    two = recipe("ucf101").listing(
        raw_of(
            tmp_path / "2",
            train=TRAIN.replace("v_Handstand", "v_HandStand"),
            test=TEST.replace("v_Handstand", "v_HandStand"),
            split=2,
        ),
        split=2,
    )
    assert one.rows == two.rows
    assert one.rows[-1].media["rgb"].path == "UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi"


def test_each_split_has_its_published_counts(tmp_path):
    listing = recipe("ucf101").listing(raw_of(tmp_path, split=3), split=3)
    assert listing.expected == {"train": 9624, "test": 3696}
    content = {"name": "ucf101", "splits": {"train": {}, "test": {"files": "test-*", "expected": 1}}}
    counts = {n: recipe("ucf101").adapt_card(content, split=n)["splits"]["test"]["expected"] for n in (1, 2, 3)}
    assert counts == {1: 3783, 2: 3734, 3: 3696}
    assert counts[1] == card("ucf101").splits["test"].expected


def test_pictures_may_be_taken_from_storage_and_more_often(tmp_path):
    stored = tuple(f"jpegs_256/{c.rpartition('/')[2]}/frame{i:06}.jpg" for c in CLIPS for i in range(1, 57))
    raw = raw_of(tmp_path, media=(*FLOW, *stored))
    row = recipe("ucf101").listing(raw, rgb="pictures", per_second=5.0, size=0).rows[0]
    assert [p[-6:-4] for p in row.media["rgb"].paths] == [f"{i:02}" for i in range(1, 57, 5)]
    assert len(row.media["flow"].u) == len(row.media["flow"].v) == 11
    assert row.media["rgb"].size is None


def test_flow_can_be_computed_of_the_frames_that_are_taken_as_pictures(tmp_path):
    raw = raw_of(tmp_path, media=tuple(m for m in MEDIA if m.endswith(".avi")))
    listing = recipe("ucf101").listing(raw, flow="computed")
    flow = listing.rows[0].media["flow"]
    assert flow.video == listing.rows[0].media["rgb"]
    assert any("TV-L1" in note for note in listing.notes)


def test_a_clip_without_stored_flow_is_missing(tmp_path):
    lacking = "v_ApplyEyeMakeup_g08_c02/"
    media = [m for m in MEDIA if f"u/{lacking}" not in m and "v/v_ApplyLipstick_g09_c01/frame000055" not in m]
    listing = recipe("ucf101").listing(raw_of(tmp_path, media=tuple(media)))
    assert reasons(listing) == {
        "v_ApplyEyeMakeup_g08_c02": ("train", "missing file", "no pictures in tvl1_flow/u/v_ApplyEyeMakeup_g08_c02"),
        "v_ApplyLipstick_g09_c01": (
            "train",
            "missing file",
            "55 pictures of u and 54 of v, which do not form pairs: tvl1_flow/u/v_ApplyLipstick_g09_c01",
        ),
    }
    assert len(listing.rows) == 4


def test_a_video_that_is_not_there_is_listed_by_its_name_in_the_list(tmp_path):
    media = tuple(m for m in MEDIA if m != f"UCF-101/{CLIPS[3]}.avi")
    row = recipe("ucf101").listing(raw_of(tmp_path, media=media)).rows[3]
    assert row.media["rgb"].path == "UCF-101/HandstandPushups/v_HandstandPushups_g10_c01.avi"


def test_a_clip_that_comes_again_is_a_duplicate_and_shared_groups_are_named(tmp_path):
    test = f"{TEST}ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi\nApplyEyeMakeup/v_ApplyEyeMakeup_g08_c03.avi 1\n"
    media = (*MEDIA, *(m.replace("g08_c01", "g08_c03") for m in MEDIA if "g08_c01" in m))
    listing = recipe("ucf101").listing(raw_of(tmp_path, test=test, media=media))
    check_sound(listing, card("ucf101"))
    ((split, reason, detail),) = reasons(listing).values()
    assert (split, reason) == ("test", "duplicate")
    assert detail == "clip v_ApplyEyeMakeup_g08_c01 is that of ucfTrainTestlist/trainlist01.txt:1"
    assert listing.notes == ["Values of group that are in train and in test: 1."]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c09.avi 2", "class ApplyEyeMakeup has number 1 in classInd.txt"),
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c09.avi x", "the number of the class is 'x'"),
        ("ApplyEyeMakup/v_ApplyEyeMakup_g08_c09.avi 1", "unknown class 'ApplyEyeMakup', did you mean 'ApplyEyeMakeup'"),
        ("YoYo/v_YoYo_g08_c09.avi 101", "class YoYo is not in classInd.txt"),
        ("ApplyLipstick/v_ApplyEyeMakeup_g08_c09.avi 2", "a clip of ApplyEyeMakeup in the folder of ApplyLipstick"),
        ("../ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c09.avi 1", "there should be Class/v_Class_gNN_cNN.avi"),
        ("/data/v_ApplyEyeMakeup_g08_c09.avi 1", "there should be Class/v_Class_gNN_cNN.avi"),
        ("v_ApplyEyeMakeup_g08_c09.avi", "there should be Class/v_Class_gNN_cNN.avi"),
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c09.avi 1 1", "there should be"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("ucf101").listing(raw_of(tmp_path, train=f"{TRAIN}\n{line}\n"))
    assert "ucfTrainTestlist/trainlist01.txt:6: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("3 YoYo", "class YoYo has number 3; in the card it is 101"),
        ("x YoYo", "the number of the class is 'x'"),
        ("Yo Yo 101", "there should be a number and a class"),
        ("102 Yodel", "unknown class 'Yodel'"),
    ],
)
def test_class_numbers_have_to_be_those_of_the_card(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("ucf101").listing(raw_of(tmp_path, classes=f"{CLASSES}{line}\n"))
    assert "ucfTrainTestlist/classInd.txt:4: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"split": 4}, {"rgb": "avi"}, {"flow": "none"}, {"per_second": 0.0}, {"per_second": 30.0}],
)
def test_a_wrong_option_names_what_would_do(tmp_path, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"option {name} is .*give"):
        recipe("ucf101").listing(raw_of(tmp_path), **options)
