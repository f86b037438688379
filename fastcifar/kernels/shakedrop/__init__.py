"""The random factors of all ShakeDrop blocks for one forward pass (Yamada et al., 2019), in one launch.

It is a custom operator, so that torch.compile sees one opaque node: Inductor would turn Philox's 64-bit constants into
32-bit index expressions, and would draw once for every block.
"""

import torch
from torch import Tensor

from fastcifar.kernels.shakedrop.reference import BITS, scales

__all__ = ["BITS", "draw_scales"]


@torch.library.custom_op("fastcifar::draw_shakedrop_scales", mutates_args=())
def draw_scales(thresholds: Tensor, counter: Tensor, seed: Tensor, batch: int, per_sample: bool) -> Tensor:
    """Return the factors of the next forward pass: float32 (L, 2, B), each block's forward and backward factors.

    A block whose gate is open has factors of 1. Nothing waits for the host.

    Args:
        thresholds: int64 (L,), each block's death probability times 2**24.
        counter: int64 (1,), the number of the forward pass, in 0..2**32-1.
        seed: int64 (1,), the run's seed, its 64 bits as a signed integer.
        batch: number of samples B.
        per_sample: draw a gate for each block and sample, not one for each block and batch.
    """
    return scales(thresholds, counter, int(seed), batch, per_sample)


@draw_scales.register_kernel("cuda")
def _(thresholds: Tensor, counter: Tensor, seed: Tensor, batch: int, per_sample: bool) -> Tensor:
    from fastcifar.kernels.shakedrop import triton  # not imported where there is no GPU

    return triton.scales(thresholds, counter, seed, batch, per_sample)


@draw_scales.register_fake
def _(thresholds: Tensor, counter: Tensor, seed: Tensor, batch: int, per_sample: bool) -> Tensor:
    return torch.empty((len(thresholds), 2, batch), device=thresholds.device)
