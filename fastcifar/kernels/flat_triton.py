"""The flat's three operations as Triton kernels: one launch and one pass over memory each.

They equal `fastcifar.kernels.flat_cpu`, function by function, up to the order of sums and fused
multiply-adds. Nothing in
them waits for the host: the squared norm stays on the device as partial sums, which every program of the ascend adds
up again in the same order (a few kilobytes out of the cache), so that results are the same bits in every run.

Bytes moved per parameter, 4 each: norm 2 reads; ascend 2 reads, 3 writes; descend (with restore and averages) 4 reads,
4 writes. That is also the least for three passes, since the two gradients lie between them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.kernels.flat import Ascent, Averages, Descent

BLOCK = 2048  # elements a program: with 8 warps, two 16-byte accesses of each buffer per thread
WARPS = 8
MAX_PARTIALS = 1024  # programs of the norm: several for each of an H100's 132 multiprocessors


@triton.jit
def _square(x):  # type: ignore[no-untyped-def]
    return x * x


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    weights, grads, partials, n, scaled_end, eta, ADAPTIVE: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write each program's share of the sum of (T g)^2, T = |w| + eta below ``scaled_end`` and 1 elsewhere."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    # ROUNDS is a constant because the interpreter cannot count to a value that a kernel was given.
    for k in range(ROUNDS):
        i = (k * tl.num_programs(0) + tl.program_id(0)) * BLOCK + lane
        g = tl.load(grads + i, mask=i < n, other=0.0)
        if ADAPTIVE:
            w = tl.load(weights + i, mask=i < n, other=0.0)
            g = tl.where(i < scaled_end, tl.abs(w) + eta, 1.0) * g
        total += _square(g)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def ascend_kernel(  # type: ignore[no-untyped-def]
    weights, grads, saved, partials, working_copy, n, scaled_end, shadow_end, count, rho, eta,
    ADAPTIVE: tl.constexpr, SHADOW: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Save w, add rho T^2 g / (||T g|| + 1e-12) to it, clear g; a norm that is not finite moves nothing."""
    part = tl.arange(0, PARTIALS)
    total = tl.sum(tl.load(partials + part, mask=part < count, other=0.0), 0)
    # Infinity and NaN both fail this comparison.
    finite = total < float("inf")
    factor = rho / (tl.sqrt(total) + 1e-12)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    w = tl.load(weights + i, mask=inside)
    g = tl.load(grads + i, mask=inside)
    ascend = g
    if ADAPTIVE:
        ascend = tl.where(i < scaled_end, _square(tl.abs(w) + eta), 1.0) * g
    tl.store(saved + i, w, mask=inside)
    w = tl.where(finite, w + ascend * factor, w)
    tl.store(weights + i, w, mask=inside)
    tl.store(grads + i, tl.zeros((BLOCK,), tl.float32), mask=inside)
    if SHADOW:
        tl.store(working_copy + i, w.to(working_copy.dtype.element_ty), mask=i < shadow_end)


@triton.jit
def descend_kernel(  # type: ignore[no-untyped-def]
    weights, grads, momenta, saved, average, stats, stats_average, working_copy, rate, coefficient,
    n, m, weight_blocks, shadow_end, weight_decay, momentum, share,
    NESTEROV: tl.constexpr, RESTORE: tl.constexpr, AVERAGE: tl.constexpr, SHADOW: tl.constexpr,
    COEFFICIENT: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Restore, decay, move with (Nesterov) momentum, average, and clear g; the last programs average the statistics."""
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if pid < weight_blocks:
        i = pid * BLOCK + lane
        inside = i < n
        w = tl.load((saved if RESTORE else weights) + i, mask=inside)
        g = tl.load(grads + i, mask=inside)
        v = tl.load(momenta + i, mask=inside)
        lr = tl.load(rate)
        scale = tl.load(coefficient) if COEFFICIENT else 1.0
        d = g * scale + weight_decay * w
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
        tl.store(grads + i, tl.zeros((BLOCK,), tl.float32), mask=inside)
        if AVERAGE:
            a = tl.load(average + i, mask=inside)
            tl.store(average + i, a + share * (w - a), mask=inside)
        if SHADOW:
            tl.store(working_copy + i, w.to(working_copy.dtype.element_ty), mask=i < shadow_end)
    else:
        j = (pid - weight_blocks) * BLOCK + lane
        s = tl.load(stats + j, mask=j < m)
        b = tl.load(stats_average + j, mask=j < m)
        tl.store(stats_average + j, b + share * (s - b), mask=j < m)


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm's partial sums, float32 (P,); see `fastcifar.kernels.flat_cpu.norm_squared`."""
    n = grads.numel()
    programs = min(MAX_PARTIALS, triton.cdiv(n, BLOCK))
    partials = torch.empty(programs, device=grads.device)
    adaptive = ascent is not None and ascent.adaptive
    end, eta = (ascent.scaled_end, ascent.eta) if ascent else (0, 0.0)
    norm_kernel[(programs,)](
        weights, grads, partials, n, end, eta,
        ADAPTIVE=adaptive, ROUNDS=triton.cdiv(n, programs * BLOCK), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return partials


def ascend(
    weights: Tensor, grads: Tensor, saved: Tensor, partials: Tensor, ascent: Ascent, working_copy: Tensor | None = None
) -> None:
    """Save the weights, ascend and clear the gradient; see `fastcifar.kernels.flat_cpu.ascend`."""
    n, count = weights.numel(), partials.numel()
    ascend_kernel[(triton.cdiv(n, BLOCK),)](
        weights, grads, saved, partials, _or(working_copy, weights), n, ascent.scaled_end, _size(working_copy), count,
        ascent.rho, ascent.eta, ADAPTIVE=ascent.adaptive, SHADOW=working_copy is not None,
        PARTIALS=triton.next_power_of_2(count), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def descend(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    descent: Descent,
    lr: Tensor,
    *,
    saved: Tensor | None = None,
    averages: Averages | None = None,
    coefficient: Tensor | None = None,
    working_copy: Tensor | None = None,
) -> None:
    """Restore, step, average and clear in one launch; ``lr`` is float32 (1,).

    See `fastcifar.kernels.flat_cpu.descend`.
    """
    n, m = weights.numel(), averages.stats.numel() if averages else 0
    blocks = triton.cdiv(n, BLOCK)
    old: Any = (weights,) * 3 if averages is None else (averages.weights, averages.stats, averages.stats_average)
    descend_kernel[(blocks + triton.cdiv(m, BLOCK),)](
        weights, grads, momentum, _or(saved, weights), *old, _or(working_copy, weights), lr, _or(coefficient, lr),
        n, m, blocks, _size(working_copy), descent.weight_decay, descent.momentum,
        1 - averages.decay if averages else 0.0,
        NESTEROV=descent.nesterov, RESTORE=saved is not None, AVERAGE=averages is not None,
        SHADOW=working_copy is not None,
        COEFFICIENT=coefficient is not None, SKIP=descent.skip and coefficient is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a pointer that the kernel can be given but does not read when there is no tensor."""
    return stand_in if tensor is None else tensor


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()
