"""ShakeDrop's draws in plain torch: what the Triton kernel must equal bit for bit, and what a CPU runs."""

import torch
from torch import Tensor

from fastcifar.kernels.philox import Stream, philox

BITS = 24
"""Of a random word that are used: as many as a float32 holds exactly."""


def scales(thresholds: Tensor, counter: Tensor, seed: int, batch: int, per_sample: bool) -> Tensor:
    """Return float32 (L, 2, B); see `fastcifar.kernels.shakedrop.draw_scales`."""
    blocks = len(thresholds)
    position = torch.arange(batch, device=counter.device).expand(blocks, batch)
    block = torch.arange(blocks, device=counter.device)[:, None]
    alpha, beta, each, whole = philox(seed, position, counter, block, Stream.SHAKEDROP)
    # The batch's gate is the first sample's fourth word, apart from the words of the per-sample gates.
    word = each if per_sample else whole[:, :1]
    alive = word >> (32 - BITS) >= thresholds[:, None]
    factors = torch.stack([unit(alpha) * 2 - 1, unit(beta)], dim=1)
    return torch.where(alive[:, None], torch.ones_like(factors), factors)


def unit(word: Tensor) -> Tensor:
    """Map random words, int64 in 0..2**32-1, to float32 in [0, 1): their upper 24 bits, exactly."""
    return (word >> (32 - BITS)).to(torch.float32) * 2.0**-BITS
