"""MMPareto: single-modality losses that help an encoder without pulling against the joint loss.

Wei, Hu. MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance. ICML 2024.

    L_mm = CE(z, y) of the joint head,  L_m = CE(z_m, y) of a private head per modality
    heads: gradient of L_mm + sum_m L_m
    encoder m, with g = grad L_mm and h = grad L_m, each over all its parameters as one vector:
        a = 1/2                                             if g.h > 0 (they agree)
        a = clip((|h|^2 - g.h) / |g - h|^2, .001, .999)     otherwise: the shortest vector between g and h
        d = 2 a g + 2 (1 - a) h
        gradient of a tensor = gamma d max(|g + h| / |d|, 1),  norms of that tensor

Gradients meet after they were summed over workers: the smallest norm of sums is not the sum of smallest norms. A
tensor whose d vanishes keeps d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Comm, Outputs, Step
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.models.heads import Head, MultiHead
from counterpoise.models.network import MultimodalNet

TINY = torch.finfo(torch.float32).tiny


def joint_share(gg: Tensor, hh: Tensor, gh: Tensor) -> Tensor:
    """a, the share of the joint gradient g, from the inner products |g|^2, |h|^2 and g.h."""
    shortest = (hh - gh) / (gg + hh - 2 * gh).clamp_min(TINY)
    return torch.where(gh > 0, torch.full_like(gh, 0.5), shortest.clamp(0.001, 0.999))


def pareto_gradients(
    joint: Sequence[Tensor], own: Sequence[Tensor], gamma: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradient of every tensor of an encoder from those of the joint and its own loss; a; their cosine."""
    gg, hh, gh = (
        torch.stack([(left * right).sum() for left, right in zip(one, other, strict=True)]).sum()
        for one, other in ((joint, joint), (own, own), (joint, own))
    )
    share = joint_share(gg, hh, gh)
    made = []
    for g, h in zip(joint, own, strict=True):
        direction = 2 * share * g + 2 * (1 - share) * h
        norm = direction.norm()
        stretch = torch.where(norm > 0, (g + h).norm() / norm.clamp_min(TINY), torch.ones_like(norm))
        made.append(gamma * stretch.clamp_min(1) * direction)
    return made, share, gh / (gg.sqrt() * hh.sqrt()).clamp_min(TINY)


class MMParetoConfig(MethodConfig):
    gamma: float = Field(1.5, gt=0, description="length of the update, conflict or not (released: a constant 1.5)")


class MMPareto(Method[MMParetoConfig]):
    """Every encoder follows a direction that lowers the joint loss and its own, at no smaller a length."""

    Config = MMParetoConfig
    paper = "Wei, Hu. ICML 2024"
    modality_predictions = "a private Linear per modality"
    beyond_two = "as published: one problem of two objectives per encoder, with a closed form whatever M is"
    released = (
        "Same update. The released script builds a schedule of the learning rate but never steps it, so its rate of "
        "2e-3 is constant; here optim.schedule does what it says, and optim.schedule.name=constant gives the other."
    )
    min_modalities = 2

    def __init__(self, config: MMParetoConfig, setting: Setting, comm: Comm) -> None:
        super().__init__(config, setting, comm)
        self._own = torch.empty(0)  # gradients of the modalities' own losses, all encoders in one vector

    def head(self, widths: Mapping[str, int]) -> Head:
        return MultiHead(widths, self.setting.num_classes)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        own = {name: F.cross_entropy(logits, batch[LABEL]) for name, logits in out.unimodal.items()}
        return super().losses(out, batch, step) | own

    def backward(self, net: MultimodalNet, losses: Mapping[str, Tensor], step: Step) -> None:
        """Into .grad: of the joint loss for encoders, of all losses for heads. Own gradients wait for `adjust`."""
        encoders = {name: trained(net.encoders[name]) for name in self.modalities}
        head = trained(net.head)
        joint = [*head, *(p for parameters in encoders.values() for p in parameters)]
        for parameter, gradient in zip(joint, _gradients(losses["fused"], joint, step), strict=True):
            parameter.grad = gradient
        own = []
        for name, parameters in encoders.items():
            gradients = _gradients(losses[name], [*head, *parameters], step)
            for parameter, gradient in zip(head, gradients, strict=False):
                assert parameter.grad is not None
                parameter.grad += gradient
            own += [gradient.reshape(-1) for gradient in gradients[len(head) :]]
        self._own = torch.cat(own) if own else torch.empty(0)

    def adjust(self, net: MultimodalNet, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        encoders = {name: trained(net.encoders[name]) for name in self.modalities}
        sizes = [p.numel() for parameters in encoders.values() for p in parameters]
        own = iter(self.comm.sum(self._own).split(sizes))
        self._own = torch.empty(0)
        coefficients = {}
        for name, parameters in encoders.items():
            if not parameters:
                continue
            g = [p.grad for p in parameters if p.grad is not None]
            h = [next(own).view_as(p) for p in parameters]
            made, coefficients[f"joint_share/{name}"], coefficients[f"cosine/{name}"] = pareto_gradients(
                g, h, self.config.gamma
            )
            for parameter, gradient in zip(parameters, made, strict=True):
                parameter.grad = gradient
        return coefficients


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], step: Step) -> tuple[Tensor, ...]:
    """This worker's share of the gradients of one loss; zeros where it does not reach. The graph stays."""
    return torch.autograd.grad(loss * step.share, parameters, retain_graph=True, materialize_grads=True)
