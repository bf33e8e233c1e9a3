"""The frame of a method: hooks with defaults that train the plain joint model.

A method is one file: the formula in its docstring, a pure function that is the formula, a config, and a class that
overrides as few hooks as it needs. Then its row in `methods/__init__.py`.

Rules with a reason:
- Losses are ordinary means over this worker's samples. The loop scales them by the worker's share of the global
  batch and sums gradients over workers, so results do not depend on how a batch was split.
- Statistics of a batch are summed with `self.comm.sum` before any ratio is formed.
- Anything non-linear in gradients belongs into `adjust`, which sees gradients already summed over workers.
- Anything random that replicas must agree on draws from `step.rng`.
- Parameters appear only in `head`, `attach` and `apply`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, Decision, EpochStats, Outputs, Step
from counterpoise.models.heads import ConcatHead, Head, SumHead
from counterpoise.models.network import MultimodalNet


class MethodConfig(BaseModel):
    """Base of every method's config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


C = TypeVar("C", bound=MethodConfig)

HEADS: dict[str, type[Head]] = {"concat": ConcatHead, "sum": SumHead}  # those that need no further arguments


@dataclass(frozen=True)
class Setting:
    """What a method knows about the run it is part of."""

    modalities: tuple[str, ...]
    num_classes: int
    epochs: int
    seed: int


class Method(Generic[C]):
    """One way to train a multimodal network. Instances live as long as a run, on every worker."""

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str] = ""
    min_modalities: ClassVar[int] = 1

    def __init__(self, config: C, setting: Setting, comm: Comm) -> None:
        self.config = config
        self.setting = setting
        self.modalities = setting.modalities
        self.comm = comm

    @classmethod
    def uses(cls, config: Any, modalities: Sequence[str]) -> tuple[str, ...]:
        """The modalities of the corpus that this method trains on; all of them unless it says otherwise."""
        return tuple(modalities)

    # --- before training

    def head(self, widths: Mapping[str, int]) -> Head:
        """The head that this method trains."""
        return ConcatHead(widths, self.setting.num_classes)

    def attach(self, net: MultimodalNet) -> None:
        """Add what is trained besides the network; runs before the optimizer exists."""

    def lr_scales(self, net: MultimodalNet) -> Mapping[nn.Parameter, float]:
        """Factors on the learning rate of single parameters; 1 for those not named."""
        return {}

    def begin_epoch(self, net: MultimodalNet, epoch: int) -> None:
        """Called on every worker before the first batch of an epoch, not when an epoch is resumed."""

    # --- one batch

    def phases(self, epoch: int) -> tuple[str, ...]:
        """The updates made for every batch, in order."""
        return ("joint",)

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        return net(batch)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Named scalars, means over this worker's samples; their sum is minimised."""
        assert out.fused is not None, "the default loss needs all modalities in one pass"
        return {"fused": F.cross_entropy(out.fused, batch[LABEL])}

    def backward(self, net: MultimodalNet, losses: Mapping[str, Tensor], step: Step) -> None:
        """Fill the gradients with this worker's share of those of the summed losses."""
        (torch.stack(list(losses.values())).sum() * step.share).backward()

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Rework gradients, which are already summed over workers; returns coefficients to plot."""
        return {}

    def end_batch(self, net: MultimodalNet, step: Step) -> None:
        """Called after the last update of a batch."""

    # --- predictions

    def fuse(self, net: MultimodalNet, out: Outputs) -> Tensor:
        """Logits of all modalities together [B, K]; `out` may have been put together from several phases."""
        if out.fused is not None:
            return out.fused
        return torch.stack([out.unimodal[m] for m in self.modalities]).sum(dim=0)

    # --- between epochs

    def decide(self, history: Sequence[EpochStats]) -> Decision | None:
        """A change of course after the last epoch of `history`. Pure; runs on rank 0 only."""
        return None

    def apply(self, net: MultimodalNet, decision: Decision) -> None:
        """Carry a decision out, the same on every worker."""

    def num_classifiers(self, net: MultimodalNet) -> dict[str, int]:
        """Classifiers per modality, for methods that have a varying number of them."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-like state that resuming needs besides the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"{type(self).__name__} has no state, the checkpoint has {sorted(state)}"
