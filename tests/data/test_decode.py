import io
import struct
import warnings
import zlib

import numpy as np
import pytest

from counterpoise.data import card as cards
from counterpoise.data.decode import DecodeError, Decoder, RowError, Stats, decode_cell, mel_filters, spectrogram

from .conftest import image_bytes, wav_bytes
from .raw_lists import card

AUDIO = cards.AudioModality(
    kind="audio", column="a", preprocess=cards.AudioPreprocess(sample_rate=8000, seconds=0.2, n_fft=128, hop_length=100)
)
IMAGE = cards.ImageModality(kind="image", column="i", preprocess=cards.ImagePreprocess(size=(8, 8), channels=1))
FRAMES = cards.FramesModality(
    kind="frames", column="f", preprocess=cards.FramesPreprocess(size=(4, 4), num_frames=4, channels=3)
)
TEXT = cards.TextModality(kind="text", column="t", preprocess=cards.TextPreprocess(max_length=4, vocabulary=10))
VECTOR = cards.VectorModality(kind="vector", column="v")
SERIES = cards.SeriesModality(kind="series", column="s", preprocess=cards.SeriesPreprocess(shape=(3, 2)))

RNG = np.random.default_rng(0)
WAVE = 0.3 * np.sin(np.arange(1600) / 3)
WAV = wav_bytes(WAVE)
PNG = image_bytes(RNG.integers(0, 255, (40, 40), dtype=np.uint8))
JPEG = image_bytes(RNG.integers(0, 255, (40, 40), dtype=np.uint8), "JPEG")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def encoded(samples, rate, kind):
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype="FLOAT" if kind == "WAV" else None)
    return buffer.getvalue()


FLAC = encoded(WAVE, 8000, "FLAC")


def png_of(width, height):
    """A PNG whose header promises a size; there are no such pixels in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    ("modality", "value", "reason"),
    [
        (AUDIO, None, "missing"),
        (AUDIO, b"", "empty"),
        (AUDIO, "text", "str instead of encoded bytes"),
        (AUDIO, LFS, "git-LFS pointer"),
        (AUDIO, WAV[: len(WAV) // 2], "cut short: WAV of 3200 data bytes, 1578 present"),
        (AUDIO, WAV[:44], "cut short: WAV of 3200 data bytes, 0 present"),
        (AUDIO, WAV[:30], "cut short: WAV without data"),
        (AUDIO, wav_bytes(np.zeros(0)), "WAV without samples"),
        (AUDIO, FLAC[: len(FLAC) // 2], "not decodable|cut short"),
        (AUDIO, PNG, "not WAV, FLAC or Ogg: begins with"),
        (AUDIO, encoded(np.full(1600, np.nan), 8000, "WAV"), "NaN or infinite samples"),
        (AUDIO, wav_bytes(np.zeros(700_000), 1000), "700 s long; at most 600 s"),
        (AUDIO, wav_bytes(np.zeros(100), 999), "a sample rate of 999 Hz; 1000 to 768000 are read"),
        (IMAGE, PNG[:-300], "not decodable"),
        (IMAGE, JPEG[: len(JPEG) * 6 // 10], "not decodable: image file is truncated"),
        (IMAGE, PNG[:20], "not decodable"),
        (IMAGE, LFS, "git-LFS pointer"),
        (IMAGE, b"GIF89a", "not PNG or JPEG: begins with"),
        (IMAGE, png_of(10_000, 10_000), "10000 x 10000 pixels; at most 50 million"),
        (FRAMES, [], "no frames"),
        (FRAMES, b"x", "bytes instead of a list"),
        (FRAMES, [JPEG, JPEG[:300]], "frame 1: not decodable"),
        (FRAMES, [JPEG, None], "frame 1: missing"),
        (TEXT, b"\xff\xfe caf", "not UTF-8: invalid start byte at byte 0"),
        (TEXT, " ... ", "no words"),
        (TEXT, LFS, "git-LFS pointer"),
        (VECTOR, [1.0, float("nan")], "missing, NaN or infinite"),
        (VECTOR, [1.0, None], "missing, NaN or infinite"),
        (VECTOR, [], "an empty list"),
        (VECTOR, [1e300], "too large for float32"),
        (VECTOR, "abc", "not a"),
        (SERIES, [1.0] * 5, "5 numbers instead of 3 x 2"),
    ],
)
def test_what_cannot_be_decoded_says_why(modality, value, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_cell(value, modality)


def test_vectors_have_the_length_of_the_train_split():
    with pytest.raises(DecodeError, match="2 numbers instead of 3"):
        decode_cell([1.0, 2.0], VECTOR, Stats((3,)))


def test_a_declared_encoding_is_held_to():
    flac_only = AUDIO.model_copy(update={"encoding": "flac"})
    assert decode_cell(FLAC, flac_only).shape == (1, 65, 17)
    with pytest.raises(DecodeError, match="not flac: begins with b'RIFF'"):
        decode_cell(WAV, flac_only)


def test_a_wav_from_a_pipe_has_no_length_and_is_read():
    piped = bytearray(WAV)
    piped[40:44] = b"\xff\xff\xff\xff"
    assert np.array_equal(decode_cell(bytes(piped), AUDIO), decode_cell(WAV, AUDIO))


def test_spectrograms_are_those_of_torch():
    import torch

    settings = cards.AudioPreprocess()
    wave = (0.1 * RNG.standard_normal(settings.num_samples)).astype(np.float32)
    expected = torch.stft(
        torch.from_numpy(wave), 512, 353, window=torch.hann_window(512), center=True, return_complex=True
    )
    found = spectrogram(wave, settings)
    assert found.shape == (1, 257, 188) and found.dtype == np.float32
    assert np.allclose(np.exp(found[0]), expected.abs().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mel", [None, 40])
def test_spectrograms_are_those_of_plain_double_precision(mel):
    settings = cards.AudioPreprocess(mel=mel, mean=-4.0, std=2.5)
    wave = (0.1 * RNG.standard_normal(settings.num_samples)).astype(np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    padded = np.pad(wave.astype(np.float64), 256, mode="reflect")
    expected = np.abs([np.fft.rfft(window * padded[i : i + 512]) for i in range(0, len(wave) + 1, 353)]).T
    if mel:
        expected = mel_filters(257, mel, settings.sample_rate).astype(np.float64) @ expected
    found = spectrogram(wave, settings)
    assert np.allclose(np.exp(found[0].astype(np.float64) * 2.5 - 4.0), expected + 1e-7, rtol=1e-5, atol=3e-6)
    assert found.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(("size", "hop"), [(2, 1), (3, 2), (7, 7), (255, 100), (1000, 333), (40_000, 9000)])
def test_windows_of_any_size_are_transformed(size, hop):
    settings = cards.AudioPreprocess(n_fft=size, hop_length=hop)
    wave = (0.1 * RNG.standard_normal(settings.num_samples)).astype(np.float32)
    half = size // 2
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    padded = np.pad(wave.astype(np.float64), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    found = np.exp(spectrogram(wave, settings)[0].astype(np.float64))
    assert found.shape == settings.shape[1:] == (half + 1, len(frames))
    assert np.allclose(found, np.abs(np.fft.rfft(window * frames)).T + 1e-7, rtol=1e-5, atol=2e-6 * np.sqrt(size))


def test_a_sample_decoded_into_a_batch_is_the_sample_alone():
    """Whatever the thread decoded before: it uses some memory again."""
    modalities = {"a": AUDIO, "i": IMAGE, "f": FRAMES, "t": TEXT, "v": VECTOR, "s": SERIES}
    mel = AUDIO.model_copy(update={"preprocess": AUDIO.preprocess.model_copy(update={"mel": 10})})
    other = AUDIO.model_copy(update={"preprocess": cards.AudioPreprocess(sample_rate=8000, n_fft=100, seconds=0.5)})
    decoder = Decoder(modalities | {"mel": mel}, {"v": Stats((3,))})
    loud = wav_bytes(np.full(900, 0.99))
    cells = {"i": JPEG, "f": [JPEG, PNG], "t": "some words", "v": [1.0, 2.0, 3.0], "s": np.arange(6.0)}
    rows = [cells | {"a": sound, "mel": sound} for sound in (loud, WAV, wav_bytes(WAVE[:100]))]
    batch = decoder.room(len(rows))
    for array in batch.values():
        array[...] = 77
    for place, row in enumerate(rows):
        decode_cell(loud, other)
        decoder(row, {name: array[place] for name, array in batch.items()})
    for place, row in enumerate(rows):
        for name, alone in decoder(row).items():
            assert alone.dtype == batch[name].dtype and np.array_equal(batch[name][place], alone)
            assert alone.flags["C_CONTIGUOUS"] and alone.flags["WRITEABLE"]


def density_by_hand(wave, rate, size, hop):
    """Power per Hz of windows within the clip, each less its mean, with a Tukey window of which a quarter tapers."""
    at = np.minimum(np.arange(size), size - np.arange(size)) / (0.125 * size)
    window = np.where(at < 1, 0.5 - 0.5 * np.cos(np.pi * at), 1.0)
    frames = [wave[i : i + size] for i in range(0, len(wave) - size + 1, hop)]
    power = np.abs([np.fft.rfft(window * (f - f.mean())) for f in frames]).T ** 2 / (rate * (window**2).sum())
    power[1:-1] *= 2  # frequencies below zero
    return power


def test_a_density_is_that_of_scipy_with_the_settings_of_the_papers_on_ave():
    from scipy import signal

    settings = card("ave").modalities["audio"].preprocess
    assert settings.num_samples == 160_000 and settings.shape == (1, 257, 1004)
    wave = np.tile(0.1 * RNG.standard_normal(47_000), 10)[:160_000].astype(np.float32)
    found = spectrogram(wave, settings)
    assert found.shape == (1, 257, 1004) and found.dtype == np.float32
    assert abs(found.mean(dtype=np.float64)) < 1e-6 and abs(found.std(dtype=np.float64) - 1) < 1e-5
    published = np.log(signal.spectrogram(wave, 22050, nperseg=512, noverlap=353)[2] + 1e-7)
    assert np.allclose(found[0], (published - published.mean()) / (published.std() + 1e-9), atol=2e-4)
    by_hand = np.log(density_by_hand(wave.astype(np.float64), 22050, 512, 159) + 1e-7)
    assert np.allclose(found[0], (by_hand - by_hand.mean()) / (by_hand.std() + 1e-9), atol=2e-4)


def test_a_density_that_is_not_standardised_keeps_its_level():
    settings = cards.AudioPreprocess(sample_rate=8000, seconds=1, n_fft=256, hop_length=256, spectrum="density")
    tone = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000) + 0.2).astype(np.float32)
    found = np.exp(spectrogram(tone, settings)[0].astype(np.float64))
    assert found.shape == settings.shape[1:] == (129, 31)
    assert (found.argmax(axis=0) == 32).all(), "1000 Hz is bin 32 of 31.25 Hz each"
    assert np.allclose((found - 1e-7).sum(axis=0) * 8000 / 256, 0.5**2 / 2, rtol=1e-4), "the tone's power alone"
    wide = settings.model_copy(update={"mel": 20})
    assert spectrogram(tone, wide).shape == wide.shape == (1, 20, 31)


def test_silence_is_zero_after_standardising():
    for spectrum in ("magnitude", "density"):
        settings = cards.AudioPreprocess(spectrum=spectrum, standardize=True)
        assert not spectrogram(np.zeros(settings.num_samples, np.float32), settings).any()


def test_a_spectrogram_does_not_depend_on_what_else_is_transformed():
    settings = cards.AudioPreprocess(seconds=4)
    wave = (0.1 * RNG.standard_normal(settings.num_samples)).astype(np.float32)
    whole = spectrogram(wave, settings)
    later = spectrogram(wave[353 * 100 :], settings)
    assert np.array_equal(later[..., 1:-1], whole[..., 101:-1])  # the first and the last frame reflect other ends


def test_short_clips_are_repeated_or_padded():
    half = wav_bytes(WAVE[:800])
    repeated = wav_bytes(np.tile(WAVE[:800], 2))
    padded = wav_bytes(np.pad(WAVE[:800], (0, 800)))
    zero = AUDIO.model_copy(update={"preprocess": AUDIO.preprocess.model_copy(update={"fill": "zero"})})
    assert np.array_equal(decode_cell(half, AUDIO), decode_cell(repeated, AUDIO))
    assert np.array_equal(decode_cell(half, zero), decode_cell(padded, AUDIO))
    assert np.array_equal(decode_cell(wav_bytes(np.tile(WAVE, 3)), AUDIO), decode_cell(WAV, AUDIO))


def test_other_rates_and_stereo_become_the_cards():
    doubled = encoded(np.stack([np.repeat(WAVE, 2)] * 2, axis=1), 16000, "WAV")
    assert decode_cell(doubled, AUDIO).shape == decode_cell(WAV, AUDIO).shape


def test_every_mel_band_has_a_bin():
    filters = mel_filters(65, 60, 8000)
    assert filters.shape == (60, 65)
    assert (filters.max(axis=1) > 0).all() and filters.min() >= 0


def test_images_are_scaled_and_keep_their_bytes():
    pixels = RNG.integers(0, 255, (8, 8), dtype=np.uint8)
    assert np.array_equal(decode_cell(image_bytes(pixels), IMAGE)[0], pixels)
    deep = image_bytes(pixels.astype(np.uint16) * 257)
    assert np.array_equal(decode_cell(deep, IMAGE)[0], pixels)
    rgb = IMAGE.model_copy(update={"preprocess": cards.ImagePreprocess(size=(5, 6), channels=3)})
    assert decode_cell(JPEG, rgb).shape == (3, 5, 6)


def test_optical_flow_is_the_first_two_channels():
    pixels = np.stack([np.full((4, 4), v, np.uint8) for v in (10, 200, 128)], axis=-1)
    flow = FRAMES.model_copy(
        update={"preprocess": cards.FramesPreprocess(size=(4, 4), num_frames=2, channels=2, mean=(0.5, 0.4))}
    )
    got = decode_cell([image_bytes(pixels)] * 3, flow)
    assert got.shape == flow.preprocess.shape == (2, 2, 4, 4)
    assert (got[:, 0] == 10).all() and (got[:, 1] == 200).all()


def test_frames_are_evenly_spaced():
    images = [image_bytes(np.full((4, 4, 3), v, dtype=np.uint8)) for v in range(7)]
    assert decode_cell(images, FRAMES)[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert decode_cell(images[:2], FRAMES)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_words_are_hashed_alike_everywhere():
    tokens = decode_cell("Red RED, blue!", TEXT)
    assert tokens.tolist() == [1 + zlib.crc32(b"red") % 9] * 2 + [1 + zlib.crc32(b"blue") % 9, 0]
    assert decode_cell("a b c d e f", TEXT).min() >= 1


def test_numbers_are_standardised():
    stats = Stats((2,), (1.0, 10.0), (2.0, 1.0))
    assert decode_cell([3.0, 10.0], VECTOR, stats).tolist() == [1.0, 0.0]
    series = decode_cell(np.arange(6), SERIES, Stats((3, 2), (0.0, 1.0), (1.0, 2.0)))
    assert series.tolist() == [[0, 0], [2, 1], [4, 2]]


def test_a_row_names_the_modality_that_failed():
    decoder = Decoder({"audio": AUDIO, "image": IMAGE}, {})
    with pytest.raises(RowError) as error, warnings.catch_warnings():
        decoder({"audio": WAV, "image": b""})
    assert (error.value.modality, error.value.reason) == ("image", "empty")
