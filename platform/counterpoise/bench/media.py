"""Corpora to measure with: a raw download of CREMA-D's shape, and shards of any size."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from counterpoise.contracts import ConfigError
from counterpoise.data.card import CARD

Progress = Callable[[int, int, str], None]

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
SENTENCES = ("IEO", "TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI")
RATE, FPS, HEIGHT, WIDTH = 16000, 30, 360, 480
NUM_TEST = 8
_VIDEOS = 12  # encoding takes long: clips share so many different videos; every clip has files of its own
_DONE = "complete.json"


def clip_names(count: int) -> list[str]:
    """Names as CREMA-D's, in the order of a list that is not sorted by class. The first clips say IEO."""
    kinds = len(SENTENCES) * len(EMOTIONS)
    if not 1 <= count <= 999 * kinds:
        raise ConfigError(f"--rows is {count}; give 1 to {999 * kinds}")
    names = []
    for number in range(count):
        sentence, rest = divmod(number, max(1, -(-count // len(SENTENCES))))
        actor, emotion = divmod(rest, len(EMOTIONS))
        names.append(f"{1001 + actor % 999}_{SENTENCES[sentence]}_{EMOTIONS[emotion]}_XX")
    return names


def voice(number: int) -> np.ndarray:
    """1.5 to 3.5 s of a hummed phrase with some breath, int16 at 16 kHz."""
    rng = np.random.default_rng([1, number])
    count = int(RATE * rng.uniform(1.5, 3.5))
    at = np.arange(count) / RATE
    pitch = 2 * np.pi * np.cumsum(rng.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * 1.7 * at))) / RATE
    tone = sum(np.sin(k * pitch) / k for k in range(1, 8))
    loud = np.clip(np.sin(2 * np.pi * at * rng.uniform(1, 3)) + 0.4, 0, 1)
    return np.round(32767 * np.clip(0.12 * loud * tone + 0.004 * rng.standard_normal(count), -1, 1)).astype(np.int16)


def film(number: int) -> Iterator[np.ndarray]:
    """2.5 s of a smooth, slowly moving picture with the noise of a camera, uint8 [360, 480, 3]."""
    from PIL import Image

    rng = np.random.default_rng([2, number])
    coarse = Image.fromarray(rng.integers(0, 255, (HEIGHT // 24, WIDTH // 24 + 8, 3), dtype=np.uint8))
    wide = np.asarray(coarse.resize((WIDTH + 192, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    grains = rng.integers(-6, 7, (4, HEIGHT, WIDTH, 1), dtype=np.int16)
    for frame in range(int(2.5 * FPS)):
        yield np.clip(wide[:, frame : frame + WIDTH] + grains[frame % 4], 0, 255).astype(np.uint8)


def make_raw(folder: Path, rows: int, progress: Progress) -> Path:
    """AudioWAV/*.wav, VideoFlash/*.flv, lists, and the frames that the released code reads, as PNG and as JPEG.

    Image-01-FPS/<clip>/00000.png, Image-01-FPS-jpg/<clip>/00000.jpg: one frame per second, the first always. Nothing
    is made again in a folder that is complete.
    """
    import soundfile

    names = clip_names(rows + NUM_TEST)
    facts = {"rows": rows, "format": 1}
    if (folder / _DONE).is_file() and json.loads((folder / _DONE).read_text()) == facts:
        return folder
    for part in ("AudioWAV", "VideoFlash", "Image-01-FPS", "Image-01-FPS-jpg"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    videos = [_flv(film(number)) for number in range(min(_VIDEOS, len(names)))]
    for number, clip in enumerate(names):
        flv, frames = videos[number % len(videos)]
        soundfile.write(folder / "AudioWAV" / f"{clip}.wav", voice(number), RATE, subtype="PCM_16")
        (folder / "VideoFlash" / f"{clip}.flv").write_bytes(flv)
        for kind, place in (("png", "Image-01-FPS"), ("jpg", "Image-01-FPS-jpg")):
            (folder / place / clip).mkdir()
            for index, pictures in frames.items():
                (folder / place / clip / f"{index:05d}.{kind}").write_bytes(pictures[kind])
        progress(number + 1, len(names), "clips written")
    for split, chosen in (("train", names[:rows]), ("test", names[rows:])):
        (folder / f"{split}.csv").write_text("".join(f"{clip},{clip.split('_')[2]}\n" for clip in chosen))
    (folder / _DONE).write_text(json.dumps(facts))
    return folder


def _flv(frames: Iterator[np.ndarray]) -> tuple[bytes, dict[int, dict[str, bytes]]]:
    """The video, and its decoded frames at one per second as the released extraction saves them."""
    import av
    from PIL import Image

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flv") as container:
        stream: Any = container.add_stream("flv", rate=FPS)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = HEIGHT, WIDTH, "yuv420p", 1_000_000
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    saved = {}
    with av.open(io.BytesIO(buffer.getvalue()), "r") as opened:
        for index, frame in enumerate(opened.decode(video=0)):
            if index % FPS == 0:
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                saved[index] = {"png": _encoded(image, "PNG"), "jpg": _encoded(image, "JPEG", quality=95)}
    return buffer.getvalue(), saved


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepare_cremad(raw: Path, out: Path, workers: int, progress: Progress) -> str:
    """Shards of the raw folder, made by the recipe of CREMA-D; the folder."""
    from counterpoise.data.recipes import prepare

    lists: dict[str, Any] = {"train": str(raw / "train.csv"), "test": str(raw / "test.csv")}
    return prepare("cremad", str(out), progress, raw=str(raw), workers=workers, **lists)


def few_rows_card(corpus: str, rows: int, wanted: int) -> str:
    """A second card beside the corpus of `rows` clips, whose train split has about `wanted` of them: those of some
    sentences; its path."""
    import yaml

    content = yaml.safe_load((Path(corpus) / CARD).read_text(encoding="utf-8"))
    del content["splits"]["train"]["expected"]
    content["splits"].pop("valid", None)
    each = -(-(rows + NUM_TEST) // len(SENTENCES))
    content["splits"]["train"]["where"] = {"sentence": list(SENTENCES[: -(-wanted // each)])}
    place = Path(corpus) / f"few-{wanted}.yaml"
    place.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return str(place)


# A corpus larger than memory

_PAYLOADS = 32
_ROWS_OF_A_SHARD = 192


def make_shards(folder: Path, num_bytes: int, progress: Progress) -> tuple[str, int]:
    """A corpus of so many bytes on disk; its folder and its rows.

    A row has four JPEG frames of noise and 5 s of noise as FLAC, half a megabyte that no compression makes smaller.
    Rows take their payloads from a pool of 32: bytes on disk are real, and differ by row only in their order.
    """
    import yaml

    from counterpoise.data.ingest import group_rows
    from counterpoise.data.shards import parquet_bytes
    from counterpoise.storage import write_bytes

    rng = np.random.default_rng(3)
    frames = [_noise_jpeg(rng) for _ in range(_PAYLOADS)]
    sounds = [_noise_flac(rng) for _ in range(_PAYLOADS)]
    row_bytes = 4 * sum(map(len, frames)) // _PAYLOADS + sum(map(len, sounds)) // _PAYLOADS
    rows = max(64, -(-num_bytes // row_bytes))
    facts = {"rows": rows, "format": 1}
    if (folder / _DONE).is_file() and json.loads((folder / _DONE).read_text()) == facts:
        return str(folder), rows
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    schema = _schema()
    shards = -(-rows // _ROWS_OF_A_SHARD)
    for number in range(shards):
        part = []
        for row in range(number * rows // shards, (number + 1) * rows // shards):
            pick = [(row * 7 + step * 11) % _PAYLOADS for step in range(4)]
            cells = {"audio": sounds[row % _PAYLOADS], "frames": [frames[p] for p in pick]}
            part.append({"sample_id": f"clip{row:07d}", "label": row % len(EMOTIONS), **cells})
        name = f"train-{number:05d}-of-{shards:05d}.parquet"
        write_bytes(str(folder / name), parquet_bytes(part, schema, group_rows(part)))
        progress(number + 1, shards, "shards written")
    audio = {"sample_rate": 22050, "seconds": 5, "n_fft": 512, "hop_length": 353}
    card = {
        "name": "stream",
        "classes": list(EMOTIONS),
        "label": "label",
        "sample_id": "sample_id",
        "splits": {"train": {"files": "train-*.parquet", "expected": rows}},
        "modalities": {
            "audio": {"kind": "audio", "column": "audio", "encoding": "flac", "preprocess": audio},
            "visual": {
                "kind": "frames",
                "column": "frames",
                "encoding": "jpeg",
                "preprocess": {"size": [224, 224], "channels": 3, "num_frames": 1},
            },
        },
    }
    (folder / CARD).write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
    (folder / _DONE).write_text(json.dumps(facts))
    return str(folder), rows


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("label", pa.int64()),
            ("audio", pa.binary()),
            ("frames", pa.list_(pa.binary())),
        ]
    )


def _noise_jpeg(rng: np.random.Generator) -> bytes:
    from PIL import Image

    return _encoded(Image.fromarray(rng.integers(60, 190, (256, 341, 3), dtype=np.uint8)), "JPEG", quality=90)


def _noise_flac(rng: np.random.Generator) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    noise = np.clip(0.1 * rng.standard_normal(5 * 22050), -1, 1)
    soundfile.write(buffer, noise, 22050, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
