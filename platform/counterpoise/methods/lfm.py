"""LFM: learning the modality gap. Joint training plus an alignment of the modalities' class probabilities.

Yang, Wan, Jiang, Xu. Facilitating Multimodal Classification via Dynamically Learning Modality Gap. NeurIPS 2024.

    z = mean_m z_m                                   one Linear per modality
    L = 2 (a1 CE(z, y) + a2 A),   a1 + a2 = 1        A: Jensen-Shannon divergence of p_1 and p_2
    JS(p, q) = (KL(p || c) + KL(q || c)) / 2,  c = (p + q) / 2

Alignment rules at first (a1 = 0.2046), so that modalities fit the labels at one pace; then the labels take over. a1 is

    fitted    a polynomial in the epoch that the authors fitted to what they learned; theirs runs over 200 epochs and
              is stretched to the run, and held at 1 where it exceeds it (by 0.01, near the end)
    linear    from `first` to `last`;    constant    `first`
    learned   a1 <- clamp(a1 + rate 2 <g_held, g_CE - g_A>, 0.05, 0.95) after every epoch, the rate halved every 20
              epochs. g: gradients at the present weights, of CE on 16 held-out samples, and of CE and A on 64 training
              samples. By the chain rule this is minus the gradient by a1 of the held-out CE after one infinitesimal
              step on L, in units of its learning rate.

Differs from the released code in the divergence, whose arguments it swaps: (KL(c || p) + KL(c || q)) / 2
(`alignment: swapped`), and in the learned schedule: it multiplies the Hessian with g_CE and takes the mean over the
entries of the first parameter only, which is no derivative by a1, and starts from a1 = 0.05. Held out means of the
valid split here; the released code takes 16 samples out of the training set. The text speaks of contrastive learning,
the released code aligns class probabilities, as here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, EpochContext, Outputs, Step
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.models.heads import Head, SumHead
from counterpoise.models.network import MultimodalNet

FITTED = (2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11)
FITTED_EPOCHS = 200
LOWEST, HIGHEST = 0.05, 0.95  # of a learned a1
HELD_OUT, TRAINING = 16, 64  # samples for a step of a learned a1
HALVED_EVERY = 20


def alignment(logits: Sequence[Tensor], form: str = "jensen_shannon") -> Tensor:
    """A of every sample [B]: the divergence of the class probabilities of M >= 2 modalities, mean over their pairs.

    logits: [B, K] each. form: "jensen_shannon", or "swapped", the sum over KL(c || p) instead of KL(p || c).
    """
    log_p = [F.log_softmax(z, dim=-1) for z in logits]
    pairs = [
        _swapped(p, q) if form == "swapped" else _jensen_shannon(p, q) for p, q in itertools.combinations(log_p, 2)
    ]
    return torch.stack(pairs).mean(dim=0)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_c = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_c) + log_q.exp() * (log_q - log_c)).sum(dim=-1) / 2


def _swapped(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_c = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_c.exp() * (log_c - (log_p + log_q) / 2)).sum(dim=-1)


def scheduled_weight(schedule: str, epoch: int, epochs: int, first: float, last: float) -> float:
    """a1 of an epoch (1-based) of a run of `epochs`."""
    if schedule == "fitted":
        place = (epoch - 1) * FITTED_EPOCHS / epochs
        return min(1.0, sum(c * place**power for power, c in enumerate(FITTED)))
    if schedule == "linear":
        return first + (last - first) * (epoch - 1) / max(epochs - 1, 1)
    return first


def learned_weight(weight: float, slope: float, rate: float, epoch: int) -> float:
    """a1 after epoch `epoch` (1-based) from that of the epoch, and from 2 <g_held, g_CE - g_A>."""
    moved = weight + rate * 0.5 ** (epoch // HALVED_EVERY) * slope
    return min(max(moved, LOWEST), HIGHEST)


class MeanHead(SumHead):
    """One Linear per modality; the fused logits are the mean of the modalities' logits."""

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        out = super().forward(features)
        out.fused = None if out.fused is None else out.fused / len(self.modalities)
        return out

    def fuse_present(self, out: Outputs) -> Tensor:
        return super().fuse_present(out) / len(self.present(out))


class LFMConfig(MethodConfig):
    schedule: Literal["fitted", "linear", "constant", "learned"] = Field(
        "fitted", description="where a1, the weight of the labels, comes from (released: fitted)"
    )
    first: float = Field(
        0.2046, ge=0, le=1, description="a1 at the start unless fitted (released: 0.2046 where fitted, 0.05 if learned)"
    )
    last: float = Field(0.95, ge=0, le=1, description="a1 of the last epoch if linear (ours)")
    rate: float = Field(
        0.01, gt=0, description="learning rate of a learned a1 (ours; released: 1e-4, for another quantity)"
    )
    alignment: Literal["jensen_shannon", "swapped"] = Field(
        "jensen_shannon", description="Jensen-Shannon divergence (paper), or with swapped arguments (released)"
    )


class LFM(Method[LFMConfig]):
    """Modalities are drawn to equal class probabilities, strongly at first and ever less."""

    Config = LFMConfig
    paper = "Yang, Wan, Jiang, Xu. NeurIPS 2024"
    modality_predictions = "the terms z_m, whose mean is the fused prediction"
    beyond_two = "ours: the alignment is the mean over all pairs of modalities"
    released = (
        "Swaps the arguments of the divergence; the default is Jensen-Shannon, alignment=swapped gives the released "
        "one. Its fitted a1 is the default, held at 1 where it exceeds it. Its learned a1 moves by a quantity that is "
        "no derivative of the held-out loss; schedule=learned follows one, and no setting gives the released quantity."
    )
    min_modalities = 2

    def __init__(self, config: LFMConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        self.weight = config.first  # a1, where it is learned

    def head(self, widths: Mapping[str, int]) -> Head:
        return MeanHead(widths, self.setting.num_classes)

    def label_weight(self, epoch: int) -> float:
        """a1 of an epoch."""
        config = self.config
        if config.schedule == "learned":
            return self.weight
        return scheduled_weight(config.schedule, epoch, self.setting.epochs, config.first, config.last)

    def terms(self, out: Outputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        """CE and A, sums over the samples."""
        assert out.fused is not None
        apart = alignment([out.unimodal[m] for m in self.modalities], self.config.alignment)
        return F.cross_entropy(out.fused, labels, reduction="sum"), apart.sum()

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        weight, rows = self.label_weight(step.epoch), len(batch[LABEL])
        fused, apart = self.terms(out, batch[LABEL])
        return {"fused": 2 * weight * fused / rows, "alignment": 2 * (1 - weight) * apart / rows}

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {"label_weight": torch.tensor(self.label_weight(step.epoch), device=batch[LABEL].device)}

    def end_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        if self.config.schedule != "learned":
            return
        last = context.history[-1]
        split: Literal["train", "valid"] = "valid" if last.valid else "train"
        held = self._gradients(net, context.batches(split, min(1.0, HELD_OUT / last.held_out.samples)))
        train = self._gradients(net, context.batches("train", min(1.0, TRAINING / last.train.samples)))
        slope = 2 * torch.dot(held[0], train[0] - train[1])
        self.weight = self.comm.broadcast(learned_weight(self.weight, slope.item(), self.config.rate, context.epoch))

    def _gradients(self, net: MultimodalNet, batches: Iterable[Batch]) -> Tensor:
        """Gradients of the mean CE and of the mean A over the samples of all workers [2, parameters]."""
        parameters = [p for p in net.parameters() if p.requires_grad]
        total = torch.zeros(2, sum(p.numel() for p in parameters) + 1, device=parameters[0].device)
        training = net.training
        net.eval()  # no dropout, and running statistics stay
        for batch in batches:
            terms = self.terms(net(batch), batch[LABEL])
            for row, term in zip(total, terms, strict=True):
                found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
                row += torch.cat([*(g.flatten() for g in found), row.new_tensor([len(batch[LABEL])])])
        net.train(training)
        total = self.comm.sum(total)
        return total[:, :-1] / total[:, -1:]

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight} if self.config.schedule == "learned" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight = float(state.get("weight", self.weight))
