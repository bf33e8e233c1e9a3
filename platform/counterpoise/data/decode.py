"""Encoded cells to compact arrays, one sample at a time, so that no bit depends on how samples are batched.

Compact forms: audio float32 [1, F, T], image uint8 [C, H, W], frames uint8 [T, C, H, W], text int32 [L],
vector float32 [D], series float32 [T, C].
"""

from __future__ import annotations

import functools
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterpoise.contracts import InputSpec
from counterpoise.data.card import (
    AnyModality,
    AudioModality,
    AudioPreprocess,
    FramesModality,
    ImageModality,
    ImagePreprocess,
    SeriesModality,
    TextModality,
    VectorModality,
)
from counterpoise.data.tokens import tokenizer_of

MAX_PIXELS = 50_000_000  # of the encoded image; Pillow alone would decode 179 million
MAX_SECONDS = 600.0  # of the encoded clip
MAX_NUMBERS = 50_000_000  # of the encoded clip, all channels: 200 MB while it is decoded
RATES = (1_000, 768_000)  # Hz; a filter for others would not fit into memory
MAX_FRAMES = 10_000
MAX_CHARACTERS = 1_000_000  # of a text
LFS_POINTER = b"version https://git-lfs"
_WORD = re.compile(r"[^\W_]+")


class DecodeError(Exception):
    """A cell that cannot be decoded; the text says why."""


class RowError(Exception):
    """A row that cannot be decoded: which modality, and why."""

    def __init__(self, modality: str, reason: str) -> None:
        super().__init__(modality, reason)
        self.modality = modality
        self.reason = reason


@dataclass(frozen=True)
class Stats:
    """What a modality takes from the train split: its shape and, if standardised, mean and std (float64)."""

    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stats:
        return cls(tuple(data["shape"]), tuple(data["mean"]), tuple(data["std"]))


@dataclass(frozen=True)
class Decoder:
    """Decodes whole rows. Plain data: it can be sent to another process.

    waves: modalities of sound that are left as waveforms [samples], float32.
    """

    modalities: dict[str, AnyModality]
    stats: dict[str, Stats]
    waves: frozenset[str] = frozenset()

    def __call__(self, cells: Mapping[str, Any], out: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Compact arrays of one row, written into `out` where it is given; RowError if any modality cannot be decoded,
        and then `out` may be half written."""
        result = {}
        for name, modality in self.modalities.items():
            place = None if out is None else out[name]
            try:
                result[name] = decode_cell(cells[name], modality, self.stats.get(name), place, name in self.waves)
            except DecodeError as error:
                raise RowError(name, str(error)) from None
        return result

    def room(self, rows: int) -> dict[str, np.ndarray]:
        """Arrays [rows, ...] to decode into, uninitialised."""
        return {name: np.empty((rows, *shape), kind) for name, (shape, kind) in self.compact().items()}

    def compact(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of a decoded row."""
        return {
            name: (
                (modality.preprocess.num_samples,)
                if isinstance(modality, AudioModality) and name in self.waves
                else input_spec(modality, self.stats.get(name)).shape,
                compact_dtype(modality),
            )
            for name, modality in self.modalities.items()
        }


def input_spec(modality: AnyModality, stats: Stats | None = None) -> InputSpec:
    """The tensor that a modality's cells become."""
    shape = stats.shape if stats is not None else modality.preprocess.shape
    assert shape is not None, "the shape of a vector comes with its stats"
    if not isinstance(modality, TextModality):
        return InputSpec(modality.kind, tuple(shape))
    tokenizer = tokenizer_of(modality)
    if tokenizer is None:
        return InputSpec("text", tuple(shape), modality.preprocess.vocabulary)
    return InputSpec("text", tuple(shape), tokenizer.vocabulary, tokenizer.fingerprint, tokenizer.separator)


def compact_dtype(modality: AnyModality) -> np.dtype:
    return np.dtype({"image": np.uint8, "frames": np.uint8, "text": np.int32}.get(modality.kind, np.float32))


def decode_cell(
    value: Any,
    modality: AnyModality,
    stats: Stats | None = None,
    out: np.ndarray | None = None,
    waveform: bool = False,
) -> np.ndarray:
    """The compact array of one cell, in `out` if it is given; DecodeError if the cell is missing, damaged, or not what
    the card says. waveform: of sound, without its spectrogram."""
    if value is None:
        raise DecodeError("missing")
    if isinstance(modality, AudioModality):
        settings = modality.preprocess
        wave = _waveform(_media(value), modality.encoding, settings)
        if waveform:
            filled = _filled(wave, settings.num_samples, settings.fill, 0)
            if out is None:
                return filled.copy()
            out[...] = filled
            return out
        return spectrogram(wave, settings, out, samples=settings.num_samples)
    array = _compact(value, modality, stats, out)
    if out is None:
        return np.require(array, requirements=["C", "W"])
    assert out.shape == array.shape, f"{modality.kind} of shape {array.shape}, not {out.shape}"
    if array is not out:
        out[...] = array
    return out


def _compact(value: Any, modality: AnyModality, stats: Stats | None, out: np.ndarray | None) -> np.ndarray:
    match modality:
        case FramesModality():
            return _frames(value, modality, out)
        case ImageModality():
            return _image(_media(value), modality.encoding, modality.preprocess)
        case TextModality():
            return _tokens(value, modality)
        case VectorModality():
            array = numbers(value)
            if stats is not None and array.shape != stats.shape:
                raise DecodeError(f"{len(array)} numbers instead of {stats.shape[0]}")
            return _standardized(array, stats)
        case SeriesModality():
            array = numbers(value)
            frames, channels = modality.preprocess.shape
            if len(array) != frames * channels:
                raise DecodeError(f"{len(array)} numbers instead of {frames} x {channels}")
            return _standardized(array.reshape(frames, channels), stats)
        case _:
            raise AssertionError(modality.kind)


def _media(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise DecodeError(f"{type(value).__name__} instead of encoded bytes")
    if not value:
        raise DecodeError("empty")
    if value.startswith(LFS_POINTER):
        raise DecodeError("a git-LFS pointer, not the file itself (git lfs pull)")
    return value


# Audio


def check_wav(data: bytes) -> None:
    """Raise if the data chunk is shorter than its header says: libsndfile would return what is there, silently."""
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"data":
            present = len(data) - at - 8
            if size == 0:
                raise DecodeError("WAV without samples")
            # programs that write to a pipe cannot know the length and leave about 2**31 or 2**32
            if size > present and size < 0x7FFFF000:
                raise DecodeError(f"cut short: WAV of {size} data bytes, {present} present")
            return
        at += 8 + size + size % 2
    raise DecodeError("cut short: WAV without data")


def _waveform(data: bytes, encoding: str | None, settings: AudioPreprocess) -> np.ndarray:
    """The samples of a file at the card's rate, no more of them than the card wants, but perhaps fewer."""
    import soundfile

    magic = {b"RIFF": "wav", b"RF64": "wav", b"fLaC": "flac", b"OggS": "ogg"}.get(data[:4])
    if magic is None or (encoding is not None and magic != encoding):
        raise DecodeError(f"not {encoding or 'WAV, FLAC or Ogg'}: begins with {data[:4]!r}")
    if data[:4] == b"RIFF":
        check_wav(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, promised = file.samplerate, file.frames
            if not RATES[0] <= rate <= RATES[1]:
                raise DecodeError(f"a sample rate of {rate} Hz; {RATES[0]} to {RATES[1]} are read")
            if promised > rate * MAX_SECONDS:
                raise DecodeError(f"{promised / rate:.0f} s long; at most {MAX_SECONDS:.0f} s are read")
            if promised * file.channels > MAX_NUMBERS:
                raise DecodeError(
                    f"{promised} samples of {file.channels} channels; at most {MAX_NUMBERS // 1_000_000} million "
                    "numbers are read"
                )
            wave = file.read(dtype="float32")
            if wave.ndim == 2:
                wave = wave.mean(axis=1, dtype=np.float32)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise DecodeError(f"not decodable: {' '.join(str(error).split())}") from None
    if len(wave) == 0:
        raise DecodeError("no samples")
    if len(wave) < promised:
        raise DecodeError(f"cut short: {len(wave)} of {promised} samples")
    if not np.isfinite(wave).all():
        raise DecodeError("NaN or infinite samples")
    wave = resampled(wave, rate, settings.sample_rate)[: settings.num_samples]
    return np.clip(wave, -1.0, 1.0, out=wave) if settings.clip else wave


def resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A waveform [samples] of another rate in Hz, by a polyphase filter; the same array if the rates are equal."""
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, wanted)
    return resample_poly(wave, wanted // divisor, rate // divisor).astype(np.float32)


@functools.lru_cache(maxsize=8)
def mel_filters(num_bins: int, num_bands: int, sample_rate: int) -> np.ndarray:
    """Triangular filters on the HTK mel scale [bands, bins], each with peak 1."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    centres = 700 * (10 ** (np.linspace(0, top, num_bands + 2) / 2595) - 1)
    hertz = np.linspace(0, sample_rate / 2, num_bins)
    left, middle, right = centres[:-2, None], centres[1:-1, None], centres[2:, None]
    filters = np.minimum((hertz - left) / (middle - left), (right - hertz) / (right - middle)).clip(0)
    # a band narrower than the distance of two bins would be empty: give it the nearest bin
    empty = np.flatnonzero(filters.max(axis=1) == 0)
    filters[empty, np.abs(hertz[None] - middle[empty]).argmin(axis=1)] = 1.0
    return filters.astype(np.float32)


@functools.lru_cache(maxsize=8)
def _sparse_mel_filters(num_bins: int, num_bands: int, sample_rate: int) -> Any:
    """Nearly all of a filter is zero; and BLAS would start threads for the dense product (15 ms instead of 1 ms on a
    busy machine), and sum in an order that depends on their number."""
    from scipy.sparse import csr_array

    return csr_array(mel_filters(num_bins, num_bands, sample_rate))


class _Scratch(threading.local):
    """Arrays that a thread uses again for one sample after the other. Memory that is asked for anew has to be mapped
    page by page, which takes longer than the arithmetic."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, *shape: int) -> np.ndarray:
        """Float32 of a shape: zeros, or what the thread left there under that name."""
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            array = self._arrays[name] = np.zeros(shape, np.float32)
        return array


_scratch = _Scratch()


def _filled(wave: np.ndarray, samples: int, fill: str, edge: int) -> np.ndarray:
    """A waveform repeated or followed by silence, reflected by `edge` samples at both ends; the thread's own memory,
    which the next call takes again."""
    padded = _scratch("padded", samples + 2 * edge)
    clip = padded[edge : edge + samples]
    there = min(len(wave), samples)
    clip[:there] = wave[:there]
    if fill == "zero":
        clip[there:] = 0
    while there < samples and fill == "tile":  # whole periods, twice as many each time
        more = min(there, samples - there)
        clip[there : there + more] = clip[:more]
        there += more
    if edge:
        padded[:edge] = clip[edge:0:-1]
        padded[edge + samples :] = clip[-2 : -2 - edge : -1]
    return padded


def spectrogram(
    wave: np.ndarray, settings: AudioPreprocess, out: np.ndarray | None = None, *, samples: int | None = None
) -> np.ndarray:
    """log(spectrum + floor), or log of mel bands of the spectrum, scaled as the card says; float32 [1, F, T], in `out`
    if it is given. samples: what a shorter waveform is repeated or padded to, as the card says."""
    import cv2

    samples = len(wave) if samples is None else samples
    if settings.spectrum == "density":
        result = _density(_filled(wave, samples, settings.fill, 0), settings)
    else:
        padded = _filled(wave, samples, settings.fill, settings.n_fft // 2)
        result = _magnitude(padded, settings, None if out is None or settings.mel else out[0])
    if settings.mel:
        result = _sparse_mel_filters(len(result), settings.mel, settings.sample_rate) @ result
    result = np.ascontiguousarray(result, dtype=np.float32)
    result += np.float32(settings.log_floor)
    cv2.log(result, result)  # as near as numpy's, in half its time
    if settings.standardize:
        result -= result.mean(dtype=np.float64)
        result /= np.sqrt(np.square(result, dtype=np.float64).mean()) + 1e-9  # silence stays zero
    elif settings.mean != 0 or settings.std != 1:
        result -= np.float32(settings.mean)
        result /= np.float32(settings.std)
    if out is None:
        return result[None]
    if settings.mel or settings.spectrum == "density":
        assert out.shape == (1, *result.shape), f"a spectrogram of shape {result.shape}, not {out.shape[1:]}"
        out[0] = result
    return out


_BLOCK = 2**16  # numbers of windows that are transformed at once


@functools.lru_cache(maxsize=8)
def _hann_rows(size: int) -> np.ndarray:
    """Periodic Hann windows of a block, float32 [windows, 2 * bins]: a zero before each, and behind it if need be."""
    rows = np.zeros((max(1, _BLOCK // size), 2 * (size // 2 + 1)), np.float32)
    rows[:, 1 : 1 + size] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    rows.setflags(write=False)
    return rows


def _magnitude(padded: np.ndarray, settings: AudioPreprocess, out: np.ndarray | None) -> np.ndarray:
    """|STFT| [F, T] with a Hann window, of a clip that is reflected by half a window at both ends; in `out` if it is
    given, which must be contiguous."""
    # OpenCV's transform: scipy's takes four times as long, and torch's would have every decoding thread start a team
    # of threads. So would OpenCV for more numbers than a block has; and a block stays in the processor's cache.
    import cv2

    size = settings.n_fft
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: settings.hop_length]
    hann, bins, count = _hann_rows(size), size // 2 + 1, len(windows)
    result = np.empty((bins, count), np.float32) if out is None else out
    assert result.shape == (bins, count), f"a spectrum of shape {(bins, count)}, not {result.shape}"
    # A row of the transform is Re 0, Re 1, Im 1, Re 2, Im 2, ..., and of an even size Re n/2. With a zero before it,
    # and one behind if it is even, it is complex numbers with the right magnitudes.
    packed, magnitude = _scratch("packed", *hann.shape), _scratch("magnitude", count, bins)
    rows, numbers = packed[:, 1 : 1 + size], packed.view(np.complex64)
    for start in range(0, count, len(hann)):
        n = min(len(hann), count - start)
        rows[:n] = windows[start : start + n]
        np.multiply(packed[:n], hann[:n], out=packed[:n])  # whole rows: much faster than what is strided
        cv2.dft(rows[:n], rows[:n], flags=cv2.DFT_ROWS)
        np.abs(numbers[:n], out=magnitude[start : start + n])
    cv2.transpose(magnitude, result)
    return result


def _density(wave: np.ndarray, settings: AudioPreprocess) -> np.ndarray:
    """Power spectral density [F, T] per Hz. What scipy takes by default is said, so that it stays when that changes."""
    from scipy import signal

    return signal.spectrogram(
        wave,
        settings.sample_rate,
        window=("tukey", 0.25),
        nperseg=settings.n_fft,
        noverlap=settings.n_fft - settings.hop_length,
        detrend="constant",
        scaling="density",
        mode="psd",
    )[2]


# Images


def _image(data: bytes, encoding: str | None, settings: ImagePreprocess) -> np.ndarray:
    from PIL import Image

    kind = "png" if data.startswith(b"\x89PNG\r\n\x1a\n") else "jpeg" if data.startswith(b"\xff\xd8\xff") else None
    if kind is None or (encoding is not None and kind != encoding):
        raise DecodeError(f"not {encoding or 'PNG or JPEG'}: begins with {data[:4]!r}")
    if kind == "png" and len(data) >= 24:  # before Pillow warns or allocates
        _check_pixels(*struct.unpack(">II", data[16:24]))
    try:
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as file:
            _check_pixels(*file.size)
            file.load()
            image: Image.Image = file
            if image.mode.startswith("I"):  # 16 bits per pixel
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode == "P":
                image = image.convert("RGBA")
            wanted = "L" if settings.channels == 1 else "RGB"
            if image.mode != wanted:
                image = image.convert(wanted)
            if image.size != (settings.size[1], settings.size[0]):
                image = image.resize((settings.size[1], settings.size[0]), Image.Resampling.BILINEAR)
            pixels = np.asarray(image, dtype=np.uint8)
    except (
        OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        raise DecodeError(f"not decodable: {' '.join(str(error).split())}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)[: settings.channels]


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels; at most {MAX_PIXELS // 1_000_000} million are read")


def _frames(value: Any, modality: FramesModality, out: np.ndarray | None) -> np.ndarray:
    if not isinstance(value, list | tuple | np.ndarray):
        raise DecodeError(f"{type(value).__name__} instead of a list of encoded images")
    if not 0 < len(value) <= MAX_FRAMES:
        raise DecodeError(f"{len(value)} frames" if len(value) else "no frames")
    settings = modality.preprocess
    chosen = np.linspace(0, len(value) - 1, settings.num_frames).round().astype(int)
    result = np.empty(settings.shape, np.uint8) if out is None else out
    for i in sorted(set(chosen.tolist())):
        try:
            if value[i] is None:
                raise DecodeError("missing")
            result[chosen == i] = _image(_media(value[i]), modality.encoding, settings)
        except DecodeError as error:
            raise DecodeError(f"frame {i}: {error}") from None
    return result


# Text and numbers


def _text(value: Any) -> str:
    if value is None:
        raise DecodeError("missing")
    if isinstance(value, bytes):
        if value.startswith(LFS_POINTER):
            raise DecodeError("a git-LFS pointer, not the file itself (git lfs pull)")
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DecodeError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(value, str):
        raise DecodeError(f"{type(value).__name__} instead of text")
    if len(value) > MAX_CHARACTERS:
        raise DecodeError(f"{len(value)} characters; at most {MAX_CHARACTERS} are read")
    return value


def _tokens(value: Any, modality: TextModality) -> np.ndarray:
    tokenizer = tokenizer_of(modality)
    if tokenizer is not None:
        parts = value if modality.pair is not None else [value]
        ids = tokenizer(*[_text(part) for part in parts])
        if ids is None:
            raise DecodeError("no words" if modality.pair is None else "no words in the text or in its pair")
        return ids
    words = _WORD.findall(_text(value).lower())[: modality.preprocess.max_length]
    if not words:
        raise DecodeError("no words")
    tokens = np.zeros(modality.preprocess.max_length, dtype=np.int32)
    size = modality.preprocess.vocabulary - 1
    tokens[: len(words)] = [1 + zlib.crc32(word.encode()) % size for word in words]
    return tokens


def numbers(value: Any) -> np.ndarray:
    """A flat cell of numbers, float64; DecodeError if one is missing, NaN or infinite."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DecodeError("not a list of numbers") from None
    if array.ndim != 1 or len(array) == 0:
        raise DecodeError("an empty list" if array.size == 0 else "not a flat list of numbers")
    if not np.isfinite(array).all():
        raise DecodeError("missing, NaN or infinite numbers")
    return array


def _standardized(array: np.ndarray, stats: Stats | None) -> np.ndarray:
    if stats is not None and stats.mean:
        array = (array - np.array(stats.mean)) / np.array(stats.std)
    with np.errstate(over="ignore"):
        result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise DecodeError("numbers too large for float32")
    return result
