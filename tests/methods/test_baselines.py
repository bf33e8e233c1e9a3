from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest
import torch
from pydantic import BaseModel
from torch.nn import functional as F

from counterpoise.contracts import ConfigError, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods import METHODS
from counterpoise.methods.base import Setting
from counterpoise.methods.describe import describe
from counterpoise.methods.joint import Joint, JointConfig
from counterpoise.methods.late import Late, LateConfig
from counterpoise.methods.unimodal import Unimodal, UnimodalConfig
from counterpoise.models.heads import ConcatHead, SumHead
from counterpoise.models.network import MultimodalNet

SETTING = Setting(("audio", "video"), 3, 4, 0)
WIDTHS = {"audio": 2, "video": 4}


def step() -> Step:
    return Step(1, 0, 0, "joint", 5, 1.0, torch.Generator())


@pytest.mark.parametrize(("head", "kind"), [("concat", ConcatHead), ("sum", SumHead)])
def test_joint_training_has_either_head_and_one_loss(head: str, kind: type) -> None:
    joint = Joint(JointConfig(head=head), SETTING, SingleComm())  # type: ignore[arg-type]
    made = joint.head(WIDTHS)
    assert type(made) is kind
    out = made({"audio": torch.randn(5, 2), "video": torch.randn(5, 4)})
    labels = torch.randint(3, (5,))
    losses = joint.losses(out, {"label": labels}, step())
    assert out.fused is not None
    assert list(losses) == ["fused"] and losses["fused"].equal(F.cross_entropy(out.fused, labels))


def test_late_fusion_has_a_loss_per_modality_and_predicts_their_sum() -> None:
    late = Late(LateConfig(), SETTING, SingleComm())
    head = late.head(WIDTHS)
    net = MultimodalNet({m: torch.nn.Identity() for m in WIDTHS}, head)
    out = net({"audio": torch.randn(5, 2), "video": torch.randn(5, 4)})
    labels = torch.randint(3, (5,))
    losses = late.losses(out, {"label": labels}, step())
    assert {name: round(value.item(), 5) for name, value in losses.items()} == {
        name: round(F.cross_entropy(out.unimodal[name], labels).item(), 5) for name in WIDTHS
    }
    torch.testing.assert_close(late.fuse(net, out), out.unimodal["audio"] + out.unimodal["video"])


def test_unimodal_training_uses_its_modality_only() -> None:
    assert Unimodal.uses(UnimodalConfig(modality="video"), ["audio", "video"]) == ("video",)
    with pytest.raises(ConfigError, match=r"'vidoe', did you mean 'video'\?; modalities of this corpus: audio, video"):
        Unimodal.uses(UnimodalConfig(modality="vidoe"), ["audio", "video"])


SOURCES = re.compile(r"\b(paper|released|authors|ours|BalanceMM|Eq\.|Table|baseline)")


def leaves(config: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for key, field in config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind)
        else:
            yield key, field.description or ""


@pytest.mark.parametrize("name", METHODS)
def test_methods_describe_themselves(name: str) -> None:
    method = METHODS[name]
    page = describe(name, method)
    assert method.__doc__ and method.paper and method.modality_predictions and method.beyond_two
    for text in (method.modality_predictions, method.beyond_two, method.released):
        assert " ".join(text.split()) in " ".join(page.split())
    assert (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0] in page
    for key, description in leaves(method.Config):
        assert f"{key} = " in page and " ".join(description.split()) in " ".join(page.split())
        if name not in ("joint", "late", "unimodal"):
            assert SOURCES.search(description), f"{name}.{key} does not say where its default comes from"


def test_generalisations_that_are_ours_are_marked() -> None:
    """Methods that were published as a comparison of two modalities."""
    for name in ("ogm", "ogm_ge", "opm", "pmr"):
        if name in METHODS:
            assert METHODS[name].beyond_two.startswith("ours: "), name
