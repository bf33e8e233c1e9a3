"""The loader that is compared with: what the released code of AUG and OGM-GE does for CREMA-D, item by item.

    sound    read the WAV, resample 16 000 -> 22 050 Hz, repeat it, cut to 20 s, clip to -1..1,
             log(|STFT| + 1e-7) with n_fft 512 and hop 353                                       -> [1, 257, 1250]
    picture  open one frame, RandomResizedCrop(224), RandomHorizontalFlip, ToTensor, Normalize   -> [1, 3, 224, 224]

all of it at every read, in the worker processes of a torch DataLoader.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from counterpoise.contracts import ConfigError, ResourceError
from counterpoise.wording import did_you_mean

RATE, SECONDS, N_FFT, HOP = 22050, 20, 512, 353
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLERS = ("librosa", "scipy")


def chosen_resampler(name: str) -> str:
    """auto is librosa, which the released code calls, where it is installed; else scipy does the same work."""
    there = importlib.util.find_spec("librosa") is not None
    if name == "auto":
        return "librosa" if there else "scipy"
    if name not in RESAMPLERS:
        raise ConfigError(f"--resampler is {name!r}{did_you_mean(name, RESAMPLERS)}; choose auto, librosa or scipy")
    if name == "librosa" and not there:
        raise ResourceError(
            "--resampler librosa: librosa is not installed; run it with "
            "`uv run --with librosa counterpoise bench ingest`, or choose --resampler scipy"
        )
    return name


class ReleasedCremad(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Clips of a raw folder. frames: the folder below it that holds one folder of pictures per clip."""

    def __init__(self, raw: str, clips: list[str], labels: list[int], frames: str, resampler: str) -> None:
        self.raw, self.clips, self.labels = Path(raw), clips, labels
        self.frames, self.resampler = frames, resampler
        self._transform: Any = None

    def __len__(self) -> int:
        return len(self.clips)

    def files(self, item: int) -> tuple[Path, Path]:
        """The sound and the picture that are read for an item."""
        pictures = sorted((self.raw / self.frames / self.clips[item]).iterdir())
        return self.raw / "AudioWAV" / f"{self.clips[item]}.wav", pictures[0]

    def spectrogram(self, path: Path) -> np.ndarray:
        if self.resampler == "librosa":
            import librosa

            wave, _ = librosa.load(path, sr=RATE)
        else:
            import soundfile

            from counterpoise.data.decode import resampled

            wave, rate = soundfile.read(path, dtype="float32")
            wave = resampled(wave, rate, RATE)
        wave = np.tile(wave, SECONDS)[: RATE * SECONDS]
        wave[wave > 1.0] = 1.0
        wave[wave < -1.0] = -1.0
        if self.resampler == "librosa":
            return np.log(np.abs(librosa.stft(wave, n_fft=N_FFT, hop_length=HOP)) + 1e-7)
        from scipy.fft import rfft

        window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)
        padded = np.pad(wave, N_FFT // 2, mode="reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
        return np.log(np.abs(rfft(pieces * window)).T + np.float32(1e-7))

    def picture(self, path: Path) -> torch.Tensor:
        from PIL import Image
        from torchvision import transforms

        if self._transform is None:
            self._transform = transforms.Compose(
                [
                    transforms.RandomResizedCrop(224),
                    transforms.RandomHorizontalFlip(),
                    transforms.ToTensor(),
                    transforms.Normalize(MEAN, STD),
                ]
            )
        with Image.open(path) as image:
            result: torch.Tensor = self._transform(image.convert("RGB"))
        return result

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        sound, picture = self.files(item)
        spectrogram = torch.from_numpy(np.ascontiguousarray(self.spectrogram(sound), dtype=np.float32))
        return spectrogram[None], self.picture(picture)[None], self.labels[item]


def released_loader(dataset: ReleasedCremad, batch_size: int, processes: int) -> DataLoader[Any]:
    """As the released code makes it; workers stay, so that their start does not count in every epoch."""
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=True, num_workers=processes, persistent_workers=processes > 0
    )
