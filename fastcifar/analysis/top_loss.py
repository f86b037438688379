"""The images that a model finds hardest."""

from typing import NamedTuple

import numpy as np

from fastcifar.analysis.ensemble import log_softmax


class HardImage(NamedTuple):
    """One image with a high loss.

    Attributes:
        row: its position in the split that the logits are of.
        label: the given class.
        predicted: the class that the model takes it for.
        loss: cross entropy against the given label, in nats.
        probability: what the model gives its prediction, in 0..1.
        label_probability: what it gives the given label, in 0..1.
    """

    row: int
    label: int
    predicted: int
    loss: float
    probability: float
    label_probability: float


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each image's cross entropy in nats, float64 (N,); logits (N, K), labels int64 (N,)."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def top_loss(logits: np.ndarray, labels: np.ndarray, count: int = 48) -> list[HardImage]:
    """Return the ``count`` images of highest loss, highest first; ties by row.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        count: how many at most.
    """
    return describe(logits, labels, np.argsort(-losses(logits, labels), kind="stable")[:count])


def describe(logits: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> list[HardImage]:
    """Return what the model says of each of the given rows, in their order."""
    log_p, of_label = log_softmax(logits[rows]), losses(logits[rows], labels[rows])
    best = log_p.argmax(1)
    return [
        HardImage(int(row), int(labels[row]), int(b), float(loss), float(np.exp(p[b])), float(np.exp(-loss)))
        for row, b, loss, p in zip(rows, best, of_label, log_p, strict=True)
    ]
