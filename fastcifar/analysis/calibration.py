"""How far confidence can be believed: the reliability diagram, its summary and a temperature (Guo et al., 2017).

Confidence is the largest probability of an image; a calibrated model is right in 80% of the cases in which it says 80%.
"""

from typing import Any, NamedTuple

import numpy as np

from fastcifar.analysis.ensemble import log_softmax, softmax
from fastcifar.analysis.statistics import negative_log_likelihood

BINS = 15
"""Equally wide bins of confidence, as in the paper."""


class Bin(NamedTuple):
    """One bin of the reliability diagram.

    Attributes:
        low, high: its bounds of confidence, in 0..1.
        images: how many images fall into it.
        confidence: their mean confidence, in 0..1.
        accuracy: which share of them the model has right, in 0..1.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Return the bins of the reliability diagram that hold images, by rising confidence.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        bins: equally wide bins of confidence in 0..1.
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    means = [np.bincount(bin_of, values, minlength=bins) / np.maximum(counts, 1) for values in (confidence, right)]
    return [
        Bin(i / bins, (i + 1) / bins, int(n), float(c), float(a))
        for i, (n, c, a) in enumerate(zip(counts, *means, strict=True))
        if n
    ]


def calibration_error(found: list[Bin]) -> float:
    """Return the expected calibration error in points: how far confidence is from accuracy, weighted by images."""
    images = sum(b.images for b in found)
    return 100 * sum(b.images * abs(b.confidence - b.accuracy) for b in found) / images


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature T, in 0.05..20, under which ``softmax(logits / T)`` makes the labels most likely.

    The negative log-likelihood is convex in 1/T, so the minimum found is the only one. Above 1 the model was too sure.

    Args:
        logits: (N, K), of images that the model was not trained on.
        labels: int64 (N,).
    """
    from scipy.optimize import minimize_scalar

    def loss(inverse: float) -> float:
        return float(-log_softmax(inverse * logits.astype(np.float64))[np.arange(len(labels)), labels].mean())

    found = minimize_scalar(loss, bounds=(1 / 20, 20), method="bounded", options={"xatol": 1e-6})
    return 1 / float(found.x)


def calibration(
    logits: np.ndarray, labels: np.ndarray, holdout: tuple[np.ndarray, np.ndarray] | None = None
) -> dict[str, Any]:
    """Return what a report says about calibration, as plain values.

    Args:
        logits: (N, K) on the test set.
        labels: int64 (N,).
        holdout: logits and labels of held-out training images, to fit a temperature on; the test set, on which it is
            judged, must not choose it.
    """
    found = {"bins": BINS, "as_trained": _at(logits, labels, 1.0), "with_temperature": None}
    if holdout is not None:
        found["with_temperature"] = _at(logits, labels, fit_temperature(*holdout))
    return found


def _at(logits: np.ndarray, labels: np.ndarray, temperature: float) -> dict[str, Any]:
    scaled = logits.astype(np.float64) / temperature
    found = reliability(scaled, labels)
    return {
        "temperature": temperature,
        "calibration_error": calibration_error(found),
        "loss": negative_log_likelihood(softmax(scaled), labels),
        "reliability": [entry._asdict() for entry in found],
    }
