"""The ascent step on a CPU: plain torch, in blocks that stay in a core's cache, so that memory is read once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastcifar.kernels.sam import Ascent

BLOCK = 2**17  # elements: the buffers of a block take 2 MB


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` elements that cover 0..n."""
    return (slice(start, start + size) for start in range(0, n, size))


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm in partial sums; see `fastcifar.kernels.sam.norm_squared`."""
    if ascent is None or not ascent.adaptive:
        return torch.dot(grads, grads)[None]
    # Biases and the like count with their plain gradient.
    rest = grads[ascent.scaled_end :]
    parts = [torch.dot(rest, rest)]
    for block in blocks(ascent.scaled_end, BLOCK):
        block = slice(block.start, min(block.stop, ascent.scaled_end))
        scaled = _scale(weights[block], ascent.eta).mul_(grads[block])
        parts.append(torch.dot(scaled, scaled))
    return torch.stack(parts)


def ascend(
    weights: Tensor, grads: Tensor, saved: Tensor, partials: Tensor, ascent: Ascent, working_copy: Tensor | None = None
) -> None:
    """Save w and move it to w + e; see `fastcifar.kernels.sam.ascend`. The gradient's memory is used up."""
    total, end = partials.sum(), ascent.scaled_end if ascent.adaptive else 0
    # On a CPU reading a value costs nothing; the Triton kernel selects instead.
    finite, factor = bool(torch.isfinite(total)), ascent.rho / (total.sqrt() + 1e-12)
    for block in blocks(weights.numel(), BLOCK):
        w, g = weights[block], grads[block]
        saved[block].copy_(w)
        if finite:
            scaled = max(0, min(end - block.start, w.numel()))
            # T^2 g: once for the metric, once because the step is measured in it (Kwon et al., eq. 8).
            g[:scaled].mul_(_scale(w[:scaled], ascent.eta).square_())
            w.addcmul_(g, factor)
    if working_copy is not None:
        # The second pass reads the copy, so that it must be at w + e as well.
        working_copy.copy_(weights[: working_copy.numel()])


def _scale(weights: Tensor, eta: float) -> Tensor:
    scale = weights.abs()
    return scale.add_(eta) if eta else scale
