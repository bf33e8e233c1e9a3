"""One modality alone: its encoder and a Linear, CE(z_m, y). The reference row of every table.

The same as joint training with M = 1, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import Field

from counterpoise.contracts import ConfigError
from counterpoise.methods.base import Method, MethodConfig


class UnimodalConfig(MethodConfig):
    modality: str = Field(description="the modality to train on")


class Unimodal(Method[UnimodalConfig]):
    """What a modality reaches when no other one is in its way."""

    Config = UnimodalConfig
    paper = "baseline"
    modality_predictions = "the one head there is"

    @classmethod
    def uses(cls, config: UnimodalConfig, modalities: Sequence[str]) -> tuple[str, ...]:
        if config.modality not in modalities:
            hint = get_close_matches(config.modality, modalities, 1)
            raise ConfigError(
                f"method.modality is {config.modality!r}"
                + (f", did you mean {hint[0]!r}?" if hint else "")
                + f"; modalities of this corpus: {', '.join(modalities)}"
            )
        return (config.modality,)
