"""`counterpoise bench all`: the measurements that say how fast this installation is, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from counterpoise.bench import epoch, ingest, scaling, step
from counterpoise.bench.released import chosen_resampler

Say = Callable[[str], None]
CREMAD, SMALL = ((257, 1250), (224, 224)), ((64, 64), (64, 64))  # spectrogram and picture
COUNTS = (1, 5, 11)  # classifiers of the weak modality


def measure_all(out: str, against: str | None, compute: Mapping[str, Any], device: str, *, say: Say, show: Say) -> None:
    """Leaves NAME.json for each in the folder `out`, and shows its table. The corpus that is made stays there too."""
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)

    def steps(shapes: tuple[tuple[int, int], tuple[int, int]], batch_size: int, rounds: int) -> dict[str, Any]:
        audio, image = shapes
        return step.step_ratio(
            "resnet18", batch_size, audio, image, COUNTS, rounds, None, device,
            say=say, compute=compute, against=against, floor=True,
        )  # fmt: skip

    def reading() -> dict[str, Any]:
        return ingest.ingest_rates(
            rows=96, processes=2, rounds=3, out=str(folder), s3=ingest.has_moto(), resampler="auto", waiting=False,
            say=say,
        )  # fmt: skip

    def epochs() -> dict[str, Any]:
        return epoch.epoch_rates(
            rows=48, batch_size=8, classifiers=5, processes=2, threads=None, rounds=3, device=device, compute=compute,
            cache="off", against=against, resampler=chosen_resampler("auto"), out=str(folder), say=say, guards=True,
        )  # fmt: skip

    def workers() -> dict[str, Any]:
        return scaling.scaling(
            encoder="resnet18", batch_size=32, audio=SMALL[0], image=SMALL[1], workers=(1, 2, 4), steps=2, rounds=5,
            device=device, compute=compute, batch_norm="sync", say=say,
        )  # fmt: skip

    parts: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
        "step-small": (lambda: steps(SMALL, 8, 20), step.render),
        "step-cremad": (lambda: steps(CREMAD, 2, 5), step.render),
        "ingest": (reading, ingest.render),
        "epoch": (epochs, epoch.render),
        "scaling": (workers, scaling.render),
    }
    for name, (measure, render) in parts.items():
        say(f"measuring: {name}")
        found = measure()
        (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        show(f"{name}\n{render(found)}\n")
