"""The ascent step as two Triton kernels: one launch and one pass over memory each.

They equal `fastcifar.kernels.sam.cpu` up to the order of sums and fused multiply-adds. Nothing waits for the host:
every program of the ascent adds up the partial sums of the norm again, in the same order (a few kilobytes out of the
cache), so that results are the same bits in every run.

Bytes per parameter: the norm reads 8 (SAM: 4), the ascent reads 8 and writes 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.kernels.sam import Ascent

BLOCK = 2048  # elements a program: with 8 warps, two 16-byte accesses of each buffer per thread
WARPS = 8
MAX_PARTIALS = 1024  # programs of the norm: several for each of an H100's 132 multiprocessors


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
        # A lane keeps its own sum; one reduction at the end instead of one for each round.
        total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def ascend_kernel(  # type: ignore[no-untyped-def]
    weights, grads, saved, partials, working_copy, n, scaled_end, copy_end, count, rho, eta,
    ADAPTIVE: tl.constexpr, COPY: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Save w and add rho T^2 g / (||T g|| + 1e-12) to it; a norm that is not finite moves nothing."""
    part = tl.arange(0, PARTIALS)
    # Each program adds up all partial sums: cheaper than a third launch, and without atomics the same bits always.
    total = tl.sum(tl.load(partials + part, mask=part < count, other=0.0), 0)
    # Infinity and NaN both fail this comparison.
    finite = total < float("inf")
    factor = rho / (tl.sqrt(total) + 1e-12)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    w = tl.load(weights + i, mask=inside)
    direction = tl.load(grads + i, mask=inside)
    if ADAPTIVE:
        t = tl.abs(w) + eta
        direction = tl.where(i < scaled_end, t * t, 1.0) * direction
    tl.store(saved + i, w, mask=inside)
    # An overflow must not spoil the weights: the optimizer step leaves such a step out.
    w = tl.where(finite, w + direction * factor, w)
    tl.store(weights + i, w, mask=inside)
    if COPY:
        tl.store(working_copy + i, w.to(working_copy.dtype.element_ty), mask=i < copy_end)


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm in partial sums; see `fastcifar.kernels.sam.norm_squared`."""
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
    """Save w and move it to w + e; see `fastcifar.kernels.sam.ascend`."""
    n, count = weights.numel(), partials.numel()
    # A kernel that does not write a copy is given a pointer that it does not read.
    copy, copy_end = (weights, 0) if working_copy is None else (working_copy, working_copy.numel())
    ascend_kernel[(triton.cdiv(n, BLOCK),)](
        weights, grads, saved, partials, copy, n, ascent.scaled_end, copy_end, count, ascent.rho, ascent.eta,
        ADAPTIVE=ascent.adaptive, COPY=working_copy is not None, PARTIALS=triton.next_power_of_2(count),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
