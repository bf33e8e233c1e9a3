"""MMCosine against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoise.contracts import LABEL, Step
from counterpoise.engine.comm import SingleComm
from counterpoise.methods.base import Setting
from counterpoise.methods.mmcosine import CosineHead, MMCosine, MMCosineConfig, cosine_logits
from counterpoise.models.network import MultimodalNet

WIDTHS = {"audio": 2, "video": 3}


def make(**config: Any) -> tuple[MMCosine, MultimodalNet]:
    method = MMCosine(MMCosineConfig(**config), Setting(tuple(WIDTHS), 2, 4, 0), SingleComm())
    torch.manual_seed(0)
    return method, MultimodalNet({m: nn.Identity() for m in WIDTHS}, method.head(WIDTHS))


def make_batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {m: torch.randn(5, d, generator=rng) for m, d in WIDTHS.items()} | {LABEL: torch.tensor([0, 1, 1, 0, 1])}


def test_logits_are_scaled_cosines() -> None:
    """u = (3, 4) has cosine .6 to (2, 0), .8 to (0, 1) and .7 sqrt 2 to (1, 1)."""
    found = cosine_logits(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0], [0, 1], [1, 1]]), 10)
    torch.testing.assert_close(found, torch.tensor([[6.0, 8.0, 7 * math.sqrt(2)]]))


def test_lengths_of_features_and_weights_change_nothing() -> None:
    u, weight = torch.randn(4, 3), torch.randn(2, 3)
    torch.testing.assert_close(
        cosine_logits(100 * u, weight * torch.tensor([[5.0], [0.1]]), 7), cosine_logits(u, weight, 7)
    )


def test_features_of_length_zero_do_no_harm() -> None:
    u = torch.zeros(1, 3, requires_grad=True)
    cosine_logits(u, torch.randn(2, 3), 10).sum().backward()
    assert u.grad is not None and u.grad.isfinite().all()


def test_the_loss_is_that_of_the_sum_of_the_modalities() -> None:
    """Cosines (1, 0) and (.6, .8) with s = 2: z = (3.2, 1.6), CE = log(1 + e^-1.6) for the first class."""
    method, net = make(scale=2)
    assert isinstance(net.head, CosineHead)
    with torch.no_grad():
        net.head.linears["audio"].weight.copy_(torch.eye(2))
        net.head.linears["video"].weight.copy_(torch.tensor([[0, 3.0, 0], [0, 0, 0.1]]))
    batch = {"audio": torch.tensor([[9.0, 0]]), "video": torch.tensor([[0, 3.0, 4.0]]), LABEL: torch.tensor([0])}
    out = net(batch)
    torch.testing.assert_close(out.fused, torch.tensor([[3.2, 1.6]]))
    loss = method.losses(out, batch, Step(1, 0, 0, "joint", 1, 1.0, torch.Generator()))["fused"]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.6)), rel=1e-5)
    assert net(batch, ["audio"]).fused is None


def test_a_modality_adds_at_most_s_to_a_class() -> None:
    _, net = make(scale=3)
    out = net({m: 1e6 * value for m, value in make_batch().items() if m != LABEL})
    assert all(z.abs().max() <= 3.0001 for z in out.unimodal.values())


def test_the_released_code_evaluates_products() -> None:
    (cosine, net), (product, _) = make(), make(prediction="product")
    batch = make_batch()
    torch.testing.assert_close(cosine.predict(net, batch).fused, net(batch).fused)
    expected = sum(F.linear(batch[m], net.head.linears[m].weight) for m in WIDTHS)  # type: ignore[index, union-attr]
    found = product.predict(net, batch)
    torch.testing.assert_close(found.fused, expected)
    torch.testing.assert_close(found.unimodal, cosine.predict(net, batch).unimodal)
    assert net.head.linears["audio"].bias.count_nonzero() == 0  # type: ignore[index, union-attr]
