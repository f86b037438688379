"""Suspected label errors by confident learning.

Northcutt, Jiang & Chuang, 2021, "Confident learning: estimating uncertainty in dataset labels", JAIR 70.

It needs probabilities of images that the model was not trained on: the test set, the holdout, or training images
under cross-validation. A class's threshold is the mean probability that the images of that label get for it. An image
counts as confidently of class j when its probability of j reaches j's threshold (of several such classes, the most
probable). Counting given label against confident class gives the confident joint: an estimate of how many images of
each label belong to each class. What it says lies off the diagonal, the model's least believed images are named for.

What it cannot do: it sees the data through one model. What this model confuses systematically looks like label
errors, an error that it shares with the annotators stays hidden, and the suspects are to be looked at, not deleted.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelErrors:
    """Suspected label errors of one split.

    Attributes:
        rows: int64 (S,): the suspects, least believed first (by normalized margin).
        suggested: int64 (S,): the class that the model believes in.
        margins: float64 (S,): probability of the given label minus the largest other one, in -1..1.
        joint: float64 (K, K): estimated number of images by given label (rows) and true class (columns).
        thresholds: float64 (K,): the confidence that counts as belonging to a class, nan without images.
    """

    rows: np.ndarray
    suggested: np.ndarray
    margins: np.ndarray
    joint: np.ndarray
    thresholds: np.ndarray

    @property
    def estimated_errors(self) -> float:
        """The number of wrong labels that the joint implies."""
        return float(self.joint.sum() - np.trace(self.joint))


def class_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each class's mean self-confidence, float64 (K,): the mean p(j) over images labelled j; nan without any."""
    classes = probabilities.shape[1]
    sums = np.bincount(labels, probabilities[np.arange(len(labels)), labels], minlength=classes)
    counts = np.bincount(labels, minlength=classes)
    return np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)


def confident_counts(probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the confident joint as counts, int64 (K, K): given label by confident class.

    Images that reach no threshold are left out. Each label is counted at least once as itself, so that every row can
    be scaled.
    """
    classes = probabilities.shape[1]
    # The tolerance lets an image at its class's threshold pass where the mean rounds above it.
    above = probabilities >= np.where(np.isnan(thresholds), np.inf, thresholds) - 1e-6
    confident = np.where(above, probabilities, -1.0).argmax(1)
    counted = above.any(1)
    flat = np.bincount(labels[counted] * classes + confident[counted], minlength=classes * classes)
    counts = flat.reshape(classes, classes)
    np.fill_diagonal(counts, np.maximum(np.diag(counts), 1))
    return counts


def calibrated_joint(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scale each row of the confident counts to the number of images with that label: float64 (K, K)."""
    per_label = np.bincount(labels, minlength=len(counts))
    return counts / counts.sum(1, keepdims=True) * per_label[:, None]


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Name the suspected label errors ("prune by noise rate" of the paper).

    For each label i and class j, the estimated number of images of label i that belong to j are taken, those first
    whose probability of j exceeds that of i the most. An image that the model calls by its label is no suspect, nor
    is the last image of a label.

    Args:
        probabilities: (N, K), of images that the model was not trained on; rows add up to 1.
        labels: int64 (N,), the given labels.
    """
    probabilities = np.asarray(probabilities, np.float64)
    thresholds = class_thresholds(probabilities, labels)
    joint = calibrated_joint(confident_counts(probabilities, labels, thresholds), labels)
    suspect = _prune_by_noise_rate(probabilities, labels, joint)
    margins = _margins(probabilities, labels)
    rows = np.flatnonzero(suspect & (margins < 0))
    rows = rows[np.argsort(margins[rows], kind="stable")]
    return LabelErrors(rows, probabilities[rows].argmax(1), margins[rows], joint, thresholds)


def _margins(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return p(label) minus the largest other probability, float64 (N,)."""
    everyone = np.arange(len(labels))
    others = probabilities.copy()
    others[everyone, labels] = -np.inf
    return probabilities[everyone, labels] - others.max(1)


def _prune_by_noise_rate(probabilities: np.ndarray, labels: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Return which images are suspects, bool (N,)."""
    suspect = np.zeros(len(labels), bool)
    for label, wanted in enumerate(_whole_numbers(joint)):
        members = np.flatnonzero(labels == label)
        for other in np.flatnonzero(wanted):
            if other != label:
                margin = probabilities[members, other] - probabilities[members, label]
                suspect[members[np.argsort(-margin, kind="stable")[: wanted[other]]]] = True
    return suspect


def _whole_numbers(joint: np.ndarray) -> np.ndarray:
    """Round each row to whole numbers with the row's sum kept (largest remainders, the label's own first), (K, K)."""
    down = np.floor(joint + 1e-9).astype(np.int64)
    for label, (row, exact) in enumerate(zip(down, joint, strict=True)):
        missing = round(float(exact.sum())) - int(row.sum())
        another = np.arange(len(row)) != label
        row[np.lexsort((another, -np.round(exact - row, 9)))[:missing]] += 1
    return down
