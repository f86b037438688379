"""Which training images take part: a subset for smoke tests, and a holdout to choose epochs and weights on."""

import numpy as np
import torch

from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox


def subset_rows(labels: np.ndarray, count: int, key: str = "data.subset") -> np.ndarray:
    """Return the rows of the first images of each class, ``count`` in all, each class in proportion.

    Shares that are not whole are rounded by the largest remainder, the lower class first where two are equal, so that
    the rows depend on the labels and the count alone.

    Args:
        labels: int64 (N,).
        count: how many to keep in total; 0, or N and more, keep all.
        key: the recipe's key that gave the count, for the message.

    Returns:
        int64 (min(count, N),), ascending.

    Raises:
        UserError: fewer images than classes, as in a recipe from when the key counted the images of each class.
    """
    if count == 0 or count >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    classes = len(np.unique(labels))
    if count < classes:
        raise UserError(
            f"{key} = {count} is less than an image for each of the {classes} classes; it counts images in total: "
            f"{key} = {count * classes} keeps {count} of each"
        )
    kept = [np.flatnonzero(labels == c)[:share] for c, share in _shares(labels, count).items()]
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
