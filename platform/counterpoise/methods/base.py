"""The frame of a method: hooks with defaults that train the plain joint model.

A method is one file: the formula in its docstring, a pure function that is the formula, a config, and a class that
overrides as few hooks as it needs. Then its row in `methods/__init__.py`.

Rules with a reason:
- Losses are ordinary means over this worker's samples. The loop scales them by the worker's share of the global
  batch and sums gradients over workers, so results do not depend on how a batch was split.
- Statistics of a batch are summed with `self.comm.sum` before any ratio is formed.
- Anything non-linear in gradients belongs into `adjust`, which sees gradients already summed over workers.
- Anything random draws from `step.rng`, for the whole global batch, of which a worker takes its rows
  (`local_rows`); what needs the rows of all workers gets them from `global_rows`.
- Parameters and buffers appear only in `head` and `attach`; what a method remembers is a buffer (in checkpoints by
  itself) or in `state_dict`.
- Hooks run on every worker in the same order, and so do the collectives in them. `decide` runs on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, Decision, EpochContext, EpochStats, Outputs, Stage, Step
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
    """One way to train a multimodal network. Instances live as long as a run, on every worker.

    paper: authors and venue. modality_predictions: where the logits of a modality come from. beyond_two: how the
    method works with more than two modalities, and whose idea that is. released: where the authors' code departs
    from their paper, which of both is the default here, and the setting that gives the other.
    """

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str] = ""
    modality_predictions: ClassVar[str] = "terms of the head"
    beyond_two: ClassVar[str] = "any number of modalities, as published"
    released: ClassVar[str] = ""
    min_modalities: ClassVar[int] = 1
    probe: ClassVar[bool] = False  # modality predictions of the tested epoch are linear probes on frozen encoders

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

    def lr_groups(self, net: MultimodalNet) -> Mapping[str, Sequence[nn.Parameter]]:
        """Parameters whose learning rate is scaled, by the name of their group."""
        return {}

    def lr_scales(self) -> Mapping[str, float]:
        """Factors on the learning rate of groups, asked before every epoch; 1 for those not named."""
        return {}

    def stages(self) -> tuple[Stage, ...]:
        """What the epochs of a run are for. Those not aside are `setting.epochs` together: the budget of all methods.

        The last stage is selectable and not aside.
        """
        return (Stage("train", self.setting.epochs),)

    # --- around an epoch

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        """Called on every worker before the first batch of an epoch, not when an epoch is resumed."""

    def before_evaluation(self, net: MultimodalNet, context: EpochContext) -> None:
        """Called on every worker after the last batch of an epoch; what it changes is evaluated and may be selected."""

    def end_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        """Called on every worker after an epoch and its evaluation, before `decide`."""

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

    def predict(self, net: MultimodalNet, batch: Batch, missing: Collection[str] = ()) -> Outputs:
        """The forward pass of an evaluation: logits of every modality, and what `fuse` needs.

        missing: modalities that are not there, at most all but one. Their tensors in `batch` say nothing but their
        shape; `out` has no logits of them, and `out.fused` is what the head makes of the others (`fuse_present`).
        """
        if not missing:
            return net(batch)
        out: Outputs = net(batch, [m for m in self.modalities if m not in missing])
        out.fused = net.head.fuse_present(out)
        return out

    def parts(self, net: MultimodalNet, out: Outputs) -> dict[str, Tensor]:
        """Further predictions [B, K] worth a number in the results, e.g. {"audio/first": logits}."""
        return {}

    def fuse(self, net: MultimodalNet, out: Outputs) -> Tensor:
        """Logits of all modalities together [B, K].

        `out` may have been put together from several phases; modalities that are missing in a prediction are not in it.
        """
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

    def classifier_weights(self, net: MultimodalNet) -> dict[str, list[float]]:
        """What each classifier of a modality counts in its logits, in order; for methods where that is not 1."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-like state that resuming needs besides the network."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state, f"{type(self).__name__} has no state, the checkpoint has {sorted(state)}"


# --- for methods to use


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, then the mode from before: no_grad alone would move running statistics."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in before:
            part.training = mode


def local_rows(rows: Tensor, step: Step, like: Tensor) -> Tensor:
    """This worker's rows of something that has one per sample of the global batch, on the device of `like` [B, ..]."""
    return rows[step.start : step.start + len(like)].to(like.device)


def global_rows(comm: Comm, rows: Tensor, step: Step) -> Tensor:
    """Rows of all workers in the order of the global batch, without gradient: [B_local, ..] -> [B, ..]."""
    if comm.world == 1:
        return rows.detach()
    whole = rows.new_zeros(step.batch_size, *rows.shape[1:])
    whole[step.start : step.start + len(rows)] = rows.detach()
    return comm.sum(whole)
