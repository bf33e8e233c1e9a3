"""Arithmetic that several methods share. Pure functions of tensors and numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def true_class_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """softmax(z)_y of every sample [B], the confidence that OGM, AUG and others compare between modalities."""
    return torch.softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_k t_k log softmax(z)_k of every sample [B]; the target [B, K] need not sum to 1."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def mean_ratios(scores: Tensor) -> Tensor:
    """How much stronger each modality is than the others: the mean of S_m / S_j over all j != m [M], M >= 2.

    With two modalities the ratio of one to the other, and its inverse. Never above 1 for the weakest.
    """
    table = scores.unsqueeze(1) / scores.clamp(min=1e-12)
    return table.fill_diagonal_(0).sum(dim=1) / (len(scores) - 1)


def accuracy_gap(accuracy: Mapping[str, float]) -> float:
    """Accuracy of the best single modality minus that of the worst; "fused" does not count."""
    single = [value for name, value in accuracy.items() if name != "fused"]
    return max(single) - min(single) if single else 0.0


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of its parts, equal on every machine and worker."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded with `derived_seed(*parts)`."""
    return torch.Generator().manual_seed(derived_seed(*parts))
