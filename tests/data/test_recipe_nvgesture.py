import pytest

from counterpoise.contracts import ConfigError, DataError

from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe


def row(clip, label, colour="146:226", depth="146:226"):
    windows = f"depth:sk_depth:{depth} color:sk_color:{colour} duo_left:duo_left:170:263"
    return f"path:./Video_data/{clip} {windows} label:{label} \n"  # with a blank at its end, as published


TRAIN = (
    row("class_01/subject3_r0", 1)
    + row("class_01/subject4_r2", 2, "90:170", "91:171")
    + row("class_25/subject12_r2", 25)
)
TEST = row("class_20/subject5_r1", 21) + row("class_01/subject13_r0", 1).rstrip()  # and none at the end of the file


def raw_of(folder, train=TRAIN, test=TEST, suffix="_v2"):
    names = {s: f"nvgesture_{s}_correct_cvpr2016{suffix}.lst" for s in ("train", "test")}
    return make_raw(folder, {names["train"]: train, names["test"]: test})


def test_every_stream_has_its_own_window(tmp_path):
    listing = recipe("nvgesture").listing(raw_of(tmp_path))
    check_sound(listing, card("nvgesture"))
    assert by_split(listing) == {
        "train": ["class_01/subject3_r0", "class_01/subject4_r2", "class_25/subject12_r2"],
        "valid": [],
        "test": ["class_20/subject5_r1", "class_01/subject13_r0"],
    }
    second = listing.rows[1]
    assert second.columns == {"subject": "4", "repetition": "2"}
    rgb, depth, flow = (second.media[name] for name in ("rgb", "depth", "flow"))
    assert (rgb.path, rgb.channels) == ("Video_data/class_01/subject4_r2/sk_color.avi", 3)
    assert (depth.path, depth.channels) == ("Video_data/class_01/subject4_r2/sk_depth.avi", 1)
    assert (rgb.first_frame, rgb.end_frame, depth.first_frame, depth.end_frame) == (90, 170, 91, 171)
    assert rgb.size == depth.size == (256, 256)
    assert rgb.least == depth.least == 64
    assert flow.video == rgb


def test_the_label_is_that_of_the_list_not_of_the_folder(tmp_path):
    labels = [r.label for r in recipe("nvgesture").listing(raw_of(tmp_path)).rows]
    assert labels == ["class_01", "class_02", "class_25", "class_21", "class_01"]
    assert card("nvgesture").class_names == tuple(f"class_{i:02}" for i in range(1, 26))


def test_version_2_is_read_unless_version_1_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"nvgesture_train_correct_cvpr2016\.lst"):
        recipe("nvgesture").listing(raw_of(tmp_path), version="v1")
    listing = recipe("nvgesture").listing(raw_of(tmp_path / "one", suffix=""), version="v1")
    assert len(listing.rows) == 5
    assert listing.expected == {"train": 1050, "test": 482}
    assert card("nvgesture").splits["test"].expected == 482


def test_lists_and_videos_may_lie_in_folders_of_their_own(tmp_path):
    raw_of(tmp_path / "lists")
    listing = recipe("nvgesture").listing(make_raw(tmp_path, {}), lists=str(tmp_path / "lists"), videos="nv")
    assert listing.rows[0].media["rgb"].path == "nv/Video_data/class_01/subject3_r0/sk_color.avi"
    assert listing.rows[0].sample_id == "class_01/subject3_r0"


def test_flow_can_be_left_out_of_rows_and_card(tmp_path):
    module = recipe("nvgesture")
    listing = module.listing(raw_of(tmp_path), flow="none")
    assert set(listing.rows[0].media) == {"rgb", "depth"}
    content = {"name": "nvgesture", "modalities": {"rgb": {}, "flow": {}, "depth": {}}}
    assert list(module.adapt_card(content, flow="none", size=256)["modalities"]) == ["rgb", "depth"]
    assert module.adapt_card(content, flow="computed", size=256) == content


def test_a_recording_that_comes_again_is_a_duplicate_and_shared_subjects_are_named(tmp_path):
    test = TEST + "\n" + row("class_01/subject3_r0", 1) + row("class_02/subject3_r1", 2)
    listing = recipe("nvgesture").listing(raw_of(tmp_path, test=test))
    check_sound(listing, card("nvgesture"))
    ((split, reason, detail),) = reasons(listing).values()
    assert (split, reason) == ("test", "duplicate")
    assert detail == "clip class_01/subject3_r0 is that of nvgesture_train_correct_cvpr2016_v2.lst:1"
    assert "Values of subject that are in train and in test: 1." in listing.notes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (row("class_26/subject1_r0", 26), "unknown class 26; labels lie in 1..25"),
        (row("class_00/subject1_r0", 0), "unknown class 0"),
        (row("class_01/subject1_r0", "x"), "the label is 'x'"),
        (row("class_01/subject1_r0", "1:2"), "label should be there with 1 value behind"),
        (row("class_01/subject1_r0", 1, colour="226:146"), "the window 226:146 is empty"),
        (row("class_01/subject1_r0", 1, depth="146:146"), "the window 146:146 is empty"),
        (row("class_01/subject1_r0", 1, depth="146"), "depth should be there with 3 values"),
        (row("class_01/subject1_r0", 1, depth="-1:5"), "the first frame is '-1'"),
        (row("class_01/subject1_r0", 1).replace("sk_color", "../sk_color"), "file '../sk_color'"),
        (row("class_01/subject1_r0", 1).replace("color", "colour"), "color should be there"),
        (row("class_01/subject1_r0", 1).replace("depth", "color", 1), "color is given twice"),
        (row("../../etc/subject1_r0", 1), "is not one below the raw folder"),
        (row("class_01/subject1_r0", 1).replace("./", "/"), "is not one below the raw folder"),
        (row("class_01/someone", 1), "does not end with subject<number>_r<number>"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("nvgesture").listing(raw_of(tmp_path, train=TRAIN + line))
    assert "nvgesture_train_correct_cvpr2016_v2.lst:4: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("options", [{"version": "v3"}, {"flow": "stored"}, {"least": 0}, {"size": 0}])
def test_a_wrong_option_names_what_would_do(tmp_path, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"option {name} is .*give"):
        recipe("nvgesture").listing(raw_of(tmp_path), **options)
