"""BatchNorm (Ioffe & Szegedy, 2015) that leaves its batch counter alone during a step."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with fixed momentum, the same values and state dict, one launch less per pass.

    ``num_batches_tracked`` only matters to a cumulative average, which this class does not offer. Counting it in each
    layer and pass costs a PyramidNet 328 launches a step; `set_batches_tracked` writes it once an epoch instead.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    group: str | None = None
    """The name of the process group whose ranks normalize with common statistics; see `use_sync_batch_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W) with the batch's statistics in training, with the running ones in evaluation."""
        return self.normalize(input, self.running_mean, self.running_var, self.weight, self.bias)

    def normalize(self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Normalize with these running statistics, which training moves, and scale: the layer's own, or padded ones."""
        momentum = self.fixed_momentum()
        if self.group is None or not self.training:
            return F.batch_norm(input, mean, var, weight, bias, self.training, momentum, self.eps)
        return sync_batch_norm(input, weight, bias, mean, var, momentum, self.eps, self.group)

    def fixed_momentum(self) -> float:
        """Return the share of a batch's statistics in the running ones.

        Raises:
            ValueError: ``momentum`` is None.
        """
        if self.momentum is None:
            raise ValueError("a cumulative average of BatchNorm statistics (momentum = None) is not offered here")
        return self.momentum


@torch.no_grad()
def set_batches_tracked(model: nn.Module, forward_passes: Tensor) -> None:
    """Write the number of training passes, int64 (1,), into every `BatchNorm2d` of a model, for its state dict."""
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.num_batches_tracked.copy_(forward_passes[0])


def use_sync_batch_norm(model: nn.Module, group: Any) -> None:
    """Let a model's layers normalize with the statistics of all ranks of a process group in training; None: of one."""
    if group is not None:
        _groups[group.group_name] = group
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.group = None if group is None else group.group_name


def sync_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float, group: str
) -> Tensor:
    """Normalize with the statistics of all ranks: the sums, and on the way back their gradients, are added up.

    torch.nn.SyncBatchNorm does not run on a CPU, and on a GPU it waits for the host, so that nothing is captured.

    Args:
        x: (B, C, H, W) of any float dtype; ranks may have different numbers of samples.
        weight: float32 (C,), or float64.
        bias: float32 (C,).
        mean: float32 (C,), running; moved by a share of ``momentum``.
        var: float32 (C,), running and unbiased; likewise.
        momentum: in 0..1.
        eps: added to the variance.
        group: the name of the ranks' group.
    """
    wide, dims = x.to(torch.promote_types(x.dtype, weight.dtype)), (0, 2, 3)
    # Counted on the device, for the host must not be waited for.
    count = sum_over_ranks(torch.full((1,), float(x.numel() // x.shape[1]), device=x.device), group)
    batch_mean = sum_over_ranks(wide.sum(dims), group) / count
    centred = wide - batch_mean[:, None, None]
    # A second round for the variance: from the sum of squares alone it would lose its digits.
    batch_var = sum_over_ranks(centred.square().sum(dims), group) / count
    with torch.no_grad():
        mean.lerp_(batch_mean, momentum)
        var.lerp_(batch_var * (count / (count - 1)), momentum)
    scale = weight * torch.rsqrt(batch_var + eps)
    return (centred * scale[:, None, None] + bias[:, None, None]).to(x.dtype)


# An operator of our own, because torch.compile loses the gradient of torch.distributed.nn's (torch 2.11). It takes the
# name of a group, for an operator takes no object.
_groups: dict[str, Any] = {}


@torch.library.custom_op("fastcifar::sum_over_ranks", mutates_args=())
def sum_over_ranks(tensor: Tensor, group: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group that `use_sync_batch_norm` knows; so with its gradient."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


@sum_over_ranks.register_fake
def _(tensor: Tensor, group: str) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return sum_over_ranks(gradient, ctx.group), None


sum_over_ranks.register_autograd(_gradient, setup_context=_remember)
