"""BatchNorm with what surrounds it in one operator, where a model asks for it and the device has it.

A network that can do so has an attribute ``fused_batch_norm``, as have its blocks: False at first, switched by
`use_fused_batch_norm`. Evaluation and the CPU always take the plain layers, so that nothing changes there.
"""

from typing import cast

import torch
from torch import Tensor, nn

from fastcifar.kernels.batch_norm import batch_norm


def use_fused_batch_norm(model: nn.Module, on: bool) -> None:
    """Let a model's BatchNorm layers run fused in training on a GPU, or not. Models that cannot are left alone."""
    for module in model.modules():
        if hasattr(module, "fused_batch_norm"):
            module.fused_batch_norm = on  # type: ignore[assignment]
        if on and isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_stats = joined(module)  # type: ignore[assignment]


def joined(norm: nn.BatchNorm2d) -> tuple[Tensor, int]:
    """Return a layer's running statistics as one tensor over their memory, and where in it the variance begins.

    In flat parameters they lie one after the other. Elsewhere they are moved into one tensor first.
    """
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    at = int(variance.storage_offset() - mean.storage_offset())
    if mean.untyped_storage().data_ptr() != variance.untyped_storage().data_ptr() or at < len(mean):
        both, at = torch.cat([mean.detach(), variance.detach()]), len(mean)
        norm.running_mean, norm.running_var = both[:at], both[at:]
        mean = norm.running_mean
    return mean.detach().as_strided((at + len(variance),), (1,), mean.storage_offset()), at


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
    partials: Tensor | None = None,
    summarize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a BatchNorm layer in training mode, and what follows it; see `fastcifar.kernels.batch_norm.batch_norm`.

    ``num_batches_tracked`` is not counted: the momentum is fixed, so that nothing reads it.

    Returns:
        The output, ``x`` for a shortcut that starts before the layer, and with ``summarize`` the output's sums, the
        ``partials`` of a layer that reads it next.

    Raises:
        ValueError: the layer has no fixed momentum.
    """
    if norm.momentum is None:
        raise ValueError("a cumulative average of BatchNorm statistics is not offered with fused BatchNorm")
    running, variance_at = cast(tuple[Tensor, int], norm.running_stats) if norm.track_running_stats else (None, 0)
    weight, bias = cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    return batch_norm(
        x, weight, bias, running, variance_at, residual, scales, seed, norm.momentum, norm.eps, relu, drop,
        partials, summarize,
    )  # fmt: skip
