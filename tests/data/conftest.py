"""A small corpus with all six kinds of modality, written in a second."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from counterpoise.data.card import Card, load_card
from counterpoise.data.shards import write_shards

WORDS = ("red", "green", "blue")


def wav_bytes(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def image_bytes(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_rows(split: str, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(list(split.encode()))
    rows = []
    for i in range(count):
        label = i % 3
        wave_of = 0.5 * np.sin(np.arange(1600) * (label + 1) / 3) + 0.01 * rng.standard_normal(1600)
        rows.append(
            {
                "key": f"{split}{i:03d}",
                "label": label,
                "speaker": f"s{i // 6 % 7}",
                "audio": wav_bytes(wave_of),
                "image": image_bytes(rng.integers(0, 255, (8, 8), dtype=np.uint8)),
                "frames": [image_bytes(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), "JPEG") for _ in range(3)],
                "text": f"{WORDS[label]} {split} number {i}",
                "vector": rng.normal(5, 2, 4).tolist(),
                "series": rng.normal(-1, 3, 10).tolist(),
                "height": float(rng.normal()),
                "width": float(rng.normal()),
            }
        )
    return rows


CARD: dict[str, Any] = {
    "name": "tiny",
    "classes": list(WORDS),
    "sample_id": "key",
    "splits": {
        "train": {"files": "train-*.parquet"},
        "valid": {"files": "valid-*.parquet"},
        "test": {"files": "test-*.parquet"},
    },
    "modalities": {
        "audio": {
            "kind": "audio",
            "column": "audio",
            "encoding": "wav",
            "preprocess": {"sample_rate": 8000, "seconds": 0.2, "n_fft": 128, "hop_length": 100, "mel": 12},
        },
        "image": {
            "kind": "image",
            "column": "image",
            "preprocess": {"size": [8, 8], "channels": 1, "mean": 0.5, "std": 0.25},
        },
        "frames": {"kind": "frames", "column": "frames", "preprocess": {"size": [4, 4], "num_frames": 2}},
        "text": {"kind": "text", "column": "text", "preprocess": {"max_length": 4, "vocabulary": 50}},
        "vector": {"kind": "vector", "column": "vector", "preprocess": {"standardize": True}},
        "series": {"kind": "series", "column": "series", "preprocess": {"shape": [5, 2], "standardize": True}},
        "size": {"kind": "vector", "column": ["height", "width"]},
    },
}


def write_corpus(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    *,
    card: dict[str, Any] | None = None,
    num_shards: int = 2,
    row_group_size: int = 8,
) -> Card:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in rows.items():
        write_shards(part, str(folder), split, num_shards=num_shards, row_group_size=row_group_size)
    (folder / "corpus.yaml").write_text(yaml.safe_dump(card or CARD, sort_keys=False))
    return load_card(str(folder))


@pytest.fixture(scope="session")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {"train": make_rows("train", 101), "valid": make_rows("valid", 20), "test": make_rows("test", 31)}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[dict[str, Any]]]) -> Card:
    return write_corpus(tmp_path_factory.mktemp("tiny"), rows)
