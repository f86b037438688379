"""Counter-based random integers: Philox 4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every random decision of a run is a pure function of (seed, epoch, index, draw number, stream), so that it is the
same on every loader, device, thread count and rank, and after a resume. The counter is
``(index, epoch, draw // 4, stream)``, the key is the 64-bit seed, and draw ``d`` is word ``d % 4`` of the result.

The same integers come out of `philox` (torch, any device), `philox_scalar` (numba) and Triton's `tl.philox`.
"""

from enum import IntEnum
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a random number is for. A new use takes a new number, so that it changes none of the others."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    SHAKEDROP = 3
    HOLDOUT = 4
    TORCH = 5
    SYNTHETIC = 6
    USER_OPERATION = 7


def split_seed(seed: int) -> tuple[int, int]:
    """Return the two 32-bit words (low, high) of a seed in 0..2**64-1."""
    return seed & MASK, (seed >> 32) & MASK


def philox(seed: int, index: Tensor, epoch: int | Tensor, block: int | Tensor, stream: int) -> list[Tensor]:
    """Return four tensors of random words, elementwise over broadcast counters, without a host-device synchronization.

    Args:
        seed: 0..2**64-1.
        index: int64 tensor, any shape and device, values in 0..2**32-1.
        epoch: int, or int64 tensor that broadcasts with ``index``.
        block: draw number // 4, likewise.
        stream: a `Stream`.

    Returns:
        Four int64 tensors with values in 0..2**32-1: draws ``4 * block`` to ``4 * block + 3``.
    """
    k0, k1 = split_seed(seed)
    zero = torch.zeros_like(index)
    c0, c1, c2, c3 = index & MASK, zero + epoch, zero + block, zero + int(stream)
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which keeps the bits; the mask undoes the sign of the arithmetic shift.
        a, b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + WEYL_A) & MASK, (k1 + WEYL_B) & MASK
    return [c0, c1, c2, c3]


@nb.njit(cache=True, inline="never")
def philox_scalar(
    seed_low: Any, seed_high: Any, index: Any, epoch: Any, block: Any, stream: Any
) -> tuple[Any, Any, Any, Any]:
    """Return the four random words (numba uint64 scalars in 0..2**32-1) of one counter; see `philox`."""
    mask = np.uint64(MASK)
    k0, k1 = np.uint64(seed_low), np.uint64(seed_high)
    c0, c1, c2, c3 = np.uint64(index), np.uint64(epoch), np.uint64(block), np.uint64(stream)
    for _ in range(ROUNDS):
        a, b = c0 * np.uint64(MULTIPLIER_A), c2 * np.uint64(MULTIPLIER_B)
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ k0, b & mask, (a >> np.uint64(32)) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + np.uint64(WEYL_A)) & mask, (k1 + np.uint64(WEYL_B)) & mask
    return c0, c1, c2, c3


def epoch_order(count: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order in which an epoch visits its samples: int64 (count,), a permutation of 0..count-1.

    It sorts the samples by a random word of theirs, ties by index, so it is the same on every device.
    """
    # Sorting by a hash instead of torch.randperm, which differs between devices and versions.
    index = torch.arange(count, dtype=torch.int64, device=device)
    word = philox(seed, index, epoch, 0, Stream.ORDER)[0]
    # The key must fit a signed 64-bit integer: 31 random bits above 32 index bits.
    return ((word >> 1 << 32) | index).argsort()
