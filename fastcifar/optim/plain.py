"""The arena's three operations in plain torch: what the Triton kernels must equal, and what a CPU runs.

All tensors are flat float32 buffers of one size n unless stated otherwise. See `fastcifar.optim.kernels`.
"""

import torch
from torch import Tensor

from fastcifar.optim.flat import Ascent, Averages, Descent


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm of the gradient, scaled elementwise by |w| + eta where ``ascent`` is adaptive: (1,)."""
    if ascent is None or not ascent.adaptive:
        return torch.dot(grads, grads)[None]
    scaled = _scale(weights[: ascent.scaled_end], ascent.eta).mul_(grads[: ascent.scaled_end])
    rest = grads[ascent.scaled_end :]
    return (torch.dot(scaled, scaled) + torch.dot(rest, rest))[None]


def ascend(
    weights: Tensor, grads: Tensor, saved: Tensor, partials: Tensor, ascent: Ascent, shadow: Tensor | None = None
) -> None:
    """Save the weights, climb by e = rho T^2 g / (||T g|| + 1e-12), T = |w| + eta or 1, and clear the gradient.

    A gradient that is not finite moves nothing. ``shadow`` (k,) receives the first k weights in its own dtype.
    """
    saved.copy_(weights)
    total = partials.sum()
    if torch.isfinite(total):
        end = ascent.scaled_end if ascent.adaptive else 0
        grads[:end].mul_(_scale(weights[:end], ascent.eta).square_())
        weights.addcmul_(grads, ascent.rho / (total.sqrt() + 1e-12))
    grads.zero_()
    _cast(weights, shadow)


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
    shadow: Tensor | None = None,
) -> None:
    """Restore the saved weights, take torch.optim.SGD's step, move the averages and clear the gradient.

    ``coefficient`` (1,) multiplies the gradient (unscaling, clipping); where it is not finite and ``descent.skip``
    is set, the step is left out. ``shadow`` (k,) receives the first k new weights in its own dtype.
    """
    if saved is not None:
        weights.copy_(saved)
    if not descent.skip or coefficient is None or torch.isfinite(coefficient):
        if coefficient is not None:
            grads.mul_(coefficient)
        if descent.weight_decay:
            grads.add_(weights, alpha=descent.weight_decay)
        direction = momentum.mul_(descent.momentum).add_(grads)
        if descent.nesterov:
            direction = grads.add_(momentum, alpha=descent.momentum)
        if isinstance(lr, Tensor):
            weights.sub_(direction.mul(lr))
        else:
            weights.add_(direction, alpha=-lr)
    if averages is not None:
        average(weights, averages)
    grads.zero_()
    _cast(weights, shadow)


def _cast(weights: Tensor, shadow: Tensor | None) -> None:
    if shadow is not None:
        shadow.copy_(weights[: shadow.numel()])


def average(weights: Tensor, averages: Averages) -> None:
    """Move the averages of weights (n,) and statistics (m,) towards their present values."""
    averages.weights.lerp_(weights, 1 - averages.decay)
    averages.stats_average.lerp_(averages.stats, 1 - averages.decay)
