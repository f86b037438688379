"""The naive definition of the fused BatchNorm, in plain torch and any precision; autograd differentiates it.

The tests give it float64. Nothing else calls it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Normalized(NamedTuple):
    """What `batch_norm` returns: the output (B, C, H, W), and the moved running statistics, both (C,)."""

    output: Tensor
    running_mean: Tensor
    running_var: Tensor


class TwoScales(torch.autograd.Function):
    """Scale each sample by one factor, and its gradient by another (ShakeDrop; Yamada et al., 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W) times ``scales[0]`` (B,)."""
        ctx.save_for_backward(scales)
        return x * scales[0][:, None, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient times ``scales[1]`` (B,)."""
        (scales,) = ctx.saved_tensors
        return grads[0] * scales[1][:, None, None, None], None


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    keep: Tensor | None = None,
    scales: Tensor | None = None,
    residual: Tensor | None = None,
) -> Normalized:
    """Normalize a batch with its own statistics (Ioffe & Szegedy, 2015), activate, scale, and add a shortcut.

    The biased variance normalizes, the unbiased one goes into the running average.

    Args:
        x: (B, C, H, W), any float dtype; B * H * W above 1.
        weight: (C,).
        bias: (C,).
        running_mean: (C,), not changed.
        running_var: (C,), not changed.
        momentum: share of this batch in the running statistics, 0..1.
        eps: added to the variance.
        relu: whether negative values become 0.
        keep: (B, C, H, W), dropout's factors (0 or 1 / (1 - p)); None for none.
        scales: (2, B), each sample's forward and backward factor; None for none.
        residual: (B, R, H, W), R <= C, added to the first R channels (PyramidNet pads its shortcut with zeros).
    """
    mean = x.mean((0, 2, 3))
    centered = x - mean[:, None, None]
    var = (centered * centered).mean((0, 2, 3))
    count = x.numel() // x.shape[1]
    y = centered / torch.sqrt(var + eps)[:, None, None] * weight[:, None, None] + bias[:, None, None]
    y = y.relu() if relu else y
    y = y if keep is None else y * keep
    y = y if scales is None else TwoScales.apply(y, scales)
    if residual is not None:
        y = y + F.pad(residual, (0, 0, 0, 0, 0, x.shape[1] - residual.shape[1]))
    unbiased = var.detach() * count / (count - 1)
    moved_mean = running_mean + momentum * (mean.detach() - running_mean)
    return Normalized(y, moved_mean, running_var + momentum * (unbiased - running_var))
