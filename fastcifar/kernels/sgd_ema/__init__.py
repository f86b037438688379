"""The optimizer step of SGD with (Nesterov) momentum and the moving average, over one flat buffer, in one launch.

`reference` is torch.optim.SGD's formula and that of an exponential moving average.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True)
class SGDSettings:
    """torch.optim.SGD's settings: momentum in 0..1, Nesterov or not, weight decay as L2 in the gradient.

    ``skip`` leaves a step out when its coefficient is not finite; without it, such a step spoils the weights, so that
    it cannot go unseen.
    """

    momentum: float
    nesterov: bool
    weight_decay: float
    skip: bool = False


@dataclass(frozen=True)
class Averages:
    """Exponential moving averages: of the weights (n,), and of the statistics (m,) beside these themselves."""

    decay: float
    weights: Tensor
    stats: Tensor
    stats_average: Tensor


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
    """Restore the saved weights, take torch.optim.SGD's step and move the averages, in place.

    Args:
        weights: float32 (n,), changed.
        grads: float32 (n,); a CPU uses its memory up.
        momentum: float32 (n,), changed.
        settings: of SGD.
        lr: the learning rate; on a GPU float32 (1,), so that a captured graph sees it change.
        saved: float32 (n,), the weights to go back to first (after a SAM ascent step).
        averages: what to move towards the new weights.
        coefficient: float32 (1,), multiplies the gradient (unscaling, clipping).
        working_copy: bf16 or fp16 (k,), receives the first k new weights.
    """
    _for(weights).sgd_step(
        weights, grads, momentum, settings, lr,
        saved=saved, averages=averages, coefficient=coefficient, working_copy=working_copy,
    )  # fmt: skip


def average(weights: Tensor, averages: Averages) -> None:
    """Move the averages of weights (n,) and statistics (m,) towards their present values; for other optimizers."""
    averages.weights.lerp_(weights, 1 - averages.decay)
    averages.stats_average.lerp_(averages.stats, 1 - averages.decay)


def _for(tensor: Tensor) -> ModuleType:
    """Return the implementation for a tensor's device; Triton is not imported where there is no GPU."""
    if tensor.is_cuda:
        from fastcifar.kernels.sgd_ema import triton

        return triton
    from fastcifar.kernels.sgd_ema import cpu

    return cpu
