"""Late fusion without interaction: every modality has its own loss.

L = sum_m CE(z_m, y),   prediction: sum_m z_m
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Batch, Outputs, Step
from counterpoise.methods.base import Method, MethodConfig
from counterpoise.models.heads import Head, SumHead


class LateConfig(MethodConfig):
    pass


class Late(Method[LateConfig]):
    """Modalities train side by side and meet only in the prediction."""

    Config = LateConfig
    paper = "baseline"
    modality_predictions = "the terms z_m"

    def head(self, widths: Mapping[str, int]) -> Head:
        return SumHead(widths, self.setting.num_classes)

    def losses(self, out: Outputs, batch: Batch, step: Step) -> dict[str, Tensor]:
        return {name: F.cross_entropy(logits, batch[LABEL]) for name, logits in out.unimodal.items()}
