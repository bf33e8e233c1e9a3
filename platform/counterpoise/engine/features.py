"""What the encoders of a finished run make of some samples: for pictures of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from counterpoise.config import parse_yaml, resolve
from counterpoise.contracts import LABEL, DataError
from counterpoise.engine.again import selected
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.feed import on_device
from counterpoise.engine.job import chosen_device, open_data
from counterpoise.engine.loop import load_model, make_method, make_network
from counterpoise.engine.run import RunFolder


@dataclass(frozen=True)
class Encoded:
    """Pooled features {modality: [N, D]} and labels [N] of N samples; classes: their names."""

    features: dict[str, npt.NDArray[np.float32]]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


@torch.no_grad()
def encode_run(run: str, split: str = "test", most: int = 600, seed: int = 0, device: str = "auto") -> Encoded:
    """Features of at most `most` samples of a split by the encoders of the epoch that a run selected.

    Which samples is a function of the split's size, `most` and `seed` alone: the same for all runs on a corpus.
    """
    folder = RunFolder.open(run)
    experiment, _ = resolve(parse_yaml(folder.experiment_text, folder.at("experiment.yaml")))
    best, place = selected(folder), torch.device(chosen_device(device))
    data = open_data(experiment, state=folder.manifest.get("preprocessing"))
    try:
        total = data.num_samples(split)
        if not total:
            raise DataError(f"corpus {experiment.corpus} has no {split} split")
        method = make_method(experiment, data, SingleComm())
        net = make_network(experiment, data, method, pretrained=False)
        load_model(net, best)
        net.to(place).eval()
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:most]).tolist()
        parts: dict[str, list[Any]] = {name: [] for name in (LABEL, *net.modalities)}
        for batch in on_device(data, data.batches(split, rows), place):
            parts[LABEL].append(batch[LABEL].cpu().numpy())
            for name in net.modalities:
                parts[name].append(net.encode(name, batch[name]).cpu().numpy())
        if not parts[LABEL]:
            raise DataError(f"corpus {experiment.corpus}: no chosen sample of {split} could be decoded")
        found = {name: np.concatenate(values) for name, values in parts.items()}
        return Encoded({name: found[name] for name in net.modalities}, found[LABEL], tuple(data.classes))
    finally:
        data.close()
