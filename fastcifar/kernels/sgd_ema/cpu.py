"""The optimizer step on a CPU: plain torch, in blocks that stay in a core's cache, so that memory is read once."""

import torch
from torch import Tensor

from fastcifar.kernels.sam.cpu import blocks
from fastcifar.kernels.sgd_ema import Averages, SGDSettings

BLOCK = 2**17  # elements: the six buffers of a block take 3 MB


def sgd_step(
    weights: Tensor,
    grads: Tensor,
    momentum: Tensor,
    settings: SGDSettings,
    lr: Tensor | float,
    *,
    saved: Tensor | None = None,
    averages: Averages | None = None,
    coefficient: Tensor | None = None,
    working_copy: Tensor | None = None,
) -> None:
    """Take the step; see `fastcifar.kernels.sgd_ema.sgd_step`. The gradient's memory is used up."""
    skip = settings.skip and coefficient is not None and not torch.isfinite(coefficient)
    for block in blocks(weights.numel(), BLOCK):
        w, g = weights[block], grads[block]
        if saved is not None:
            w.copy_(saved[block])
        if not skip:
            _move(w, g if coefficient is None else g.mul_(coefficient), momentum[block], settings, lr)
        if averages is not None:
            # While the block is in the cache; a second loop would read all weights again.
            averages.weights[block].lerp_(w, 1 - averages.decay)
    if averages is not None:
        averages.stats_average.lerp_(averages.stats, 1 - averages.decay)
    if working_copy is not None:
        working_copy.copy_(weights[: working_copy.numel()])


def _move(w: Tensor, g: Tensor, momentum: Tensor, settings: SGDSettings, lr: Tensor | float) -> None:
    """Move one block's weights and momentum."""
    if settings.weight_decay:
        g.add_(w, alpha=settings.weight_decay)
    direction = momentum.mul_(settings.momentum).add_(g)
    if settings.nesterov:
        direction = g.add_(momentum, alpha=settings.momentum)
    if isinstance(lr, Tensor):
        w.sub_(direction * lr)
    else:
        w.add_(direction, alpha=-lr)
