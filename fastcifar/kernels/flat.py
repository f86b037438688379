"""The settings of the flat parameters' operations, and the choice between Triton and plain torch by device."""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True)
class Ascent:
    """The ascend of SAM (Foret et al., 2021) or ASAM (Kwon et al., 2021).

    Attributes:
        rho: radius, above 0.
        adaptive: scale by |w| + eta (ASAM) or not (SAM).
        eta: at least 0.
        scaled_end: elements of the flat buffer from here on are not scaled (biases, for scope "weights").
    """

    rho: float
    adaptive: bool
    eta: float
    scaled_end: int


@dataclass(frozen=True)
class Descent:
    """torch.optim.SGD's settings: momentum in 0..1, Nesterov or not, weight decay as L2 in the gradient.

    ``skip`` leaves a step out when its coefficient is not finite (fp16); without it, such a step spoils the weights,
    so that it cannot go unseen.
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


def operations(tensor: Tensor) -> ModuleType:
    """Return the module whose ``norm_squared``, ``ascend`` and ``descend`` suit the device of ``tensor``."""
    if tensor.is_cuda:
        from fastcifar.kernels import flat_triton as kernels

        return kernels
    from fastcifar.kernels import flat_cpu as plain

    return plain
