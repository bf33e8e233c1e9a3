"""One modality alone: its encoder and a Linear, CE(z_m, y). The reference row of every table.

The same as joint training with M = 1, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from counterpoise.contracts import ConfigError
from counterpoise.methods.base import Method, MethodConfig
from counterpoise.wording import did_you_mean


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
            raise ConfigError(
                f"method.modality is {config.modality!r}{did_you_mean(config.modality, modalities)}; "
                f"modalities of this corpus: {', '.join(modalities)}"
            )
        return (config.modality,)
