"""Plain joint training: one loss on the fused logits.

    L = CE(z, y),   z from the concat head (one Linear over joined features) or the sum head (one Linear each)

Modality predictions are the split logits W_m u_m + b / M of the concat head and the terms of the sum head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from counterpoise.methods.base import HEADS, Method, MethodConfig
from counterpoise.models.heads import Head


class JointConfig(MethodConfig):
    head: Literal["concat", "sum"] = Field("concat", description="how features become fused logits")


class Joint(Method[JointConfig]):
    """Every modality feeds one loss; the strong one wins early and the weak one stays badly trained."""

    Config = JointConfig
    paper = "baseline (naive multimodal learning in Jiang, Huang, Yang, NeurIPS 2025)"
    modality_predictions = "W_m u_m + b / M of the concat head, terms of the sum head: they add up to the fused logits"

    def head(self, widths: Mapping[str, int]) -> Head:
        return HEADS[self.config.head](widths, self.setting.num_classes)
