"""Metrics over saved predictions, computed by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def classification_metrics(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> dict[str, float]:
    """accuracy, map and macro_f1 of logits [N, K].

    map: average precision per class (one against the rest) of softmax(logits), mean over the classes that occur among
    the labels; this is how the released AUG code computes what the paper calls mAP. macro_f1: over the classes that
    occur among labels or predictions.
    """
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score

    predictions = logits.argmax(axis=1)
    probabilities = softmax(logits.astype(np.float64), axis=1)
    present = np.unique(labels)
    precisions = [average_precision_score(labels == k, probabilities[:, k]) for k in present]
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "map": float(np.mean(precisions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }
