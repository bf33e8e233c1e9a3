from counterpoise.wording import flatten, pretty_json


def test_a_tree_is_flattened_to_dotted_keys_with_its_empty_branches() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}})) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_json_for_people_keeps_letters_and_ends_with_a_line() -> None:
    assert pretty_json({"a": "±"}) == '{\n  "a": "±"\n}\n'.encode()
