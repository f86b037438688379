"""The optimizer step as one Triton kernel: one launch and one pass over memory.

It equals `fastcifar.kernels.sgd_ema.cpu` up to fused multiply-adds. Bytes per parameter after a SAM ascent step with a
moving average: 16 read (saved weights, gradient, momentum, average), 12 written.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastcifar.kernels.sgd_ema import Averages, SGDSettings

BLOCK = 2048  # elements a program: with 8 warps, two 16-byte accesses of each buffer per thread
WARPS = 8


@triton.jit
def sgd_kernel(  # type: ignore[no-untyped-def]
    weights, grads, momenta, saved, average, stats, stats_average, working_copy, rate, coefficient,
    n, m, weight_blocks, copy_end, weight_decay, momentum, share,
    NESTEROV: tl.constexpr, RESTORE: tl.constexpr, AVERAGE: tl.constexpr, COPY: tl.constexpr,
    COEFFICIENT: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Restore, decay, move with (Nesterov) momentum and average; the last programs average the statistics."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if pid < weight_blocks:
        i = pid * BLOCK + lane
        inside = i < n
        # Restoring costs nothing here: the weights are read anyway, only from elsewhere.
        w = tl.load((saved if RESTORE else weights) + i, mask=inside)
        g = tl.load(grads + i, mask=inside)
        v = tl.load(momenta + i, mask=inside)
        # From memory, not an argument: a captured graph would keep an argument for ever.
        lr = tl.load(rate)
        scale = tl.load(coefficient) if COEFFICIENT else 1.0
        d = g * scale + weight_decay * w
        # torch.optim.SGD's form, without dampening: the learning rate is outside the momentum.
        moved = momentum * v + d
        step = d + momentum * moved if NESTEROV else moved
        if SKIP:
            # Infinity and NaN both fail this comparison.
            good = tl.abs(scale) < float("inf")
            moved = tl.where(good, moved, v)
            step = tl.where(good, step, 0.0)
        w = w - lr * step
        tl.store(momenta + i, moved, mask=inside)
        tl.store(weights + i, w, mask=inside)
        if AVERAGE:
            a = tl.load(average + i, mask=inside)
            # The form that leaves a = w exactly where they are equal; d * a + (1 - d) * w would round.
            tl.store(average + i, a + share * (w - a), mask=inside)
        if COPY:
            tl.store(working_copy + i, w.to(working_copy.dtype.element_ty), mask=i < copy_end)
    else:
        j = (pid - weight_blocks) * BLOCK + lane
        s = tl.load(stats + j, mask=j < m)
        b = tl.load(stats_average + j, mask=j < m)
        tl.store(stats_average + j, b + share * (s - b), mask=j < m)


def sgd_step(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    settings: SGDSettings,
    lr: Tensor,
    *,
    saved: Tensor | None = None,
    averages: Averages | None = None,
    coefficient: Tensor | None = None,
    working_copy: Tensor | None = None,
) -> None:
    """Take the step; see `fastcifar.kernels.sgd_ema.sgd_step`. ``lr`` is float32 (1,)."""
    n, m = weights.numel(), averages.stats.numel() if averages else 0
    blocks = triton.cdiv(n, BLOCK)
    # What a kernel does not use it is given as a pointer that it does not read.
    old: Any = (weights,) * 3 if averages is None else (averages.weights, averages.stats, averages.stats_average)
    copy, copy_end = (weights, 0) if working_copy is None else (working_copy, working_copy.numel())
    sgd_kernel[(blocks + triton.cdiv(m, BLOCK),)](
        weights, grads, momentum, weights if saved is None else saved, *old, copy,
        lr, lr if coefficient is None else coefficient,
        n, m, blocks, copy_end, settings.weight_decay, settings.momentum, 1 - averages.decay if averages else 0.0,
        NESTEROV=settings.nesterov, RESTORE=saved is not None, AVERAGE=averages is not None,
        COPY=working_copy is not None, COEFFICIENT=coefficient is not None,
        SKIP=settings.skip and coefficient is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
