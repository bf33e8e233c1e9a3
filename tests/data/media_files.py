"""Small real media in the forms of the corpora's downloads, and files that only look like media."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:10dc3fd1f2bc\nsize 265922\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>gone</body></html>\n"


def tone(seconds: float, hertz: float = 440.0, rate: int = 16000) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, format="WAV", subtype="PCM_16")


def write_picture(path: Path, pixels: np.ndarray, kind: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Grey RGB frames; frame i has brightness 5 + 5 i, so that a decoded one tells its number."""
    return [np.full((height, width, 3), 5 + 5 * (i % 50), np.uint8) for i in range(count)]


def number_of(picture: bytes) -> int:
    return round((float(np.asarray(Image.open(io.BytesIO(picture)).convert("L")).mean()) - 5) / 5)


def moving(count: int, height: int = 64, width: int = 96, right: int = 2) -> list[np.ndarray]:
    """A texture that moves `right` pixels per frame."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (height // 4, (width + count * right) // 4 + 1), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((coarse.shape[1] * 4, height), Image.Resampling.BICUBIC))
    frames = [wide[:, (count - i) * right : (count - i) * right + width] for i in range(count)]
    return [np.repeat(f[..., None], 3, axis=2) for f in frames]


def write_video(
    path: Path, frames: list[np.ndarray], fps: int = 10, sound: np.ndarray | None = None, **options: Any
) -> None:
    """A video file of the kind that the name ends with, with a sound track of 44.1 kHz if there is sound."""
    codecs = {".flv": ("flv", "libmp3lame"), ".mp4": ("libx264", "aac"), ".avi": ("mpeg4", "libmp3lame")}
    codec, voice = codecs.get(path.suffix, ("mpeg1video", "mp2"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        track = container.add_stream(voice, rate=44100, layout="mono") if sound is not None else None
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None:
            kind = track.codec_context.format.name
            resampler = av.AudioResampler(format=kind, layout="mono", rate=44100, frame_size=track.frame_size or 1152)
            whole = av.AudioFrame.from_ndarray(sound[None].astype(np.float32), format="fltp", layout="mono")
            whole.sample_rate = 44100
            for piece in [*resampler.resample(whole), *resampler.resample(None)]:
                container.mux(track.encode(piece))
            container.mux(track.encode())
