import zlib

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


def test_a_resized_crop_is_the_bilinear_picture_of_the_part():
    class Fixed:
        def uniform(self, low, high):
            return {0.25: 0.25}.get(low, 0.0)  # a quarter of the area, as wide as it is high

        def integers(self, low, high):
            return 1

    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    cut = transforms.resized_crop(picture, ops.ResizedCrop(scale=(0.25, 1.0)), Fixed())
    at = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)  # centres of the new pixels in the part of 4 x 4
    near = np.minimum(at.astype(int), 2)
    weights = np.zeros((8, 4))
    weights[np.arange(8), near], weights[np.arange(8), near + 1] = 1 - (at - near), at - near
    exact = weights @ picture[..., 1:5, 1:5].astype(np.float64) @ weights.T
    assert np.abs(cut - exact).max() < 1
    mirrored = transforms.resized_crop(picture[..., ::-1], ops.ResizedCrop(scale=(0.25, 1.0)), Fixed())
    assert np.abs(mirrored - weights @ picture[..., 1:5, 6:2:-1].astype(np.float64) @ weights.T).max() < 1


@pytest.mark.parametrize(("size", "batch"), [((3, 5), 4), ((200, 301), 5), ((400, 500), 2)])
@pytest.mark.parametrize("each", [True, False], ids=["per channel", "one for all"])
def test_pixels_are_scaled_and_normalised(size, batch, each):
    mean, std = ((0.5, 0.25, 0.4), (0.2, 0.3, 0.5)) if each else ((0.5,), (0.2,))
    settings = cards.FramesPreprocess(size=size, channels=3, num_frames=2, mean=mean, std=std)
    modality = cards.FramesModality(kind="frames", column="f", preprocess=settings)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 2, 3, *size), dtype=np.uint8)
    found = transforms.to_tensor(pixels, modality)
    shape = (-1, 1, 1)
    exact = (pixels / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    assert found.shape == pixels.shape and found.is_contiguous() and str(found.dtype) == "torch.float32"
    assert np.abs(found.numpy() - exact).max() < 1e-6


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
    with pytest.raises(
        ConfigError, match="which is for image, frames; audio is audio, which can take: noise, time_shift, mask"
    ):
        transforms.check_augment({"audio": (ops.Flip(),)}, {"audio": audio})
    with pytest.raises(ConfigError, match="text is text, which can take: none"):
        transforms.check_augment({"text": (ops.Noise(),)}, {"text": text})
    with pytest.raises(ConfigError, match=r"data\.augment has 'adio', did you mean 'audio'"):
        transforms.check_augment({"adio": ()}, {"audio": audio})


def frames(name, channels=3, size=(6, 5)):
    settings = cards.FramesPreprocess(size=size, channels=channels, num_frames=2)
    return cards.FramesModality(kind="frames", column=name, preprocess=settings)


def test_a_modality_alone_has_the_numbers_it_always_had():
    frames = np.arange(2 * 3 * 6 * 5, dtype=np.uint8).reshape(1, 2, 3, 6, 5)
    wanted = (ops.ResizedCrop(), ops.Flip(), ops.Shift(pixels=1))
    out = transforms.augmented({"rgb": np.repeat(frames, 2, 0)}, {"rgb": wanted}, 3, 2, ["a", "b"])["rgb"]
    assert out[0, 0, 0, :3].tolist() == [[0, 4, 3, 2, 1], [0, 7, 6, 5, 4], [0, 10, 9, 8, 7]]
    assert out[1, 1, 2, :2].tolist() == [[0, 0, 0, 0, 0], [156, 157, 158, 159, 0]]
    assert zlib.crc32(out.tobytes()) == 3248057261


@pytest.mark.parametrize("op", [ops.Flip(), ops.Shift(pixels=2), ops.ResizedCrop()], ids=lambda op: op.name)
def test_streams_of_one_scene_are_changed_alike(op):
    rgb = np.random.default_rng(0).integers(0, 255, (8, 2, 3, 12, 10), dtype=np.uint8)
    arrays = {"rgb": rgb, "depth": rgb[:, :, :1].copy()}
    ids = [f"clip{i}" for i in range(8)]
    both = transforms.augmented(arrays, {"rgb+depth": (op,)}, 0, 1, ids)
    assert np.array_equal(both["depth"], both["rgb"][:, :, :1])
    assert any(not np.array_equal(both["rgb"][i], rgb[i]) for i in range(8))
    swapped = transforms.augmented(arrays, {"depth+rgb": (op,)}, 0, 1, ids)
    assert all(np.array_equal(both[n], swapped[n]) for n in both)
    apart = transforms.augmented(arrays, {"rgb": (op,), "depth": (op,)}, 0, 1, ids)
    assert not np.array_equal(apart["depth"], apart["rgb"][:, :, :1])


def test_streams_move_together_first_and_are_then_changed_each_for_itself():
    rgb = np.random.default_rng(0).integers(50, 200, (4, 2, 3, 12, 10), dtype=np.uint8)
    arrays, ids = {"rgb": rgb, "depth": rgb[:, :, :1].copy()}, list("abcd")
    augment = {"rgb": (ops.Noise(),), "rgb+depth": (ops.ResizedCrop(), ops.Flip())}
    both = transforms.augmented(arrays, augment, 0, 1, ids)
    moved = transforms.augmented(arrays, {"rgb+depth": augment["rgb+depth"]}, 0, 1, ids)
    assert np.array_equal(both["depth"], moved["depth"])
    noisy = transforms.augmented(moved, {"rgb": (ops.Noise(),)}, 0, 1, ids)
    assert np.array_equal(both["rgb"], noisy["rgb"]) and not np.array_equal(both["rgb"], moved["rgb"])


def test_a_mirrored_flow_moves_the_other_way():
    u = np.array([[128, 148, 100], [0, 1, 255]], np.uint8)
    v = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    mirrored = transforms.flip(np.stack([u, v]), ops.Flip(probability=1), generator(0))
    assert mirrored.dtype == np.uint8
    assert mirrored[0].tolist() == [[156, 108, 128], [1, 255, 255]]
    assert mirrored[1].tolist() == [[30, 20, 10], [60, 50, 40]]
    frames = np.random.default_rng(0).integers(1, 256, (3, 2, 4, 5), dtype=np.uint8)
    once = transforms.flip(frames, ops.Flip(probability=1), generator(0))
    assert not np.array_equal(once[:, 0], frames[:, 0, :, ::-1])
    assert np.array_equal(transforms.flip(once, ops.Flip(probability=1), generator(0)), frames)
    assert transforms.flip(frames, ops.Flip(probability=0), generator(0)) is frames


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (
            {"rgb+flw": ["flip"]},
            r"has 'rgb\+flw', with 'flw', did you mean 'flow'.*modalities: rgb, flow, depth, audio",
        ),
        ({"rgb+flow": ["flip"], "flow+depth": ["shift"]}, r"flow is in 'rgb\+flow' and in 'flow\+depth'"),
        ({"rgb+flow": ["flip"], "flow+rgb": ["flip"]}, r"flow is in 'rgb\+flow' and in 'flow\+rgb'"),
        ({"rgb+rgb": ["flip"]}, r"has 'rgb\+rgb', with rgb twice"),
        ({"rgb+": ["flip"]}, r"has 'rgb\+', with ''"),
        ({"rgb+flow": ["flip", "noise"]}, r"'noise', which changes each .* give 'noise' under rgb and under flow"),
        ({"rgb+audio": ["flip"]}, r"rgb\+audio has 'flip', which is for image, frames; audio is audio"),
        ({"rgb+depth": ["resized_crop"]}, r"need one size, not rgb 6 x 5, depth 12 x 10; change preprocess.size"),
    ],
)
def test_streams_that_do_not_move_together_are_refused(augment, message):
    modalities = {
        "rgb": frames("rgb"),
        "flow": frames("flow", 2),
        "depth": frames("depth", 1, (12, 10)),
        "audio": cards.AudioModality(kind="audio", column="a"),
    }
    augment = ops.DataOptions.model_validate({"augment": augment}).augment
    with pytest.raises(ConfigError, match=message):
        transforms.check_augment(augment, modalities)
    transforms.check_augment({"flow+rgb": (ops.Flip(),), "rgb": (ops.Noise(),)}, modalities)


def test_pixels_are_normalised_when_the_batch_is_made():
    image = cards.ImageModality(
        kind="image", column="i", preprocess=cards.ImagePreprocess(size=(1, 2), channels=1, mean=(0.5,), std=(0.5,))
    )
    batch = transforms.assemble({"i": np.array([[[[0, 255]]]], np.uint8)}, [2], [7], {"i": image})
    assert batch["i"].tolist() == [[[[-1.0, 1.0]]]]
    assert batch["label"].tolist() == [2] and batch["row"].tolist() == [7]
