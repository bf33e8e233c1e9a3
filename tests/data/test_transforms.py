import numpy as np
import pytest
from pydantic import ValidationError

from counterpoise.contracts import ConfigError
from counterpoise.data import card as cards
from counterpoise.data import options as ops
from counterpoise.data import transforms
from counterpoise.data.plan import generator

IMAGE = np.arange(3 * 6 * 5, dtype=np.uint8).reshape(3, 6, 5)
SOUND = np.random.default_rng(0).standard_normal((1, 8, 10)).astype(np.float32)
SERIES = np.random.default_rng(1).standard_normal((10, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "op"),
    [
        (IMAGE, ops.Flip(probability=1)),
        (IMAGE, ops.Shift(pixels=3)),
        (IMAGE, ops.Shift(pixels=50)),
        (np.stack([IMAGE, IMAGE]), ops.Shift(pixels=3)),
        (IMAGE, ops.ResizedCrop()),
        (np.stack([IMAGE, IMAGE]), ops.ResizedCrop(scale=(0.01, 0.1))),
        (IMAGE, ops.Noise(std=0.2)),
        (SOUND, ops.Noise()),
        (SOUND, ops.TimeShift(fraction=0.5)),
        (SERIES, ops.TimeShift(fraction=0.5)),
        (SOUND, ops.Mask(time=0.5, frequency=0.5)),
        (SERIES, ops.Dropout(probability=0.5)),
    ],
)
def test_ops_keep_shape_and_type_and_depend_on_the_generator_alone(array, op):
    function = transforms.OPS[op.name][0]
    before = array.copy()
    one, two = function(array, op, generator(1)), function(array, op, generator(1))
    assert one.shape == array.shape and one.dtype == array.dtype
    assert np.array_equal(one, two)
    assert np.array_equal(array, before)
    assert any(not np.array_equal(function(array, op, generator(i)), array) for i in range(20))


def test_a_shift_moves_in_zeros():
    class Fixed:
        def integers(self, *args):
            return np.array([1, -2])

    shifted = transforms.shift(IMAGE + np.uint8(1), ops.Shift(pixels=2), Fixed())
    assert np.array_equal(shifted[:, 1:, :-2], IMAGE[:, :-1, 2:] + 1)
    assert not shifted[:, 0].any() and not shifted[:, :, -2:].any()


def test_all_frames_are_changed_alike():
    frames = np.stack([IMAGE, IMAGE])
    for op in (ops.Shift(), ops.ResizedCrop(), ops.Flip()):
        changed = transforms.OPS[op.name][0](frames, op, generator(5))
        assert np.array_equal(changed[0], changed[1])


def test_samples_have_generators_of_their_own():
    arrays = {"audio": np.zeros((3, 1, 4, 4), np.float32), "other": np.zeros((3, 2), np.float32)}
    augment = {"audio": (ops.Noise(),)}
    one = transforms.augmented(arrays, augment, 0, 1, ["a", "b", "c"])
    two = transforms.augmented({k: v[:2] for k, v in arrays.items()}, augment, 0, 1, ["c", "a"])
    assert np.array_equal(one["audio"][2], two["audio"][0])
    assert not np.array_equal(one["audio"][0], one["audio"][1])
    assert not np.array_equal(one["audio"], transforms.augmented(arrays, augment, 0, 2, ["a", "b", "c"])["audio"])
    assert one["other"] is arrays["other"]


def test_options_take_names_or_mappings_and_refuse_the_rest():
    options = ops.DataOptions.model_validate({"augment": {"image": ["flip", {"name": "shift", "pixels": 1}]}})
    assert [op.name for op in options.augment["image"]] == ["flip", "shift"]
    with pytest.raises(ValidationError, match="flop"):
        ops.DataOptions.model_validate({"augment": {"image": ["flop"]}})
    with pytest.raises(ValidationError, match="shuffel_window"):
        ops.DataOptions.model_validate({"shuffel_window": 1})


def test_ops_are_held_to_the_kinds_they_are_for():
    text = cards.TextModality(kind="text", column="t")
    audio = cards.AudioModality(kind="audio", column="a")
    with pytest.raises(ConfigError, match="which is for image, frames; audio can take: noise, time_shift, mask"):
        transforms.check_augment({"audio": (ops.Flip(),)}, {"audio": audio})
    with pytest.raises(ConfigError, match="text can take: none"):
        transforms.check_augment({"text": (ops.Noise(),)}, {"text": text})
    with pytest.raises(ConfigError, match=r"data\.augment has 'adio', did you mean 'audio'"):
        transforms.check_augment({"adio": ()}, {"audio": audio})


def test_pixels_are_normalised_when_the_batch_is_made():
    image = cards.ImageModality(
        kind="image", column="i", preprocess=cards.ImagePreprocess(size=(1, 2), channels=1, mean=(0.5,), std=(0.5,))
    )
    batch = transforms.assemble({"i": np.array([[[[0, 255]]]], np.uint8)}, [2], [7], {"i": image})
    assert batch["i"].tolist() == [[[[-1.0, 1.0]]]]
    assert batch["label"].tolist() == [2] and batch["row"].tolist() == [7]
