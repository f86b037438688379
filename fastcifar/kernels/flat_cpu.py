"""The flat's three operations in plain torch: what the Triton kernels must equal, and what a CPU runs.

All tensors are flat float32 buffers of one size n unless stated otherwise. See `fastcifar.kernels.flat_triton`.
Elementwise
work goes through the buffers in blocks that stay in a core's cache, so that its several calls read memory once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcifar.kernels.flat import Ascent, Averages, Descent

BLOCK = 2**17  # elements: the six buffers of a block take 3 MB


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, n, BLOCK))


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm of the gradient, scaled elementwise by |w| + eta where ``ascent`` is adaptive.

    Returns:
        float32 (P,): partial sums, to be added up by whoever needs the norm.
    """
    if ascent is None or not ascent.adaptive:
        return torch.dot(grads, grads)[None]
    rest = grads[ascent.scaled_end :]
    parts = [torch.dot(rest, rest)]
    for block in _blocks(ascent.scaled_end):
        block = slice(block.start, min(block.stop, ascent.scaled_end))
        scaled = _scale(weights[block], ascent.eta).mul_(grads[block])
        parts.append(torch.dot(scaled, scaled))
    return torch.stack(parts)


def ascend(
    weights: Tensor, grads: Tensor, saved: Tensor, partials: Tensor, ascent: Ascent, working_copy: Tensor | None = None
) -> None:
    """Save the weights, ascend by e = rho T^2 g / (||T g|| + 1e-12), T = |w| + eta or 1, and clear the gradient.

    A gradient that is not finite moves nothing. ``working_copy`` (k,) receives the first k weights in its own dtype.
    """
    total, end = partials.sum(), ascent.scaled_end if ascent.adaptive else 0
    finite, factor = bool(torch.isfinite(total)), ascent.rho / (total.sqrt() + 1e-12)
    for block in _blocks(weights.numel()):
        w, g = weights[block], grads[block]
        saved[block].copy_(w)
        if finite:
            scaled = max(0, min(end - block.start, w.numel()))
            g[:scaled].mul_(_scale(w[:scaled], ascent.eta).square_())
            w.addcmul_(g, factor)
        g.zero_()
    _cast(weights, working_copy)


def _scale(weights: Tensor, eta: float) -> Tensor:
    scale = weights.abs()
    return scale.add_(eta) if eta else scale


def descend(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    descent: Descent,
    lr: Tensor | float,
    *,
    saved: Tensor | None = None,
    averages: Averages | None = None,
    coefficient: Tensor | None = None,
    working_copy: Tensor | None = None,
) -> None:
    """Restore the saved weights, take torch.optim.SGD's step, move the averages and clear the gradient.

    ``coefficient`` (1,) multiplies the gradient (unscaling, clipping); where it is not finite and ``descent.skip``
    is set, the step is left out. ``working_copy`` (k,) receives the first k new weights in its own dtype.
    """
    skip = descent.skip and coefficient is not None and not torch.isfinite(coefficient)
    for block in _blocks(weights.numel()):
        w, g = weights[block], grads[block]
        if saved is not None:
            w.copy_(saved[block])
        if not skip:
            _move(w, g if coefficient is None else g.mul_(coefficient), momentum[block], descent, lr)
        if averages is not None:
            averages.weights[block].lerp_(w, 1 - averages.decay)
        g.zero_()
    if averages is not None:
        averages.stats_average.lerp_(averages.stats, 1 - averages.decay)
    _cast(weights, working_copy)


def _move(w: Tensor, g: Tensor, momentum: Tensor, descent: Descent, lr: Tensor | float) -> None:
    """Take the step; the gradient's memory is used up."""
    if descent.weight_decay:
        g.add_(w, alpha=descent.weight_decay)
    direction = momentum.mul_(descent.momentum).add_(g)
    if descent.nesterov:
        direction = g.add_(momentum, alpha=descent.momentum)
    if isinstance(lr, Tensor):
        w.sub_(direction * lr)
    else:
        w.add_(direction, alpha=-lr)


def _cast(weights: Tensor, working_copy: Tensor | None) -> None:
    if working_copy is not None:
        working_copy.copy_(weights[: working_copy.numel()])


def average(weights: Tensor, averages: Averages) -> None:
    """Move the averages of weights (n,) and statistics (m,) towards their present values."""
    averages.weights.lerp_(weights, 1 - averages.decay)
    averages.stats_average.lerp_(averages.stats, 1 - averages.decay)
