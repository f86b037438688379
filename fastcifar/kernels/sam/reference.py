"""SAM's and ASAM's ascent step as the papers write it; any floating-point dtype, float64 for the tests' oracle."""

import torch
from torch import Tensor

from fastcifar.kernels.sam import Ascent


def scale(weights: Tensor, ascent: Ascent) -> Tensor:
    """Return T: |w| + eta for the scaled elements of ASAM (Kwon et al., 2021, eq. 6), 1 elsewhere."""
    t = torch.ones_like(weights)
    if ascent.adaptive:
        t[: ascent.scaled_end] = weights[: ascent.scaled_end].abs() + ascent.eta
    return t


def ascend(weights: Tensor, grads: Tensor, ascent: Ascent) -> Tensor:
    """Return w + e, e = rho T^2 g / (||T g|| + 1e-12); a norm that is not finite gives w."""
    t = scale(weights, ascent)
    norm = (t * grads).norm()
    if not torch.isfinite(norm):
        return weights.clone()
    return weights + ascent.rho * t**2 * grads / (norm + 1e-12)
