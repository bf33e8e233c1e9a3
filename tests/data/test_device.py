"""Transforms made on the device that trains give what the threads that decode make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import settings

from counterpoise.config import resolve
from counterpoise.contracts import InputSpec
from counterpoise.data import options as ops
from counterpoise.data.card import AudioModality, AudioPreprocess, FramesModality, ImageModality, ImagePreprocess
from counterpoise.data.decode import spectrogram
from counterpoise.data.device import DRAWN, DeviceTransforms, log_spectrograms
from counterpoise.data.loader import LocalData
from counterpoise.data.options import DataOptions
from counterpoise.data.transforms import assemble, augmented

RNG = np.random.default_rng(3)
PICTURE = ImageModality(
    kind="image", column="p", preprocess=ImagePreprocess(size=(20, 14), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
)
FLOW = FramesModality(
    kind="frames",
    column="f",
    preprocess={"size": (20, 14), "num_frames": 3, "channels": 2, "mean": [0.5, 0.5], "std": [0.2, 0.2]},
)
SOUND = AudioModality(
    kind="audio", column="s", preprocess=AudioPreprocess(sample_rate=4000, seconds=0.5, n_fft=64, hop_length=20)
)
MODALITIES: dict[str, Any] = {"picture": PICTURE, "flow": FLOW, "sound": SOUND}
INPUTS = {
    "picture": InputSpec("image", (3, 20, 14)),
    "flow": InputSpec("frames", (3, 2, 20, 14)),
    "sound": InputSpec("audio", (1, 33, 101)),
}


def close_spectra(found: np.ndarray, wanted: np.ndarray) -> None:
    """Logarithms of float32: of a bin that is nearly empty, rounding is more."""
    difference = np.abs(found - wanted)
    assert difference.max() < 0.02 and difference.mean() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [{}, {"mel": 12}, {"standardize": True}, {"mean": -3.0, "std": 2.5}, {"n_fft": 63, "hop_length": 17},
     {"spectrum": "density", "hop_length": 30, "log_floor": 1e-9}, {"spectrum": "density", "n_fft": 63}],
)  # fmt: skip
def test_spectrograms_of_a_batch_are_those_of_each(changes: dict[str, Any]) -> None:
    preprocess = AudioPreprocess(**{"sample_rate": 4000, "seconds": 0.5, "n_fft": 64, "hop_length": 20, **changes})
    waves = (0.3 * RNG.standard_normal((4, preprocess.num_samples))).astype(np.float32)
    waves[2] = 0  # silence
    found = log_spectrograms(torch.from_numpy(waves), preprocess).numpy()
    wanted = np.stack([spectrogram(wave, preprocess) for wave in waves])
    assert found.shape == wanted.shape == (4, *preprocess.shape)
    close_spectra(found, wanted)


def both_ways(augment: dict[str, Any], epoch: int = 2) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch by the CPU, and by the device from compact arrays."""
    count = 12
    compact = {
        "picture": RNG.integers(0, 256, (count, 3, 20, 14), dtype=np.uint8),
        "flow": RNG.integers(0, 256, (count, 3, 2, 20, 14), dtype=np.uint8),
        "sound": (0.3 * RNG.standard_normal((count, 2000))).astype(np.float32),
    }
    options = DataOptions.model_validate({"augment": augment})
    ids, labels = [f"clip{i}" for i in range(count)], np.arange(count)
    spectra = np.stack([spectrogram(wave, SOUND.preprocess) for wave in compact["sound"]])
    arrays = augmented({**compact, "sound": spectra}, options.augment, 7, epoch, ids)
    transforms = DeviceTransforms(MODALITIES, INPUTS, options.augment, 7)
    assert set(transforms.names) == set(MODALITIES) and transforms.waves == {"sound"}
    rest, ready = transforms.packed(compact, epoch, ids)
    assert rest == {}
    return assemble(arrays, labels, labels, MODALITIES), transforms(ready)


@pytest.mark.parametrize(
    "augment",
    [
        {},
        {"picture": ["flip"], "flow": ["flip"]},
        {"picture": [{"name": "shift", "pixels": 5}], "flow": [{"name": "shift", "pixels": 30}]},
        {"picture+flow": ["flip", {"name": "shift", "pixels": 3}], "picture": ["flip"]},
        {"sound": [{"name": "time_shift", "fraction": 0.5}]},
        {"sound": [{"name": "mask", "time": 0.6, "frequency": 0.5}, "time_shift"]},
    ],
)
def test_changes_are_the_same_to_the_bit_where_nothing_is_rounded(augment: dict[str, Any]) -> None:
    wanted, found = both_ways(augment)
    for name in ("picture", "flow"):
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-6)
    close_spectra(found["sound"].numpy(), wanted["sound"].numpy())
    assert not any(name.startswith(DRAWN) for name in found)


def test_crops_differ_by_one_of_255_at_most() -> None:
    wanted, found = both_ways(
        {"picture": [{"name": "resized_crop", "scale": [0.05, 1.0]}, "flip"], "flow": ["resized_crop"]}
    )
    for name, std in (("picture", torch.tensor([0.2, 0.3, 0.4])), ("flow", torch.tensor([0.2, 0.2]))):
        levels = (found[name] - wanted[name]).abs() * std.view(-1, 1, 1) * 255
        assert levels.max() < 1.01 and (levels > 0.5).float().mean() < 0.1, "OpenCV's weights have 8 bits"


def test_what_draws_a_number_per_pixel_stays_with_the_cpu() -> None:
    augment = DataOptions.model_validate({"augment": {"picture": ["flip", "noise"], "sound": ["noise"]}}).augment
    transforms = DeviceTransforms(MODALITIES, INPUTS, augment, 0)
    assert transforms.names == ("flow",) and not transforms.waves


def test_an_epoch_is_the_same_where_ever_it_is_transformed(corpus_with_media: str) -> None:
    def epochs(**more: Any) -> list[dict[str, torch.Tensor]]:
        augment = {"image": ["flip", {"name": "shift", "pixels": 2}], "sound": ["mask"]}
        content = settings(corpus_with_media, data={"augment": augment, **more})
        experiment = resolve(content)[0]
        data = LocalData(experiment.corpus, batch_size=16, options=experiment.data)
        found = [data.finish(b) for b in data.train_batches(3)] + [data.finish(b) for b in data.batches("test")]
        data.close()
        return found

    for cache in ("on", "off"):
        for one, two in zip(epochs(cache=cache), epochs(cache=cache, transforms="device"), strict=True):
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(
                    two[name], one[name], atol=2e-3, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
                )


def test_transforms_of_the_device_are_part_of_the_digest_once_they_are_asked_for(corpus: str) -> None:
    plain, said = resolve(settings(corpus))[0], resolve(settings(corpus), ["data.transforms=cpu"])[0]
    assert plain.digest == said.digest and "transforms" not in plain.to_json()["data"]
    assert resolve(settings(corpus), ["data.transforms=device"])[0].digest != plain.digest
    assert ops.DataOptions().transforms == "cpu"
