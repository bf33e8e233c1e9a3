import json

import pytest

from counterpoise.contracts import ConfigError, DataError
from counterpoise.data.card import Card

from .raw_lists import by_split, card, check_sound, make_raw, reasons, recipe

TRAIN = "".join(
    f"{line}\r\n"
    for line in (
        "['910308516510011393', 'most # funny quotes <url> …', 1]",
        "['840006160660983809', '<user> thanks for showing up', 1]",
        """['854334602516733952', "you 'll get it \\n . \u2028 won 't you ?", 0]""",
        "['854334602516733953', 'so much irony', 0]",
        "['854334602516733954', 'ironical , no cue', 0]",
    )
)
VALID = "['915657464401580032', 'whew ...', 1, 0]\r\n['915657464401580033', 'oh', 0, 0]\r\n"
TEST = "['862902619928506372', 'i am guessing', 0, 1]\r\n"


def raw_of(folder, train=TRAIN, valid=VALID, test=TEST):
    return make_raw(folder, {"text/train.txt": train, "text/valid2.txt": valid, "text/test2.txt": test})


def test_rows_with_a_cue_are_left_out_and_the_rest_is_listed(tmp_path):
    listing = recipe("sarcasm").listing(raw_of(tmp_path))
    check_sound(listing, card("sarcasm"))
    assert by_split(listing) == {
        "train": ["840006160660983809", "854334602516733952", "854334602516733954"],
        "valid": ["915657464401580032", "915657464401580033"],
        "test": ["862902619928506372"],
    }
    assert reasons(listing) == {
        "910308516510011393": ("train", "word that gives the label away", "<url>"),
        "854334602516733953": ("train", "word that gives the label away", "irony"),
    }
    assert listing.rows[1].columns == {"text": "you 'll get it \n . \u2028 won 't you ?"}
    assert listing.rows[0].media["image"].paths == ("images/840006160660983809.jpg",)


def test_cues_can_be_kept(tmp_path):
    listing = recipe("sarcasm").listing(raw_of(tmp_path), cues="keep")
    assert not listing.left
    assert len(by_split(listing)["train"]) == 5


def test_the_label_of_people_counts_unless_the_hashtag_is_asked_for(tmp_path):
    raw = raw_of(tmp_path)
    human = {r.sample_id: r.label for r in recipe("sarcasm").listing(raw).rows}
    hashtag = {r.sample_id: r.label for r in recipe("sarcasm").listing(raw, labels="hashtag").rows}
    assert (human["915657464401580032"], hashtag["915657464401580032"]) == ("not_sarcastic", "sarcastic")
    assert (human["862902619928506372"], hashtag["862902619928506372"]) == ("sarcastic", "not_sarcastic")
    assert human["840006160660983809"] == hashtag["840006160660983809"] == "sarcastic"
    assert card("sarcasm").class_names == ("not_sarcastic", "sarcastic")


def test_json_lists_are_those_of_mmsd2_and_are_not_filtered(tmp_path):
    entries = [
        {"image_id": 840006160660983809, "text": "thanks", "label": 1},
        {"image_id": "840006160660983810", "text": "what a joke", "label": 0},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    listing = recipe("sarcasm").listing(raw_of(tmp_path), train="train.json")
    check_sound(listing, card("sarcasm"))
    assert by_split(listing)["train"] == ["840006160660983809", "840006160660983810"]
    assert [r.label for r in listing.rows[:2]] == ["sarcastic", "not_sarcastic"]
    assert listing.expected == {"train": 19816, "valid": 2410, "test": 2409}


def test_the_card_expects_what_the_filter_leaves_of_the_published_rows(tmp_path):
    assert recipe("sarcasm").listing(raw_of(tmp_path)).expected == {"train": 29040, "valid": 2410, "test": 2409}
    assert card("sarcasm").splits["train"].expected == 29040 - 9224


def test_a_tweet_that_comes_again_is_a_duplicate_of_the_first(tmp_path):
    again = "['840006160660983809', 'other text', 0]\r\n"
    listing = recipe("sarcasm").listing(raw_of(tmp_path, train=TRAIN + again, test=TEST + again))
    check_sound(listing, card("sarcasm"))
    assert [(left.split, left.reason) for left in listing.left[-2:]] == [("train", "duplicate"), ("test", "duplicate")]
    assert all("tweet 840006160660983809 is that of text/train.txt:2" in left.detail for left in listing.left[-2:])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("['1', 'text', 2]", "unknown class 2"),
        ("['1', 'text', True]", "unknown class True"),
        ("['1', 'text']", "there should be a tweet id, a text, and one label or two"),
        ("['1', 'text', 0, 1, 1]", "there should be"),
        ("('1', 'text', 0)", "there should be"),
        ("[1, 'text', 0]", "there should be"),
        ("['../1', 'text', 0]", "tweet id '../1'; it should be digits"),
        ("['/etc/passwd', 'text', 0]", "it should be digits"),
        ("['1e17', 'text', 0]", "it should be digits"),
        ("__import__('os').getpid()", "not a literal list"),
        ("['1', 'text', 0", "not a literal list"),
        ("[" * 5000, "not a literal list"),
        ("['1', '" + "x" * 100_000 + "', 0]", "at most 100000 are read"),
    ],
)
def test_a_wrong_line_is_named_with_file_and_number(tmp_path, line, reason):
    with pytest.raises(DataError) as error:
        recipe("sarcasm").listing(raw_of(tmp_path, train=TRAIN + line + "\r\n"))
    assert "text/train.txt:6: " in str(error.value)
    assert reason in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"image_id": 1, "text": "x", "label": 1}, {"image_id": 8.4e17, "text": "x", "label": 1}]', "train.json:2: "),
        ('[{"image_id": 1, "text": "x"}]', "an entry has image_id, text and label"),
        ('[{"image_id": 1, "text": 5, "label": 1}]', "text should be a string"),
        ("{}", "there should be a list"),
        ("<!DOCTYPE html>", "not readable as JSON"),
    ],
)
def test_a_wrong_json_list_is_named(tmp_path, text, reason):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError) as error:
        recipe("sarcasm").listing(raw_of(tmp_path), train="train.json")
    assert "train.json" in str(error.value) and reason in str(error.value)


def test_a_wrong_option_names_what_would_do(tmp_path):
    with pytest.raises(ConfigError, match="option labels is 'people'; give human or hashtag"):
        recipe("sarcasm").listing(raw_of(tmp_path), labels="people")
    with pytest.raises(ConfigError, match="option cues is 'dropp', did you mean 'drop'"):
        recipe("sarcasm").listing(raw_of(tmp_path), cues="dropp")


def test_a_tokenizer_can_be_chosen_for_the_card():
    module, content = recipe("sarcasm"), card("sarcasm").model_dump(mode="json", exclude_unset=True)
    assert module.adapt_card(content, tokenizer="", size=256) == content
    text = Card.model_validate(module.adapt_card(content, tokenizer="/models/bert", size=256)).modalities["text"]
    assert (text.pair, text.preprocess.tokenizer, text.preprocess.max_length) == (None, "/models/bert", 128)
