"""torch.optim.SGD's formula and an exponential moving average; any floating-point dtype, float64 for the tests."""

import torch
from torch import Tensor

from fastcifar.kernels.sgd_ema import SGDSettings


def sgd_step(
    weights: Tensor, grads: Tensor, momentum: Tensor, settings: SGDSettings, lr: float, coefficient: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the new weights and momentum (Sutskever et al., 2013, in torch.optim.SGD's form)."""
    if settings.skip and not torch.isfinite(torch.tensor(coefficient)):
        return weights.clone(), momentum.clone()
    gradient = coefficient * grads + settings.weight_decay * weights
    momentum = settings.momentum * momentum + gradient
    direction = gradient + settings.momentum * momentum if settings.nesterov else momentum
    return weights - lr * direction, momentum


def average(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """Return the exponential moving average after one more value."""
    return decay * old + (1 - decay) * new
