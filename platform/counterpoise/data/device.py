"""What is done to a batch on the device that trains, where `data.transforms: device` asks for it.

Decoding threads leave compact arrays: waveforms, bytes of pixels, and what augmentation drew for each sample, from the
same generators as on the CPU. Spectrograms, flips, crops and normalisation are made here for whole batches at once. The
results equal those of `decode` and `transforms` up to rounding; crops up to 1 of 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoise.contracts import Batch, InputSpec
from counterpoise.data.card import AnyModality, AudioModality, AudioPreprocess, ImagePreprocess
from counterpoise.data.decode import mel_filters
from counterpoise.data.transforms import DRAWS, FLOW_CHANNELS, NO_FLOW, augmented, in_order, op_generator, time_axis

DRAWN = "drawn/"  # before a modality's name: what its ops drew [B, numbers]


class DeviceTransforms:
    """One corpus' transforms. A modality with an op that draws a number per pixel stays with the CPU."""

    def __init__(
        self,
        modalities: Mapping[str, AnyModality],
        inputs: Mapping[str, InputSpec],
        augment: Mapping[str, Sequence[Any]],
        seed: int,
    ) -> None:
        self.modalities, self.inputs, self.seed = dict(modalities), dict(inputs), seed
        self.augment = {key: tuple(wanted) for key, wanted in in_order(augment) if wanted}
        undrawable = {
            name
            for key, wanted in self.augment.items()
            for name in key.split("+")
            if any(op.name not in DRAWS for op in wanted)
        }
        self.names = tuple(
            n for n, m in modalities.items() if m.kind in ("audio", "image", "frames") and n not in undrawable
        )
        self.waves = frozenset(n for n in self.names if modalities[n].kind == "audio")

    def _ops(self, name: str) -> list[tuple[str, Any]]:
        """(key of its generator, op) of a modality, in order."""
        return [(key, op) for key, wanted in self.augment.items() if name in key.split("+") for op in wanted]

    def packed(
        self, arrays: Mapping[str, np.ndarray], epoch: int | None, sample_ids: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], Batch]:
        """(arrays of modalities that stay with the CPU, tensors for the device). epoch: None without augmentation."""
        rest = {name: array for name, array in arrays.items() if name not in self.names}
        if epoch is not None:
            rest = augmented(rest, self.augment, self.seed, epoch, sample_ids)
        ready: Batch = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in self.names}
        for name in self.names if epoch is not None else ():
            if ops := self._ops(name):
                drawn = [self._drawn(name, ops, epoch, sample_id) for sample_id in sample_ids]
                ready[DRAWN + name] = torch.tensor(drawn, dtype=torch.int32)
        return rest, ready

    def _drawn(self, name: str, ops: Sequence[tuple[str, Any]], epoch: int | None, sample_id: str) -> list[int]:
        shape = self.inputs[name].shape
        generators: dict[str, np.random.Generator] = {}
        found: list[int] = []
        for key, op in ops:
            if key not in generators:
                generators[key] = op_generator(self.seed, epoch or 0, sample_id, key)
            found += DRAWS[op.name](shape, op, generators[key])
        return found

    def __call__(self, batch: Batch) -> Batch:
        """A batch as the CPU would have made it, of one that `packed` made and that is on its device."""
        finished = {name: tensor for name, tensor in batch.items() if not name.startswith(DRAWN)}
        for name in self.names:
            modality, x = self.modalities[name], finished[name]
            if isinstance(modality, AudioModality):
                x = log_spectrograms(x, modality.preprocess)
            drawn = batch.get(DRAWN + name)
            if drawn is not None:
                columns = iter(drawn.long().unbind(dim=1))
                for _, op in self._ops(name):
                    x = _APPLY[op.name](x, columns)
            finished[name] = x if isinstance(modality, AudioModality) else normalised(x, modality.preprocess)  # type: ignore[arg-type]
        return finished


def log_spectrograms(waves: Tensor, settings: AudioPreprocess) -> Tensor:
    """Spectrograms [B, 1, F, T] of waveforms [B, samples], as `decode.spectrogram` makes one."""
    size, hop = settings.n_fft, settings.hop_length
    if settings.spectrum == "density":
        spectra = _densities(waves, settings)
    else:
        window = torch.hann_window(size, device=waves.device)
        spectra = torch.stft(waves, size, hop, window=window, pad_mode="reflect", return_complex=True)
        spectra = spectra.abs()
    if settings.mel:
        filters = torch.from_numpy(mel_filters(spectra.shape[1], settings.mel, settings.sample_rate))
        spectra = filters.to(waves.device) @ spectra
    result = (spectra + settings.log_floor).log()
    if settings.standardize:
        result = result - result.mean(dim=(1, 2), keepdim=True, dtype=torch.float64).float()
        deviation = result.double().square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-9
        result = result / deviation.float()
    elif settings.mean != 0 or settings.std != 1:
        result = (result - settings.mean) / settings.std
    return result.unsqueeze(1)


def _densities(waves: Tensor, settings: AudioPreprocess) -> Tensor:
    """Power spectral densities [B, F, T] per Hz, as scipy.signal.spectrogram has them by default."""
    from scipy.signal import get_window

    size = settings.n_fft
    window = torch.from_numpy(get_window(("tukey", 0.25), size).astype(np.float32)).to(waves.device)
    parts = waves.unfold(-1, size, settings.hop_length)
    spectra = torch.fft.rfft((parts - parts.mean(dim=-1, keepdim=True)) * window).abs().square()
    spectra = spectra / (settings.sample_rate * float(window.double().square().sum()))
    spectra[..., 1 : spectra.shape[-1] - (size % 2 == 0)] *= 2  # but for zero and half the rate, two sides are one
    return spectra.transpose(1, 2)


def normalised(pixels: Tensor, settings: ImagePreprocess) -> Tensor:
    """(pixels / 255 - mean) / std, float32, of uint8 [.., C, H, W]."""
    mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (settings.mean, settings.std))
    return (pixels.float() / 255 - mean) / std


def _sizes(x: Tensor, values: Tensor) -> Tensor:
    """Numbers [B] in the shape of a batch, to go with it element by element."""
    return values.view(-1, *(1,) * (x.dim() - 1))


def _flip(x: Tensor, drawn: Any) -> Tensor:
    mirrored = x.flip(-1)
    if x.shape[-3] == FLOW_CHANNELS:
        u = (2 * NO_FLOW - mirrored[..., :1, :, :].short()).clamp(0, 255).to(x.dtype)
        mirrored = torch.cat([u, mirrored[..., 1:, :, :]], dim=-3)
    return torch.where(_sizes(x, next(drawn)).bool(), mirrored, x)


def _take(x: Tensor, places: Tensor, axis: int) -> Tensor:
    """Lines of an axis by number [B, lines], other lines for each sample."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = places.shape
    return x.take_along_dim(places.view(shape), dim=axis)


def _shift(x: Tensor, drawn: Any) -> Tensor:
    for axis in (-2, -1):
        size = x.shape[axis]
        source = torch.arange(size, device=x.device) - next(drawn).unsqueeze(1)
        inside = (source >= 0) & (source < size)
        shape = [1] * x.dim()
        shape[0], shape[axis] = inside.shape
        x = _take(x, source.clamp(0, size - 1), axis) * inside.view(shape).to(x.dtype)
    return x


def _resized_crop(x: Tensor, drawn: Any) -> Tensor:
    top, left, height, width = (next(drawn) for _ in range(4))
    scaled = x.float()
    for axis, start, length in ((-2, top, height), (-1, left, width)):
        size = x.shape[axis]
        at = (torch.arange(size, device=x.device, dtype=torch.float64) + 0.5) * (length / size).unsqueeze(1) - 0.5
        at = at.clamp(torch.zeros_like(length).unsqueeze(1), (length - 1).unsqueeze(1).double())
        low = at.floor().long()
        high = torch.minimum(low + 1, (length - 1).unsqueeze(1))
        shape = [1] * x.dim()
        shape[0], shape[axis] = at.shape
        share = (at - low).float().view(shape)
        before, after = (_take(scaled, start.unsqueeze(1) + places, axis) for places in (low, high))
        scaled = before + share * (after - before)
    return (scaled + 0.5).floor().clamp(0, 255).to(x.dtype)


def _time_shift(x: Tensor, drawn: Any) -> Tensor:
    axis = time_axis(x.shape[1:])
    axis = axis if axis < 0 else axis + 1
    size = x.shape[axis]
    return _take(x, (torch.arange(size, device=x.device) - next(drawn).unsqueeze(1)) % size, axis)


def _mask(x: Tensor, drawn: Any) -> Tensor:
    least = x.flatten(1).amin(dim=1)
    result = x
    for axis in (-1, -2):
        start, length = (next(drawn).unsqueeze(1) for _ in range(2))
        at = torch.arange(x.shape[axis], device=x.device)
        shape = [1] * x.dim()
        hidden = (at >= start) & (at < start + length)
        shape[0], shape[axis] = hidden.shape
        result = torch.where(hidden.view(shape), _sizes(x, least), result)
    return result


_APPLY = {"flip": _flip, "shift": _shift, "resized_crop": _resized_crop, "time_shift": _time_shift, "mask": _mask}
