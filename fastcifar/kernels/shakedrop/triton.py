"""ShakeDrop's draws as one Triton kernel: a program for each block and 128 samples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.kernels.philox import Stream

SAMPLES = 128  # a program
STREAM = tl.constexpr(int(Stream.SHAKEDROP))


@triton.jit
def unit(word):  # type: ignore[no-untyped-def]
    """Map random words (uint32) to float32 in [0, 1): their upper 24 bits, exactly."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def scales_kernel(  # type: ignore[no-untyped-def]
    out, thresholds, counter, seed_at, batch, PER_SAMPLE: tl.constexpr, SAMPLES: tl.constexpr
):
    """Write out[block, 0, i] and out[block, 1, i], the forward and backward factors of sample i."""
    block = tl.program_id(0)
    i = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    seed = tl.load(seed_at)
    # All counters as vectors of 32-bit words: the same integers as in the reference.
    zero = (i * 0).to(tl.uint32)
    passes, place, stream = zero + tl.load(counter).to(tl.uint32), zero + block.to(tl.uint32), zero + STREAM
    alpha, beta, each, _ = tl.philox(seed, zero + i.to(tl.uint32), passes, place, stream)
    if PER_SAMPLE:
        word = each
    else:
        _, _, _, word = tl.philox(seed, zero, passes, place, stream)  # the first sample's, for all of the batch
    alive = (word >> 8).to(tl.int64) >= tl.load(thresholds + block)
    row = out + block * 2 * batch + i
    tl.store(row, tl.where(alive, 1.0, unit(alpha) * 2 - 1), mask=i < batch)
    tl.store(row + batch, tl.where(alive, 1.0, unit(beta)), mask=i < batch)


def scales(thresholds: Tensor, counter: Tensor, seed: Tensor, batch: int, per_sample: bool) -> Tensor:
    """Return float32 (L, 2, B) in one launch; see `fastcifar.kernels.shakedrop.draw_scales`."""
    out = torch.empty((len(thresholds), 2, batch), device=thresholds.device)
    scales_kernel[(len(thresholds), triton.cdiv(batch, SAMPLES))](
        out, thresholds, counter, seed, batch, PER_SAMPLE=per_sample, SAMPLES=SAMPLES, num_warps=4
    )
    return out
