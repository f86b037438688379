"""The confusion matrix and what it says per class."""

from typing import NamedTuple

import numpy as np


class Confusion(NamedTuple):
    """How many ``images`` of class ``actual`` were called ``predicted``."""

    actual: int
    predicted: int
    images: int


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return counts int64 (K, K): rows are the given labels, columns the predictions.

    Args:
        labels: int64 (N,), values in 0..classes-1.
        predicted: int64 (N,), likewise.
        classes: K.
    """
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def recall_percent(matrix: np.ndarray) -> np.ndarray:
    """Return each class's accuracy (its images that were called right), float64 (K,) in percent; nan without images."""
    return _percent(np.diag(matrix), matrix.sum(1))


def precision_percent(matrix: np.ndarray) -> np.ndarray:
    """Return how often a prediction of each class was right, float64 (K,) in percent; nan where it was never made."""
    return _percent(np.diag(matrix), matrix.sum(0))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def largest_confusions(matrix: np.ndarray, count: int = 10) -> list[Confusion]:
    """Return the largest entries off the diagonal, largest first, without zeros; ties in reading order."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:count]
    cells = [(int(i) // len(off), int(i) % len(off)) for i in order]
    return [Confusion(a, p, int(off[a, p])) for a, p in cells if off[a, p]]
