"""Linear probes: what a modality's encoder knows, read by the same small classifier for every method.

Heads of different methods were trained differently, so their accuracies per modality do not compare across rows; a
Linear trained on frozen features does. ReconBoost's authors report their modalities this way (100 epochs of SGD with
learning rate 0.01).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import Batch, Comm, DataSource
from counterpoise.engine.evaluate import Predictions, gather_rows
from counterpoise.functional import derived_seed, seeded_generator
from counterpoise.models.heads import linear
from counterpoise.models.network import MultimodalNet

EPOCHS, LR, MOMENTUM, WEIGHT_DECAY, BATCH_SIZE = 100, 0.01, 0.9, 1e-4, 64


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> torch.nn.Linear:
    """A Linear trained on features [N, D] and labels [N] by cross-entropy; a pure function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "probe"))
        probe = linear(features.shape[1], num_classes)
    probe.to(features.device)
    order = seeded_generator(seed, "probe order")
    optimizer = torch.optim.SGD(probe.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features), generator=order).to(features.device).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(probe(features[rows]), labels[rows]).backward()
            optimizer.step()
    return probe


def probe_logits(
    net: MultimodalNet,
    train: DataSource,
    data: DataSource,
    split: str,
    comm: Comm,
    device: torch.device,
    seed: int,
) -> dict[str, npt.NDArray[np.float32]]:
    """Logits [N, K] per modality for the decodable rows of `split`, of probes fitted to the train split of `train`.

    Every worker takes part in reading; rank 0 alone fits, the others get {}.
    """
    rows, known = _features(net, train, "train", comm, device)
    _, asked = _features(net, data, split, comm, device)
    if comm.rank != 0:
        return {}
    labels = torch.as_tensor(np.asarray(train.labels("train"))[rows], device=device)
    found = {}
    for name, features in known.items():
        probe = fit_linear(features, labels, len(train.classes), seed)
        with torch.no_grad():
            found[name] = probe(asked[name]).cpu().numpy()
    return found


def _features(
    net: MultimodalNet, data: DataSource, split: str, comm: Comm, device: torch.device
) -> tuple[npt.NDArray[np.int64], dict[str, Tensor]]:
    def encode(batch: Batch) -> dict[str, Tensor]:
        return {name: net.encode(name, batch[name]) for name in net.modalities}

    net.eval()
    return gather_rows(encode, data, split, comm, device)


def with_probes(found: Predictions, logits: dict[str, Any], replace: bool) -> Predictions:
    """Predictions with those of probes as parts `<modality>/probe`, or in place of the modalities' own."""
    more = {name if replace else f"{name}/probe": z for name, z in logits.items()}
    return Predictions(found.rows, found.labels, {**found.logits, **more})
