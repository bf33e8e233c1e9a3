"""MAIE: modalities are trained in turns, on flat minima and away from what the one before relies on.

Jiang, Chi, Yang. Multimodal Classification via Modal-Aware Interactive Enhancement. arXiv 2407.04587; MIE in its
text, MAIE in later work. Published as Interactive Multimodal Learning via Flat Gradient Modification (IGM), IJCAI 2025.

Every modality has an encoder and a classifier of its own, Linear(256)-ReLU-Linear(64)-Linear(K), and they alternate in
long stages, each from the best weights so far. A stage trains one modality:

    L = (1 - f) L_mix(w) + f L_mix(w + rho g / |g|)               g the gradient of L_mix: flat minima (SAM)
    L_mix = lam CE(z(x'), y) + (1 - lam) CE(z(x'), y_b)           x' = lam x + (1 - lam) x_b, lam ~ Beta(a, a)

and, from the second stage on, changes the gradient of each Linear of its classifier to G P, with P from the inputs of
the same Linear of the modality that was trained before:

    C = sum over blocks of train rows of f f^T, f the mean input of a block;  C = V diag(s) V^T
    P = V diag(exp(-T (s - min s) / (max s - min s))) V^T

so that what the one before uses most is touched least. Prediction: the mean of the modalities' probabilities.

Differs from the released code: its SAM has a radius of 1e-10, so the second term of L is CE(z(x'), y) at the same
weights, labels not mixed (`sam: released`); here the radius is one over all weights of the modality together, the
second pass is a whole one, and weights and running statistics are as before after it. It compares macro-F1 where it
says accuracy; here accuracy selects. Token inputs are not mixed, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, ConfigError, EpochContext, Outputs, Stage, Step
from counterpoise.methods.base import Method, MethodConfig, Setting, evaluating, global_rows, local_rows
from counterpoise.models.heads import Head
from counterpoise.models.network import MultimodalNet


def damping(covariance: Tensor, temperature: float) -> Tensor:
    """P [D, D] of a covariance C [D, D]: exp(-temperature) along its strongest direction, 1 along the weakest."""
    values, vectors = torch.linalg.eigh(covariance)
    relative = (values - values.min()) / (values.max() - values.min()).clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors * torch.exp(-temperature * relative)) @ vectors.T


def mixup_loss(logits: Tensor, labels: Tensor, partners: Tensor, share: float) -> Tensor:
    """share CE(z, y) + (1 - share) CE(z, y of the partners)."""
    return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)


def mean_of_probabilities(logits: Tensor) -> Tensor:
    """log of the mean over modalities of softmax(z) [M, B, K], as logits [B, K]."""
    return F.log_softmax(logits, dim=-1).logsumexp(dim=0) - float(np.log(len(logits)))


def plan(epochs: int, ratios: Mapping[str, float], rounds: int) -> list[tuple[str, int]]:
    """Whose stage it is, and its epochs: rounds through all modalities, as long as the ratios say.

    As many rounds as leave every stage an epoch; where not even one does, as near to the ratios as that allows.
    """
    names, weights = list(ratios), np.array(list(ratios.values()))
    for count in range(rounds, 0, -1):
        ends = np.rint(epochs * np.cumsum(np.tile(weights / weights.sum() / count, count))).astype(int)
        lengths = np.diff(ends, prepend=0)
        if lengths.min() >= 1:
            return [(names[i % len(names)], int(n)) for i, n in enumerate(lengths)]
    spare = np.rint((epochs - len(names)) * np.cumsum(weights) / weights.sum()).astype(int)
    return [(name, 1 + int(n)) for name, n in zip(names, np.diff(spare, prepend=0), strict=True)]


class DampingLinear(nn.Linear):
    """A Linear with P of its inputs, the identity until its modality was trained."""

    damping: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("damping", torch.eye(inputs))


class AlternatingHead(Head):
    """A deep classifier per modality, no activation before its last layer; probabilities are averaged."""

    def __init__(self, widths: Mapping[str, int], num_classes: int, hidden: int, bottleneck: int) -> None:
        super().__init__(widths, num_classes)
        self.classifiers = nn.ModuleDict()
        for name, width in widths.items():
            self.classifiers[name] = nn.Sequential(
                DampingLinear(width, hidden),
                nn.ReLU(),
                DampingLinear(hidden, bottleneck),
                DampingLinear(bottleneck, num_classes),
            )

    def forward(self, features: dict[str, Tensor]) -> Outputs:
        unimodal = {name: self.classifiers[name](u) for name, u in features.items()}
        complete = len(unimodal) == len(self.modalities)
        fused = mean_of_probabilities(torch.stack([unimodal[m] for m in self.modalities])) if complete else None
        return Outputs(features, unimodal, fused)

    def fuse_present(self, out: Outputs) -> Tensor:
        return mean_of_probabilities(torch.stack([out.unimodal[m] for m in self.present(out)]))

    def linears(self, modality: str) -> list[DampingLinear]:
        return [layer for layer in self.classifiers[modality].children() if isinstance(layer, DampingLinear)]


class MAIEConfig(MethodConfig):
    rounds: int = Field(
        6, ge=1, description="turns of every modality (released, CREMA-D; others 2); ours: fewer where epochs are few"
    )
    lengths: dict[str, float] = Field(
        {},
        description="length of a modality's stages next to the others', 1 for those not named; ours: scaled to the "
        "epochs of the run (released: CREMA-D audio 25, video 50 epochs, NVGesture 50 each)",
    )
    mixup_alpha: float = Field(1.0, ge=0, description="a of Beta(a, a) (released; Twitter 0.9); 0: no mixup")
    flat_weight: float = Field(0.3, ge=0, le=1, description="f, weight of the flat term (released)")
    sam: Literal["full", "released", "none"] = Field(
        "full",
        description="the flat term: at perturbed weights (paper), at the same weights with labels that are not mixed, "
        "which is what the released radius of 1e-10 comes to, or left out",
    )
    radius: float = Field(
        0.05, gt=0, description="rho, length of the perturbation of all weights (ours: usual for SAM)"
    )
    temperature: float = Field(
        0.4, ge=0, description="T: exp(-T) of a gradient is kept in the strongest direction (released); 0: all of it"
    )
    hidden: int = Field(256, gt=0, description="width of a classifier's first layer (released)")
    bottleneck: int = Field(64, gt=0, description="width of a classifier's second layer (released)")


class MAIE(Method[MAIEConfig]):
    """Also MIE and IGM: modalities alternate in long stages, with flat minima and damped gradients."""

    Config = MAIEConfig
    paper = "Jiang, Chi, Yang. IJCAI 2025 (IGM), arXiv 2407.04587 (MIE, MAIE)"
    modality_predictions = "the modality's own classifier"
    beyond_two = "as published (three modalities on NVGesture): stages go round, P is that of the stage before"
    released = (
        "SAM has a radius of 1e-10 and re-runs the classifier alone on unchanged features, with labels that are not "
        "mixed; default is a full SAM of radius 0.05, sam=released gives the other. Macro-F1 stands for accuracy in "
        "its selection; here accuracy selects."
    )
    min_modalities = 2

    def __init__(self, config: MAIEConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        if unknown := set(config.lengths) - set(self.modalities):
            raise ConfigError(
                f"method.lengths names {', '.join(sorted(unknown))}; modalities: {', '.join(self.modalities)}"
            )
        if any(length <= 0 for length in config.lengths.values()):
            raise ConfigError("method.lengths: every modality needs a length above 0")
        if setting.epochs < len(self.modalities):
            raise ConfigError(
                f"maie trains one modality after another: epochs is {setting.epochs}, "
                f"it needs {len(self.modalities)} or more"
            )
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # of L_mix, on this worker, within a step

    def stages(self) -> tuple[Stage, ...]:
        lengths = {m: self.config.lengths.get(m, 1.0) for m in self.modalities}
        return tuple(
            Stage(name, epochs, fresh_optimizer=True, own_schedule=True, begin="best")
            for name, epochs in plan(self.setting.epochs, lengths, self.config.rounds)
        )

    def head(self, widths: Mapping[str, int]) -> Head:
        return AlternatingHead(widths, self.setting.num_classes, self.config.hidden, self.config.bottleneck)

    def _before(self, modality: str) -> str:
        """The modality whose stage comes before that of this one."""
        return self.modalities[self.modalities.index(modality) - 1]

    def begin_epoch(self, net: MultimodalNet, context: EpochContext) -> None:
        """Find P of the modality that was trained before."""
        if context.stage_epoch > 1 or not context.history:
            return
        name, head = self._before(context.stage.name), _head(net)
        layers = head.linears(name)
        sums = [torch.zeros_like(layer.damping, dtype=torch.float64) for layer in layers]
        with evaluating(net):
            for batch in context.batches("train"):
                x = net.encode(name, batch[name])
                for layer in head.classifiers[name].children():
                    if isinstance(layer, DampingLinear):
                        mean = x.mean(dim=0).double()
                        sums[layers.index(layer)] += torch.outer(mean, mean)
                    x = layer(x)
        for layer, total in zip(layers, sums, strict=True):
            covariance = self.comm.sum(total)
            if self.comm.rank == 0:
                layer.damping.copy_(damping(covariance, self.config.temperature))
        self.comm.broadcast_tensors([layer.damping for layer in layers])

    def forward(self, net: MultimodalNet, batch: Batch, step: Step) -> Outputs:
        """One modality, mixed with itself; its losses are in `extra`."""
        config, name, labels = self.config, step.stage.name, batch[LABEL]
        mixed, partners, share = self._mix(batch[name], labels, step)
        out: Outputs = net({name: mixed}, [name])
        loss = mixup_loss(out.unimodal[name], labels, partners, share)
        out.extra["mixup"] = loss
        if config.sam == "released":
            out.extra["flat"] = F.cross_entropy(out.unimodal[name], labels)
        elif config.sam == "full":
            out.extra["mixup"] = loss.detach()
            perturbed = self._perturbed(net, loss, step)
            logits = functional_call(net, perturbed, ({name: mixed}, [name])).unimodal[name]
            out.extra["flat"] = mixup_loss(logits, labels, partners, share)
        return out

    def _mix(self, x: Tensor, labels: Tensor, step: Step) -> tuple[Tensor, Tensor, float]:
        """Inputs mixed with those of their partners, the partners' labels, and the share that is one's own."""
        alpha = self.config.mixup_alpha
        if alpha == 0 or not x.is_floating_point():
            return x, labels, 1.0
        seed = int(torch.randint(2**62, (), generator=step.rng))
        share = float(np.random.default_rng(seed).beta(alpha, alpha))
        order = local_rows(torch.randperm(step.batch_size, generator=step.rng), step, labels)
        others = global_rows(self.comm, x, step)[order]
        return share * x + (1 - share) * others, global_rows(self.comm, labels, step)[order], share

    def _perturbed(self, net: MultimodalNet, loss: Tensor, step: Step) -> dict[str, Tensor]:
        """The weights of the modality in training, moved by `radius` up the gradient of the loss, and buffers to spare.

        Gradients flow through them to the weights themselves. This worker's gradients are kept for `backward`.
        """
        own = f"encoders.{step.stage.name}.", f"head.classifiers.{step.stage.name}."
        named = {name: p for name, p in net.named_parameters() if name.startswith(own) and p.requires_grad}
        local = torch.autograd.grad(loss * step.share, list(named.values()), materialize_grads=True)
        self._gradients = list(zip(named.values(), local, strict=True))
        flat = self.comm.sum(torch.cat([g.reshape(-1) for g in local]))
        move = (flat * (self.config.radius / flat.norm().clamp(min=1e-12))).split([g.numel() for g in local])
        moved = {name: p + e.view_as(p) for (name, p), e in zip(named.items(), move, strict=True)}
        return moved | {name: value.clone() for name, value in net.named_buffers() if name.startswith(own)}

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        if "flat" not in out.extra:
            return {"mixup": out.extra["mixup"]}
        flat = self.config.flat_weight
        return {"mixup": (1 - flat) * out.extra["mixup"], "flat": flat * out.extra["flat"]}

    def backward(self, net: MultimodalNet, losses: Mapping[str, Tensor], step: Step) -> None:
        if self.config.sam != "full":
            return super().backward(net, losses, step)
        (losses["flat"] * step.share).backward()
        for parameter, gradient in self._gradients:
            if parameter.grad is not None:
                parameter.grad.add_(gradient, alpha=1 - self.config.flat_weight)
        self._gradients = []

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Damp the gradients of Linears that have the shape of the same one of the modality before."""
        name, head = step.stage.name, _head(net)
        before, after = [], []
        for mine, theirs in zip(head.linears(name), head.linears(self._before(name)), strict=True):
            if mine.weight.shape == theirs.weight.shape:
                assert mine.weight.grad is not None
                before.append(mine.weight.grad.norm())
                mine.weight.grad.copy_(mine.weight.grad @ theirs.damping)
                after.append(mine.weight.grad.norm())
        kept = torch.stack(after).norm() / torch.stack(before).norm().clamp(min=1e-30)
        return {f"kept/{name}": kept}


def _head(net: MultimodalNet) -> AlternatingHead:
    assert isinstance(net.head, AlternatingHead)
    return net.head
