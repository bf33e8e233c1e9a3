import numpy as np
import pytest

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.card import Card, load_card
from counterpoise.data.loader import LocalData
from counterpoise.data.recipes import prepare

from .media_files import write_picture
from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

FOLDER = {"twitter15": "absa_data/twitter2015", "twitter17": "absa_data/twitter"}
HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"
TEST_HEADER = "index\t#1 ImageID\t#2 String\t#2 String\n"  # one name too few, as published
TRAIN = HEADER + (
    '1\t2\t11.jpg\t$T$ said "hi and left\tAnn Lee\n'
    '2\t0\t11.jpg\tAnn Lee said "hi and $T$\tleft\n'
    "3\t1\t17_06_12.jpg\tone\u2028line of $T$ \x85 only\tBob\n"
    "4\t1\t17_06_12.jpg\tone\u2028line of $T$ \x85 only\tBob\n"
    "5\t1\t14.jpg\tat $T$ again\tthe sea\n"
)
VALID = HEADER + "1\t1\t13.jpg\tat $T$\tthe sea\n"
TEST = TEST_HEADER + "1\t1\t14.jpg\tat $T$\tthe lake\n2\t2\t15.jpg\t$T$ wins\tC . D .\n"


@pytest.fixture(params=["twitter15", "twitter17"])
def name(request):
    return request.param


def raw_of(folder, name, train=TRAIN, valid=VALID, test=TEST):
    return make_raw(
        folder, {f"{FOLDER[name]}/{f}.tsv": t for f, t in (("train", train), ("dev", valid), ("test", test))}
    )


def test_fields_are_taken_by_place_whatever_the_header_says(tmp_path, name):
    listing = recipe(name).listing(raw_of(tmp_path, name))
    check_sound(listing, card(name))
    assert by_split(listing) == {
        "train": [f"train-{i}" for i in range(1, 6)],
        "valid": ["valid-1"],
        "test": ["test-1", "test-2"],
    }
    assert [r.label for r in listing.rows] == [
        "positive", "negative", "neutral", "neutral", "neutral", "neutral", "neutral", "positive",
    ]  # fmt: skip
    last = listing.rows[-1]
    assert last.columns == {"text": "$T$ wins", "target": "C . D .", "image_id": "15.jpg"}
    assert last.media["image"].one
    year = name.removeprefix("twitter")
    assert last.media["image"].paths == (f"twitter20{year}_images/15.jpg",)


def test_the_card_has_the_labels_in_the_order_of_the_lists(name):
    assert card(name).class_names == ("negative", "neutral", "positive")


def test_quotation_marks_and_line_separators_of_unicode_stay_in_the_text(tmp_path, name):
    rows = recipe(name).listing(raw_of(tmp_path, name)).rows
    assert rows[0].columns["text"] == '$T$ said "hi and left'
    assert rows[2].columns["text"] == "one\u2028line of $T$ \x85 only"


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, name):
    plain = recipe(name).listing(raw_of(tmp_path / "a", name))
    marked = raw_of(tmp_path / "b", name, train=b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n").encode())
    assert recipe(name).listing(marked).rows == plain.rows


def test_lists_and_pictures_may_lie_elsewhere(tmp_path, name):
    for file, text in (("a.tsv", TRAIN), ("b.tsv", VALID), ("c.tsv", TEST)):
        (tmp_path / file).write_text(text)
    raw = make_raw(tmp_path / "raw", {})
    places = {"train": str(tmp_path / "a.tsv"), "valid": str(tmp_path / "b.tsv"), "test": str(tmp_path / "c.tsv")}
    listing = recipe(name).listing(raw, **places, images="pictures", size=0)
    assert len(listing.rows) == 8
    assert listing.rows[0].media["image"].paths == ("pictures/11.jpg",)
    assert listing.rows[0].media["image"].size is None


def test_the_target_can_be_put_into_the_text(tmp_path, name):
    listing = recipe(name).listing(raw_of(tmp_path, name), text="filled")
    assert listing.rows[0].columns["text"] == 'Ann Lee said "hi and left'


def test_repeated_rows_are_kept_and_named_or_left_out(tmp_path, name):
    raw = raw_of(tmp_path, name)
    kept = recipe(name).listing(raw)
    assert not kept.left
    assert any("repeat another one: 1, kept" in note for note in kept.notes)
    dropped = recipe(name).listing(raw, repeats="drop")
    assert reasons(dropped) == {"train-4": ("train", "duplicate", "the same as train-3")}
    assert len(dropped.rows) == len(kept.rows) - 1


def test_a_picture_in_train_and_test_is_named_and_can_leave_train(tmp_path, name):
    raw = raw_of(tmp_path, name)
    assert "Values of image_id that are in train and in test: 1." in recipe(name).listing(raw).notes
    clean = recipe(name).listing(raw, overlap="drop")
    assert reasons(clean) == {"train-5": ("train", "in a later split too", "image_id 14.jpg is in test")}
    assert "train-5" not in by_split(clean)["train"]


def test_the_published_number_of_rows_is_expected(tmp_path, name):
    expected = recipe(name).listing(raw_of(tmp_path, name)).expected
    assert expected == {s: part.expected for s, part in card(name).splits.items()}
    assert expected["train"] == {"twitter15": 3179, "twitter17": 3562}[name]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7\t3\t11.jpg\t$T$ x\ty", "unknown class '3'"),
        ("7\t-1\t11.jpg\t$T$ x\ty", "unknown class '-1'"),
        ("7\t1\t11.jpg\t$T$ x", "4 fields between tabs; there should be 5"),
        ("7\t1\t11.jpg\t$T$ x\ty\tz", "6 fields"),
        ("x\t1\t11.jpg\t$T$ x\ty", "row number is 'x'"),
        ("5\t1\t11.jpg\t$T$ x\ty", "row number 5 is that of"),
        ("7\t1\t11.jpg\tno mark\ty", "has no $T$"),
        ("7\t1\t11.jpg\t$T$ x\t ", "target is empty"),
        ("7\t1\t/etc/passwd\t$T$ x\ty", "'/etc/passwd' is not one below the raw folder"),
        ("7\t1\t../../etc/passwd\t$T$ x\ty", "is not one below the raw folder"),
        ("7\t1\ta\\b.jpg\t$T$ x\ty", "is not one below the raw folder"),
        ("7\t1\t \t$T$ x\ty", "is not one below the raw folder"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, name, line, reason):
    raw = raw_of(tmp_path, name, train=TRAIN + line + "\n")
    with pytest.raises(DataError) as error:
        recipe(name).listing(raw)
    assert f"{FOLDER[name]}/train.tsv:7: " in str(error.value)
    assert reason in str(error.value)


def test_a_list_that_is_empty_or_absent_is_an_error(tmp_path, name):
    with pytest.raises(DataError, match=r"dev\.tsv is empty"):
        recipe(name).listing(raw_of(tmp_path, name, valid="\n\r\n"))
    with pytest.raises(DataError, match=r"nowhere\.tsv"):
        recipe(name).listing(raw_of(tmp_path, name), test="nowhere.tsv")


def test_a_tokenizer_and_the_target_as_second_text_can_be_chosen_for_the_card(name, tmp_path):
    module, content = recipe(name), card(name).model_dump(mode="json", exclude_unset=True)
    assert module.adapt_card(content, tokenizer="", pair="none", size=256) == content
    made = module.adapt_card(content, tokenizer="s3://b/bert", pair="target", size=256)
    text = Card.model_validate(made).modalities["text"]
    assert (text.pair, text.preprocess.tokenizer, text.preprocess.max_length) == ("target", "s3://b/bert", 128)
    assert made["modalities"]["image"] == content["modalities"]["image"]
    single = module.adapt_card(content, tokenizer="google-bert/bert-base-uncased", pair="none", size=256)
    assert Card.model_validate(single).modalities["text"].pair is None
    assert "words-v1" in content["protocols"] and list(single["protocols"]) == ["aug-v1"] and not made["protocols"]
    assert content["modalities"]["text"]["preprocess"]["vocabulary"] == 30522, "the recipe's own card stays"
    with pytest.raises(ConfigError, match="option pair is 'target', which needs a tokenizer"):
        module.adapt_card(content, tokenizer="", pair="target", size=256)
    with pytest.raises(ConfigError, match=r"option tokenizer is '\./bert'; give the whole path"):
        module.adapt_card(content, tokenizer="./bert", pair="none", size=256)


def test_a_prepared_corpus_gives_the_tokenizer_sentence_and_target(name, tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "$", "t", "wins", "ann", "lee", "c"]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (bert / "config.json").write_text('{"model_type": "bert"}')
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    pixels = np.zeros((8, 8, 3), np.uint8)
    texts = {
        "train": "1\t2\t1.jpg\t$T$ wins\tAnn Lee\n",
        "dev": "1\t0\t2.jpg\t$T$\tC\n",
        "test": "1\t1\t3.jpg\t$T$\tC\n",
    }
    for split, line in texts.items():
        place = tmp_path / "raw" / FOLDER[name] / f"{split}.tsv"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(HEADER + line)
        write_picture(tmp_path / f"raw/twitter20{name[-2:]}_images/{line.split(chr(9))[2]}", pixels)
    options = {"tokenizer": str(bert), "pair": "target"}
    out = prepare(name, str(tmp_path / "out"), raw=str(tmp_path / "raw"), **options)
    data = LocalData(load_card(out), ["text"], batch_size=1)
    ids = next(data.train_batches(1))["text"][0].tolist()
    assert [pieces[i] for i in ids[:9]] == ["[CLS]", "$", "t", "$", "wins", "[SEP]", "ann", "lee", "[SEP]"]
    assert len(ids) == 128 and not any(ids[9:])
    assert data.inputs["text"].vocabulary == len(pieces)


@pytest.mark.parametrize("option", ["text", "repeats", "overlap", "pair"])
def test_a_wrong_option_names_what_would_do(tmp_path, name, option):
    with pytest.raises(ConfigError, match=f"option {option} is 'droq'.*give"):
        recipe(name).listing(raw_of(tmp_path, name), **{option: "droq"})
