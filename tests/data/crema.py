"""A small CREMA-D: the real layout, real flv and wav, and the faults of real downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .media_files import LFS, tone, write_video, write_wav

EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def clip_names(actors: int = 12, sentences: tuple[str, ...] = ("IEO",)) -> list[str]:
    return [f"{1001 + a}_{s}_{e}_XX" for a in range(actors) for s in sentences for e in EMOTIONS]


def write_clip(raw: Path, clip: str) -> None:
    """A tone and a brightness that tell the emotion; 1.5 s."""
    kind = EMOTIONS.index(clip.split("_")[2])
    rng = np.random.default_rng(list(clip.encode()))
    frames = [np.clip(rng.normal(30 + 35 * kind, 8, (24, 32, 3)), 0, 255).astype(np.uint8) for _ in range(15)]
    write_video(raw / f"VideoFlash/{clip}.flv", frames, 10)
    write_wav(raw / f"AudioWAV/{clip}.wav", tone(1.5, 200 + 150 * kind) + rng.normal(0, 0.01, 24000))


def write_raw(raw: Path, clips: list[str]) -> Path:
    for clip in clips:
        write_clip(raw, clip)
    (raw / ".git").mkdir(parents=True)
    (raw / ".git" / "config").write_text("hidden")
    (raw / "README.md").write_text("of the download")
    return raw


def write_list(place: Path, clips: list[str]) -> str:
    """As OGM-GE has them, with the byte order mark of its stat.csv."""
    place.write_bytes(b"\xef\xbb\xbf" + "".join(f"{c},{c.split('_')[2]}\r\n" for c in clips).encode())
    return str(place)


def spoil(raw: Path, clips: list[str]) -> dict[str, str]:
    """Plant a fault in each of seven clips; the reason that the ledger should give, by clip."""
    pointer, empty, cut, silent, page, noise, gone = clips
    (raw / f"VideoFlash/{pointer}.flv").write_bytes(LFS)
    (raw / f"AudioWAV/{empty}.wav").write_bytes(b"")
    flv = raw / f"VideoFlash/{cut}.flv"
    write_video(flv, [np.full((48, 64, 3), 90, np.uint8)] * 40, 10)
    flv.write_bytes(flv.read_bytes()[: flv.stat().st_size // 3])
    (raw / f"AudioWAV/{silent}.wav").unlink()
    (raw / f"VideoFlash/{page}.flv").write_bytes(b"<html><body>not found</body></html>")
    (raw / f"VideoFlash/{noise}.flv").write_bytes(bytes(range(256)) * 20)
    (raw / f"VideoFlash/{gone}.flv").unlink()
    return {
        pointer: "git-LFS pointer",
        empty: "zero bytes",
        cut: "cut short",
        silent: "missing file",
        page: "HTML page",
        noise: "undecodable",
        gone: "missing file",
    }
