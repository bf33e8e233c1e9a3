"""Augmentation of compact arrays, and the step from compact arrays to a Batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from counterpoise.contracts import LABEL, ROW, ConfigError
from counterpoise.data import options as ops
from counterpoise.data.card import AnyModality, ImagePreprocess
from counterpoise.data.plan import generator
from counterpoise.wording import did_you_mean

if TYPE_CHECKING:
    from counterpoise.contracts import Batch

Array = np.ndarray
FLOW_CHANNELS, NO_FLOW = 2, 128  # pictures of two channels are u and v of optical flow, with 128 for none


# What an op draws for a sample of some shape, from (shape, op, generator); applied below, or in device.py.


def _flip_draw(shape: Sequence[int], op: ops.Flip, rng: np.random.Generator) -> tuple[int, ...]:
    """(1 if it is mirrored,)"""
    return (int(rng.random() < op.probability),)


def _shift_draw(shape: Sequence[int], op: ops.Shift, rng: np.random.Generator) -> tuple[int, ...]:
    """(down, right)"""
    down, right = (int(v) for v in rng.integers(-op.pixels, op.pixels + 1, 2))
    height, width = shape[-2:]
    return max(-height, min(height, down)), max(-width, min(width, right))


def _crop_draw(shape: Sequence[int], op: ops.ResizedCrop, rng: np.random.Generator) -> tuple[int, ...]:
    """(top, left, height, width) of the part"""
    height, width = shape[-2:]
    area = height * width * rng.uniform(*op.scale)
    ratio = np.exp(rng.uniform(np.log(op.ratio[0]), np.log(op.ratio[1])))
    w = int(np.clip(round(np.sqrt(area * ratio)), 1, width))
    h = int(np.clip(round(np.sqrt(area / ratio)), 1, height))
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


def _time_shift_draw(shape: Sequence[int], op: ops.TimeShift, rng: np.random.Generator) -> tuple[int, ...]:
    """(columns,)"""
    most = int(op.fraction * shape[time_axis(shape)])
    return (int(rng.integers(-most, most + 1)),)


def _mask_draw(shape: Sequence[int], op: ops.Mask, rng: np.random.Generator) -> tuple[int, ...]:
    """(first column, columns, first bin, bins)"""
    drawn: list[int] = []
    for axis, fraction in ((-1, op.time), (-2, op.frequency)):
        length = int(rng.integers(0, int(fraction * shape[axis]) + 1))
        drawn += [int(rng.integers(0, shape[axis] - length + 1)), length]
    return tuple(drawn)


def time_axis(shape: Sequence[int]) -> int:
    """Of a spectrogram [1, F, T] or a series [T, C]."""
    return -1 if len(shape) == 3 else 0


DRAWS: dict[str, Callable[..., tuple[int, ...]]] = {
    "flip": _flip_draw,
    "shift": _shift_draw,
    "resized_crop": _crop_draw,
    "time_shift": _time_shift_draw,
    "mask": _mask_draw,
}


def flip(array: Array, op: ops.Flip, rng: np.random.Generator) -> Array:
    """Mirrored left and right with the op's probability. Two channels are optical flow: what moved right moves left."""
    (mirror,) = _flip_draw(array.shape, op, rng)
    if not mirror:
        return array
    mirrored = array[..., ::-1]
    if array.shape[-3] != FLOW_CHANNELS:
        return mirrored
    mirrored = mirrored.copy()
    u = mirrored[..., 0, :, :].astype(np.int16)
    mirrored[..., 0, :, :] = np.clip(2 * NO_FLOW - u, 0, 255)  # 0, which is -128 or less, becomes 255
    return mirrored


def shift(array: Array, op: ops.Shift, rng: np.random.Generator) -> Array:
    """Pixels moved by (down, right), zeros where nothing moved in."""
    height, width = array.shape[-2:]
    down, right = _shift_draw(array.shape, op, rng)
    result = np.zeros_like(array)
    result[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = array[
        ..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return result


def resized_crop(array: Array, op: ops.ResizedCrop, rng: np.random.Generator) -> Array:
    """A random part scaled to full size (bilinear); the same part of every frame."""
    import cv2

    height, width = array.shape[-2:]
    top, left, h, w = _crop_draw(array.shape, op, rng)
    part = np.ascontiguousarray(array[..., top : top + h, left : left + w]).reshape(-1, h, w)
    result = np.empty(array.shape, array.dtype)
    for plane, scaled in zip(part, result.reshape(-1, height, width), strict=True):
        # the same bits on every machine, and nearer to the exact values than Pillow, which rounds twice
        cv2.resize(plane, (width, height), scaled, interpolation=cv2.INTER_LINEAR_EXACT)
    return result


def noise(array: Array, op: ops.Noise, rng: np.random.Generator) -> Array:
    change = rng.standard_normal(array.shape, dtype=np.float32) * np.float32(op.std)
    if array.dtype == np.uint8:
        return np.clip(np.rint(array + 255 * change), 0, 255).astype(np.uint8)
    return array + change


def time_shift(array: Array, op: ops.TimeShift, rng: np.random.Generator) -> Array:
    (columns,) = _time_shift_draw(array.shape, op, rng)
    return np.roll(array, columns, axis=time_axis(array.shape))


def mask(array: Array, op: ops.Mask, rng: np.random.Generator) -> Array:
    column, columns, bin_, bins = _mask_draw(array.shape, op, rng)
    result = array.copy()
    result[..., column : column + columns] = result[..., bin_ : bin_ + bins, :] = array.min()
    return result


def dropout(array: Array, op: ops.Dropout, rng: np.random.Generator) -> Array:
    return np.where(rng.random(array.shape) < op.probability, np.float32(0), array)


# What each op is applied with, and the kinds of modality it makes sense for. All but the first three change each
# modality for itself: noise on one stream has nothing to do with noise on another.
OPS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "flip": (flip, ("image", "frames")),
    "shift": (shift, ("image", "frames")),
    "resized_crop": (resized_crop, ("image", "frames")),
    "noise": (noise, ("image", "frames", "audio", "vector", "series")),
    "time_shift": (time_shift, ("audio", "series")),
    "mask": (mask, ("audio",)),
    "dropout": (dropout, ("vector", "series")),
}
TOGETHER = ("flip", "shift", "resized_crop")


def check_augment(augment: Mapping[str, Sequence[Any]], modalities: Mapping[str, AnyModality]) -> None:
    """Raise if an op is asked of a modality that is not there or is of another kind, or of several that do not fit.

    Keys are names of modalities, or several joined by `+` that are changed alike.
    """
    group_of: dict[str, str] = {}
    for key, wanted in augment.items():
        names = key.split("+")
        for name in names:
            if name not in modalities:
                place = f"data.augment has '{key}', with '{name}'" if len(names) > 1 else f"data.augment has '{name}'"
                raise ConfigError(f"{place}{did_you_mean(name, modalities)}; modalities: {', '.join(modalities)}")
            kind = modalities[name].kind
            for op in wanted:
                if kind not in OPS[op.name][1]:
                    possible = [n for n, (_, kinds) in OPS.items() if kind in kinds]
                    raise ConfigError(
                        f"data.augment.{key} has '{op.name}', which is for {', '.join(OPS[op.name][1])}; "
                        f"{name} is {kind}, which can take: {', '.join(possible) or 'none'}"
                    )
        if len(names) > 1:
            _check_together(key, names, wanted, modalities, group_of)


def _check_together(
    key: str,
    names: Sequence[str],
    wanted: Sequence[Any],
    modalities: Mapping[str, AnyModality],
    group_of: dict[str, str],
) -> None:
    for name in names:
        before = group_of.setdefault(name, key)
        if before != key or names.count(name) > 1:
            raise ConfigError(
                f"data.augment: {name} is in '{before}' and in '{key}'; a modality moves together with one group"
                if before != key
                else f"data.augment has '{key}', with {name} twice"
            )
    for op in wanted:
        if op.name not in TOGETHER:
            raise ConfigError(
                f"data.augment.{key} has '{op.name}', which changes each modality for itself; several together can "
                f"take: {', '.join(TOGETHER)}; give '{op.name}' under {' and under '.join(names)}"
            )
    if wanted:
        sizes = {name: modalities[name].preprocess.size for name in names}  # type: ignore[union-attr]
        if len(set(sizes.values())) > 1:
            said = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
            raise ConfigError(
                f"data.augment.{key}: pictures that are cut alike need one size, not {said}; change preprocess.size of "
                "the card"
            )


def augmented(
    arrays: dict[str, Array],
    augment: Mapping[str, Sequence[Any]],
    seed: int,
    epoch: int,
    sample_ids: Sequence[str],
) -> dict[str, Array]:
    """Compact arrays [B, ...] with every sample changed by a generator of (seed, epoch, sample id, modality).

    Modalities with a common key draw the same numbers, in whatever order it names them. They are changed together
    first, and then by what is asked of each alone. Those that are not in `arrays` are changed elsewhere.
    """
    result = dict(arrays)
    for key, wanted in in_order(augment):
        for name in (n for n in key.split("+") if wanted and n in result):
            changed = np.empty_like(result[name])
            for i, sample_id in enumerate(sample_ids):
                rng = op_generator(seed, epoch, sample_id, key)
                sample = result[name][i]
                for op in wanted:
                    sample = OPS[op.name][0](sample, op, rng)
                changed[i] = sample
            result[name] = changed
    return result


def in_order(augment: Mapping[str, Sequence[Any]]) -> list[tuple[str, Sequence[Any]]]:
    """What is done to several modalities together comes first."""
    return sorted(augment.items(), key=lambda item: "+" not in item[0])


def op_generator(seed: int, epoch: int, sample_id: str, key: str) -> np.random.Generator:
    """Of the ops that the modalities of a key share, for one sample."""
    return generator("augment", seed, epoch, sample_id, "+".join(sorted(key.split("+"))))


def to_tensor(array: Array, modality: AnyModality) -> Any:
    """A tensor [B, ...] of compact arrays [B, ...]: pixels scaled and normalised, tokens as int64."""
    import torch

    if modality.kind == "text":
        return torch.from_numpy(array.astype(np.int64))
    if modality.kind in ("image", "frames"):
        return torch.from_numpy(_normalised(array, modality.preprocess))
    return torch.from_numpy(np.ascontiguousarray(array))


_TABLED = 2**17  # pixels that are looked up at once: OpenCV would share twice as many among threads of its own


def _normalised(array: Array, settings: ImagePreprocess) -> Array:
    """(pixels / 255 - mean) / std, float32, of uint8 [..., C, H, W]: looked up, as a channel has but 256 values."""
    import cv2

    mean, std = np.array(settings.mean, np.float32)[:, None], np.array(settings.std, np.float32)[:, None]
    values = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std
    channels, height, width = array.shape[-3:]
    tables = np.broadcast_to(values, (channels, 256))
    planes = np.ascontiguousarray(array).reshape(-1, channels, height * width)
    result = np.empty(array.shape, np.float32)
    out = result.reshape(planes.shape)
    step = max(1, _TABLED // (height * width))
    for start in range(0, len(planes), step):
        for channel in range(channels):
            part = np.s_[start : start + step, channel]
            cv2.LUT(planes[part], tables[channel], out[part])
    return result


def assemble(arrays: Mapping[str, Array], labels: Array, rows: Array, modalities: Mapping[str, AnyModality]) -> Batch:
    """The Batch of compact arrays [B, ...], labels [B] and row numbers [B]."""
    import torch

    batch = {name: to_tensor(arrays[name], modality) for name, modality in modalities.items()}
    batch[LABEL] = torch.from_numpy(np.array(labels, dtype=np.int64))
    batch[ROW] = torch.from_numpy(np.array(rows, dtype=np.int64))
    return batch
