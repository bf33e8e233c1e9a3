"""The network every method trains: one encoder per modality and a head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from counterpoise.contracts import Batch, InputSpec, Outputs
from counterpoise.functional import derived_seed
from counterpoise.models import compute as computing
from counterpoise.models.compute import Compute
from counterpoise.models.encoders import EncoderConfig, build_encoder
from counterpoise.models.heads import Head


class MultimodalNet(nn.Module):
    """Encoders and head. A forward pass may be limited to some modalities."""

    encoders: nn.ModuleDict
    head: Head

    def __init__(self, encoders: Mapping[str, nn.Module], head: Head, compute: Compute | None = None) -> None:
        super().__init__()
        self.compute = compute or Compute()
        self.encoders = nn.ModuleDict(encoders)
        self.head = head
        self.modalities = tuple(encoders)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """Features [B, D] of a modality's tensor [B, ..], computed as `compute` says. Methods call this."""
        return computing.encode(self.encoders[modality], x, self.compute)

    def forward(self, batch: Batch, modalities: Iterable[str] | None = None) -> Outputs:
        names = self.modalities if modalities is None else tuple(modalities)
        return self.head({name: self.encode(name, batch[name]) for name in names})


def build_network(
    inputs: Mapping[str, InputSpec],
    encoders: Mapping[str, EncoderConfig],
    make_head: Callable[[Mapping[str, int]], Head],
    seed: int,
    pretrained: bool = True,
    compute: Compute | None = None,
) -> MultimodalNet:
    """A freshly initialised network.

    Every part draws from a seed of its own, so that two methods with the same seed start from the same encoders and
    their difference is a paired one.

    pretrained: False leaves weights of files unread, for a network whose weights come from a checkpoint.
    """
    built: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for name, config in encoders.items():
            torch.manual_seed(derived_seed(seed, "encoder", name))
            built[name] = build_encoder(inputs[name], config, pretrained)
        torch.manual_seed(derived_seed(seed, "head"))
        head = make_head({name: int(encoder.width) for name, encoder in built.items()})  # type: ignore[arg-type]
    return MultimodalNet(built, head, compute)
