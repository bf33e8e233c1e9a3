import pytest

from counterpoise.contracts import ConfigError, DataError

from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

TRAIN = (
    "Church bell&-UhOCu3LN_M&good&0&10\n"
    "Church bell&VWi2ENBuTbw&good&0&0\n"
    "Race car, auto racing&MH3m4AwEcRY&good&6&8\n"
    "Truck&MH3m4AwEcRY&good&0&3\n"
    "Frying (food)&2An2JMGMbbs&good&2&7\n"
)
VALID = "Mandolin&WM5R44UMLq0&good&0&10\n"
TEST = "Cat&5wHd0VafUAA&good&0&10\nFrying (food)&2An2JMGMbbs&good&2&7\n"


def raw_of(folder, train=TRAIN, valid=VALID, test=TEST):
    return make_raw(folder, {"trainSet.txt": train, "valSet.txt": valid, "testSet.txt": test})


def test_rows_are_events_from_their_start_to_their_end(tmp_path):
    listing = recipe("ave").listing(raw_of(tmp_path))
    check_sound(listing, card("ave"))
    assert by_split(listing) == {
        "train": ["-UhOCu3LN_M", "MH3m4AwEcRY", "2An2JMGMbbs"],
        "valid": ["WM5R44UMLq0"],
        "test": ["5wHd0VafUAA", "2An2JMGMbbs"],
    }
    event = listing.rows[1]
    assert event.label == "Race car, auto racing"
    assert event.columns == {"video_id": "MH3m4AwEcRY", "start_s": 6, "end_s": 8}
    sound, frames = event.media["audio"], event.media["frames"]
    assert sound.path == frames.path == "AVE/MH3m4AwEcRY.mp4"
    assert (sound.start_s, sound.seconds, sound.rate) == (6, 2, 22050)
    assert (frames.start_s, frames.seconds, frames.per_second) == (6, 2, 1)


def test_an_event_without_length_and_a_second_event_of_a_video_are_left_out(tmp_path):
    assert reasons(recipe("ave").listing(raw_of(tmp_path))) == {
        "VWi2ENBuTbw": ("train", "too short", "trainSet.txt:2: the event begins and ends at 0 s"),
        "MH3m4AwEcRY@train:4": (
            "train",
            "duplicate",
            "video MH3m4AwEcRY is taken as Race car, auto racing from trainSet.txt:3, not as Truck",
        ),
    }


def test_the_last_or_all_events_of_a_video_can_be_taken(tmp_path):
    raw = raw_of(tmp_path)
    last = recipe("ave").listing(raw, repeats="last")
    assert {r.sample_id: r.label for r in last.rows}["MH3m4AwEcRY"] == "Truck"
    assert "MH3m4AwEcRY@train:3" in reasons(last)
    everything = recipe("ave").listing(raw, repeats="all")
    check_sound(everything, card("ave"))
    labels = {r.sample_id: r.label for r in everything.rows}
    assert labels["MH3m4AwEcRY"] == "Race car, auto racing" and labels["MH3m4AwEcRY#2"] == "Truck"
    assert list(reasons(everything)) == ["VWi2ENBuTbw"]


def test_the_whole_clip_can_be_taken(tmp_path):
    listing = recipe("ave").listing(raw_of(tmp_path), span="clip")
    assert "VWi2ENBuTbw" in by_split(listing)["train"]
    assert {(r.media["audio"].start_s, r.media["audio"].seconds) for r in listing.rows} == {(0, 10)}
    assert {r.media["frames"].seconds for r in listing.rows} == {10}
    assert listing.rows[2].columns["start_s"] == 6


def test_a_video_in_train_and_test_is_named_and_can_leave_train(tmp_path):
    raw = raw_of(tmp_path)
    assert recipe("ave").listing(raw).notes == ["Values of video_id that are in train and in test: 1."]
    clean = recipe("ave").listing(raw, overlap="drop")
    assert reasons(clean)["2An2JMGMbbs"] == ("train", "in a later split too", "video_id 2An2JMGMbbs is in test")
    assert "2An2JMGMbbs" not in by_split(clean)["train"] and "2An2JMGMbbs" in by_split(clean)["test"]


def test_a_line_of_names_a_mark_and_windows_line_ends_change_nothing(tmp_path):
    plain = recipe("ave").listing(raw_of(tmp_path / "a"))
    marked = b"\xef\xbb\xbf" + f"Category&VideoID&Quality&StartTime&EndTime\n{TRAIN}".replace("\n", "\r\n").encode()
    assert recipe("ave").listing(raw_of(tmp_path / "b", train=marked)).rows == plain.rows


def test_the_card_has_the_classes_in_the_order_of_the_list_of_test(tmp_path):
    classes = card("ave").class_names
    assert len(classes) == 28
    assert classes[:3] == ("Church bell", "Male speech, man speaking", "Bark") and classes[-1] == "Mandolin"
    listing = recipe("ave").listing(raw_of(tmp_path))
    assert listing.expected == {"train": 3339, "valid": 402, "test": 402}
    # less one without length, 27 second events in train and one in valid
    assert {s: c.expected for s, c in card("ave").splits.items()} == {"train": 3339 - 28, "valid": 401, "test": 402}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Church bel&RUhOCu3LNXM&good&0&10", "unknown class 'Church bel', did you mean 'Church bell'"),
        ("Church bell&RUhOCu3LNXM&good&0", "4 fields between &; there should be 5"),
        ("Church bell,RUhOCu3LNXM,good,0,10", "1 fields between &"),
        ("Church bell&RUhOCu3LNX&good&0&10", "video id 'RUhOCu3LNX'; a YouTube id has 11"),
        ("Church bell&../../../etc&good&0&10", "video id '../../../etc'"),
        ("Church bell&/etc/passwd&good&0&10", "video id '/etc/passwd'"),
        ("Church bell&RUhOCu3LNXM&good&8&6", "the event is from 8 to 6"),
        ("Church bell&RUhOCu3LNXM&good&0&11", "the event is from 0 to 11"),
        ("Church bell&RUhOCu3LNXM&good&0.5&6", "the start is '0.5'"),
        ("Category&VideoID&Quality&StartTime&EndTime", "unknown class 'Category'"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("ave").listing(raw_of(tmp_path, train=f"{TRAIN}\n{line}\n"))
    assert "trainSet.txt:7: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "options", [{"span": "x"}, {"repeats": "none"}, {"overlap": "x"}, {"rate": 0}, {"per_second": 0.0}]
)
def test_a_wrong_option_names_what_would_do(tmp_path, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"option {name} is .*give"):
        recipe("ave").listing(raw_of(tmp_path), **options)
