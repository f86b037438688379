"""Which training images take part: a subset for smoke tests, and a holdout to choose epochs and weights on."""

import numpy as np
import torch

from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox


def subset_rows(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the rows of the first ``per_class`` images of each class, in ascending order.

    Args:
        labels: int64 (N,).
        per_class: how many to keep of each class; 0 keeps all.

    Returns:
        int64 (M,).
    """
    if per_class == 0:
        return np.arange(len(labels), dtype=np.int64)
    kept = [np.flatnonzero(labels == c)[:per_class] for c in np.unique(labels)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def holdout_split(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set aside ``count`` images, each class in proportion; the choice depends on the seed and the labels alone.

    Args:
        labels: int64 (N,).
        count: how many to set aside, 0..N-1.
        seed: 0..2**64-1.

    Returns:
        The rows that stay (int64 (N - count,)) and the rows set aside (int64 (count,)), both ascending.

    Raises:
        UserError: ``count`` leaves nothing to train on.
    """
    if count >= len(labels):
        raise UserError(f"data.holdout = {count} leaves none of the {len(labels)} training images")
    word = philox(seed, torch.arange(len(labels)), 0, 0, Stream.HOLDOUT)[0].numpy()
    held = np.zeros(len(labels), dtype=bool)
    for label, share in _shares(labels, count).items():
        rows = np.flatnonzero(labels == label)
        held[rows[np.argsort(word[rows], kind="stable")[:share]]] = True
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def _shares(labels: np.ndarray, count: int) -> dict[int, int]:
    """Divide ``count`` among the classes in proportion; the largest remainders get what rounding down left over."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * count
    shares = exact // len(labels)
    order = np.argsort(-(exact % len(labels)), kind="stable")
    shares[order[: count - int(shares.sum())]] += 1
    return {int(c): int(s) for c, s in zip(classes, shares, strict=True)}
