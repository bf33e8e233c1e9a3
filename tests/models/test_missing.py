"""Predictions without some modalities, by hand for each kind of head, and as a promise of every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.cases import SMALL
from tests.conftest import Done

from counterpoise.engine.again import selected
from counterpoise.engine.comm import SingleComm
from counterpoise.engine.evaluate import predictions
from counterpoise.engine.job import open_data
from counterpoise.engine.loop import load_model, make_method, make_network
from counterpoise.methods.base import Setting
from counterpoise.methods.mla import MLA, MLAConfig
from counterpoise.models.heads import BoostedHead, ConcatHead, Head, MultiHead, SumHead
from counterpoise.models.network import MultimodalNet

AUDIO, VIDEO = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
WIDTHS = {"audio": 2, "video": 2}


def without(head: Head, *missing: str) -> torch.Tensor:
    features = {"audio": AUDIO, "video": VIDEO}
    return head.fuse_present(head({m: u for m, u in features.items() if m not in missing}))


def test_a_concat_head_takes_zeros_for_what_is_missing_and_keeps_its_bias() -> None:
    head = ConcatHead(WIDTHS, 2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0, 2, 1], [0, 1, -1, 0]]))
        head.linear.bias.copy_(torch.tensor([0.2, -0.2]))
    torch.testing.assert_close(without(head, "video"), torch.tensor([[1.2, 1.8]]))
    torch.testing.assert_close(without(head, "audio"), torch.tensor([[0.2, -0.7]]))


def test_a_joint_head_beside_private_ones_is_the_one_that_fuses() -> None:
    head = MultiHead(WIDTHS, 2)
    joined = torch.cat([AUDIO, torch.zeros(1, 2)], dim=1)
    torch.testing.assert_close(without(head, "video"), head.linear(joined))


def test_a_sum_head_drops_the_term_of_what_is_missing() -> None:
    head = SumHead(WIDTHS, 2)
    with torch.no_grad():
        head.linears["audio"].weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
        head.linears["audio"].bias.copy_(torch.tensor([0.5, 0]))
        head.linears["video"].weight.copy_(torch.tensor([[2.0, 1], [-1, 0]]))
        head.linears["video"].bias.copy_(torch.tensor([0, 0.25]))
    torch.testing.assert_close(without(head, "video"), torch.tensor([[1.5, 2.0]]))
    torch.testing.assert_close(without(head, "audio"), torch.tensor([[0.0, -0.25]]))
    torch.testing.assert_close(without(head), torch.tensor([[1.5, 1.75]]))


def test_weights_of_a_boosted_head_are_scaled_up_to_the_sum_of_all() -> None:
    counts = {"audio": 1, "video": 1}
    head = BoostedHead(
        WIDTHS, 2, hidden=3, initial=counts, capacity=counts, fusion_weights={"audio": 0.25, "video": 0.5}
    )
    alone = head({"audio": AUDIO})
    torch.testing.assert_close(head.fuse_present(alone), 0.75 * alone.unimodal["audio"])


def test_fixed_weights_of_mla_are_scaled_up_and_entropy_weights_are_shared_among_those_present() -> None:
    for config in (MLAConfig(fusion="fixed", weights={"audio": 0.3, "video": 0.7}), MLAConfig()):
        mla = MLA(config, Setting(("audio", "video"), 3, 1, 0), SingleComm())
        net = MultimodalNet({m: torch.nn.Identity() for m in WIDTHS}, mla.head(WIDTHS))
        out = mla.predict(net, {"audio": AUDIO, "video": VIDEO}, ("video",))
        torch.testing.assert_close(mla.fuse(net, out), out.unimodal["audio"])


def _predict(done: Done, missing: Sequence[str], spoil: bool) -> dict[str, torch.Tensor]:
    """Logits of a batch of the run's test split; spoil: put other numbers where something is missing."""
    data = open_data(done.experiment)
    try:
        method = make_method(done.experiment, data, SingleComm())
        net = make_network(done.experiment, data, method)
        load_model(net, selected(done.folder))
        net.eval()
        batch = next(iter(data.batches("test")))
        if spoil:
            batch |= {m: torch.full_like(batch[m], 1e6) for m in missing}
        with torch.no_grad():
            return predictions(net, method, method.predict(net, batch, missing))
    finally:
        data.close()


OF_THREE = [f"{method}-of-three" for method in ("agm", "aug", "di_mml", "g_blend", "mla")]


@pytest.mark.parametrize("name", [*(m for m in SMALL if m != "unimodal"), *OF_THREE])
def test_every_method_predicts_without_looking_at_what_is_missing(name: str, finished: Callable[[str], Done]) -> None:
    done = finished(name)
    whole = _predict(done, (), False)
    modalities = [m for m in whole if m != "fused"]
    for gone in modalities:
        found, spoilt = _predict(done, (gone,), False), _predict(done, (gone,), True)
        assert set(found) == {"fused", *modalities} - {gone}
        assert all(found[m].equal(spoilt[m]) for m in found)
        assert torch.isfinite(found["fused"]).all() and found["fused"].shape == whole["fused"].shape
        assert not found["fused"].equal(whole["fused"])


@pytest.mark.parametrize("name", ["joint", "late", "aug", "lfm", "reconboost", "di_mml", "maie"])
def test_with_all_there_a_head_fuses_as_it_always_does(name: str, finished: Callable[[str], Done]) -> None:
    done = finished(name)
    data = open_data(done.experiment)
    method = make_method(done.experiment, data, SingleComm())
    net = make_network(done.experiment, data, method)
    load_model(net, selected(done.folder))
    net.eval()
    with torch.no_grad():
        out = net(next(iter(data.batches("test"))))
        again = net.head.fuse_present(out)
    data.close()
    torch.testing.assert_close(again, method.fuse(net, out), atol=1e-5, rtol=1e-5)
