"""The methods, by the name an experiment gives them."""

from __future__ import annotations

from typing import Any

from counterpoise.methods.agm import AGM
from counterpoise.methods.aug import AUG
from counterpoise.methods.base import Method, MethodConfig, Setting
from counterpoise.methods.di_mml import DIMML
from counterpoise.methods.g_blend import GBlend
from counterpoise.methods.gradient_boosting import GradientBoosting
from counterpoise.methods.joint import Joint
from counterpoise.methods.late import Late
from counterpoise.methods.lfm import LFM
from counterpoise.methods.maie import MAIE
from counterpoise.methods.mla import MLA
from counterpoise.methods.mmcosine import MMCosine
from counterpoise.methods.mmpareto import MMPareto
from counterpoise.methods.mslr import MSLR
from counterpoise.methods.ogm import OGM, OGMGE
from counterpoise.methods.opm import OPM
from counterpoise.methods.pmr import PMR
from counterpoise.methods.reconboost import ReconBoost
from counterpoise.methods.unimodal import Unimodal

METHODS: dict[str, type[Method[Any]]] = {
    "agm": AGM,
    "aug": AUG,
    "di_mml": DIMML,
    "g_blend": GBlend,
    "gradient_boosting": GradientBoosting,
    "joint": Joint,
    "late": Late,
    "lfm": LFM,
    "maie": MAIE,
    "mla": MLA,
    "mmcosine": MMCosine,
    "mmpareto": MMPareto,
    "mslr": MSLR,
    "ogm": OGM,
    "ogm_ge": OGMGE,
    "opm": OPM,
    "pmr": PMR,
    "reconboost": ReconBoost,
    "unimodal": Unimodal,
}

__all__ = ["METHODS", "Method", "MethodConfig", "Setting"]
