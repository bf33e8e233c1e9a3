"""MMCosine: cosines instead of products, so that no modality wins by the length of its features or weights.

Xu, Feng, Zhang, Hu. MMCosine: Multi-Modal Cosine Loss Towards Balanced Audio-Visual Fine-Grained Learning. ICASSP 2023.

    z_m,k = s cos(W_m,k, u_m)          features and class weights of every modality have length 1, no bias
    L     = CE(sum_m z_m, y)

In a plain network |W_m| grows fastest for the modality that is learned first, and with it that modality's part of the
sum. Here every modality can add at most s to a class.

Differs from the released code, which trains on cosines but evaluates the fused prediction on CREMA-D with the products
W_m u_m of the same weights; here both are cosines (`prediction: product` gives the released behaviour).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import Batch, Outputs
from counterpoise.methods.base import Method, MethodConfig
from counterpoise.models.heads import Head, SumHead
from counterpoise.models.network import MultimodalNet


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """s cos(W_k, u) for features u [B, D] and class weights W [K, D]: [B, K]."""
    return scale * F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))


class CosineHead(SumHead):
    """The sum head with scaled cosines as terms. Its biases take no part and stay 0."""

    def __init__(self, widths: Mapping[str, int], num_classes: int, scale: float) -> None:
        super().__init__(widths, num_classes)
        self.scale = scale

    def term(self, modality: str, features: Tensor) -> Tensor:
        return cosine_logits(features, self.linears[modality].get_parameter("weight"), self.scale)


class MMCosineConfig(MethodConfig):
    scale: float = Field(10.0, gt=0, description="s (released: 10 on CREMA-D); more classes need a larger one")
    prediction: Literal["cosine", "product"] = Field(
        "cosine", description="fused logits of an evaluation: as in training (paper), or W_m u_m (released)"
    )


class MMCosine(Method[MMCosineConfig]):
    """Features and class weights of every modality are brought to length 1 before they meet."""

    Config = MMCosineConfig
    paper = "Xu, Feng, Zhang, Hu. ICASSP 2023"
    modality_predictions = "the terms s cos(W_m, u_m), which add up to the fused logits"
    beyond_two = "ours: the sum has one term per modality"
    released = (
        "Evaluates the fused prediction on CREMA-D with products instead of cosines, a mistake; here both are cosines, "
        "and prediction=product gives the released behaviour."
    )

    def head(self, widths: Mapping[str, int]) -> Head:
        return CosineHead(widths, self.setting.num_classes, self.config.scale)

    def predict(self, net: MultimodalNet, batch: Batch, missing: Collection[str] = ()) -> Outputs:
        out = super().predict(net, batch, missing)
        if self.config.prediction == "product":
            assert isinstance(net.head, CosineHead)
            products = [SumHead.term(net.head, name, u) for name, u in out.features.items()]
            out.fused = torch.stack(products).sum(dim=0)
        return out
