"""BatchNorm with what surrounds it in one operator, where a model asks for it and the device has it.

A network that can do so has an attribute ``fused_batch_norm``, as have its blocks: False at first, switched by
`use_fused_batch_norm`. Evaluation, the CPU and widths that were rounded up (see `fastcifar.models.aligned`) always take
the plain layers, so that nothing changes there.
"""

from typing import cast

import torch
from torch import Tensor, nn

from fastcifar.kernels.batch_norm import batch_norm


def use_fused_batch_norm(model: nn.Module, on: bool) -> None:
    """Let a model's BatchNorm layers run fused in training on a GPU, or not. Models that cannot are left alone."""
    on = on and not any(getattr(module, "extra", 0) for module in model.modules())
    for module in model.modules():
        if hasattr(module, "fused_batch_norm"):
            module.fused_batch_norm = on  # type: ignore[assignment]


def fuses(module: nn.Module, x: Tensor) -> bool:
    """Tell whether this module's BatchNorm layers run fused on ``x``."""
    return bool(module.fused_batch_norm) and module.training and x.is_cuda


def dropout_seeds(x: Tensor, count: int) -> list[Tensor]:
    """Draw what fused dropout needs for one forward pass: ``count`` tensors int64 (1,), from torch's generator."""
    return list(torch.randint(2**31 - 1, (count, 1), device=x.device))


def norm_act(
    norm: nn.BatchNorm2d,
    x: Tensor,
    *,
    relu: bool = False,
    drop: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply a BatchNorm layer in training mode, and what follows it; see `fastcifar.kernels.batch_norm.batch_norm`.

    ``num_batches_tracked`` is not counted: the momentum is fixed, so that nothing reads it.

    Returns:
        The output, and ``x`` for a shortcut that starts before the layer.

    Raises:
        ValueError: the layer has no fixed momentum.
    """
    if norm.momentum is None:
        raise ValueError("a cumulative average of BatchNorm statistics is not offered with fused BatchNorm")
    tracked = norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if tracked else (None, None)
    weight, bias = cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    return batch_norm(x, weight, bias, mean, var, residual, scales, seed, norm.momentum, norm.eps, relu, drop)
