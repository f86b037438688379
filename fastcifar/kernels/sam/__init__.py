"""The ascent step of SAM (Foret et al., 2021) and ASAM (Kwon et al., 2021) over one flat buffer.

Two launches and no host-device synchronization: `norm_squared` leaves partial sums of the squared gradient norm on the
device, and `ascend` adds them up where it needs them. `reference` is the formula from the papers.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True)
class Ascent:
    """The settings of an ascent step: e = rho T^2 g / (||T g|| + 1e-12), T = |w| + eta (ASAM) or 1 (SAM).

    Attributes:
        rho: radius, above 0.
        adaptive: scale by |w| + eta (ASAM) or not (SAM).
        eta: at least 0.
        scaled_end: elements of the flat buffer from here on are not scaled (biases, for ``asam.scope = "weights"``).
    """

    rho: float
    adaptive: bool
    eta: float
    scaled_end: int


def norm_squared(weights: Tensor, grads: Tensor, ascent: Ascent | None = None) -> Tensor:
    """Return the squared norm of the gradient as partial sums; their sum is the squared norm.

    Args:
        weights: float32 (n,).
        grads: float32 (n,).
        ascent: where it is adaptive, the gradient is first scaled elementwise by |w| + eta.

    Returns:
        float32 (P,), on the device.
    """
    return _for(weights).norm_squared(weights, grads, ascent)


def ascend(
    weights: Tensor, grads: Tensor, saved: Tensor, partials: Tensor, ascent: Ascent, working_copy: Tensor | None = None
) -> None:
    """Save w and move it to w + e, in place. A norm that is not finite moves nothing (an overflow in fp16).

    Args:
        weights: float32 (n,), changed.
        grads: float32 (n,), the gradient at w; a CPU uses its memory up.
        saved: float32 (n,), receives w.
        partials: what `norm_squared` returned for this gradient and ``ascent``.
        ascent: the settings.
        working_copy: bf16 or fp16 (k,), receives the first k new weights.
    """
    _for(weights).ascend(weights, grads, saved, partials, ascent, working_copy)


def _for(tensor: Tensor) -> ModuleType:
    """Return the implementation for a tensor's device; Triton is not imported where there is no GPU."""
    if tensor.is_cuda:
        from fastcifar.kernels.sam import triton

        return triton
    from fastcifar.kernels.sam import cpu

    return cpu
