from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoise.models.heads import ConcatHead, SumHead


def test_split_logits_of_a_concat_head_by_hand() -> None:
    head = ConcatHead({"audio": 2, "video": 2}, 2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0, 2, 1], [0, 1, -1, 0]]))
        head.linear.bias.copy_(torch.tensor([0.2, -0.2]))
    out = head({"audio": torch.tensor([[1.0, 2.0]]), "video": torch.tensor([[0.5, -1.0]])})
    assert out.fused is not None
    torch.testing.assert_close(out.unimodal["audio"], torch.tensor([[1.1, 1.9]]))
    torch.testing.assert_close(out.unimodal["video"], torch.tensor([[0.1, -0.6]]))
    torch.testing.assert_close(out.fused, torch.tensor([[1.2, 1.3]]))


@given(seed=st.integers(0, 10**6), modalities=st.integers(1, 4), kind=st.sampled_from([ConcatHead, SumHead]))
def test_modality_logits_add_up_to_the_fused_ones(seed: int, modalities: int, kind: type) -> None:
    torch.manual_seed(seed)
    widths = {f"m{i}": 2 + i for i in range(modalities)}
    head = kind(widths, 3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    out = head({name: torch.randn(4, width) for name, width in widths.items()})
    torch.testing.assert_close(torch.stack(list(out.unimodal.values())).sum(0), out.fused, atol=1e-5, rtol=1e-5)


def test_heads_answer_for_some_modalities_without_a_fused_prediction() -> None:
    for kind in (ConcatHead, SumHead):
        head = kind({"audio": 2, "video": 3}, 4)
        whole = head({"audio": torch.ones(1, 2), "video": torch.ones(1, 3)})
        part = head({"video": torch.ones(1, 3)})
        assert part.fused is None and part.unimodal["video"].equal(whole.unimodal["video"])


def test_a_concat_head_over_one_modality_is_one_linear_layer() -> None:
    head = ConcatHead({"audio": 3}, 4)
    out = head({"audio": torch.randn(5, 3)})
    assert out.fused is not None and out.fused.equal(out.unimodal["audio"])
