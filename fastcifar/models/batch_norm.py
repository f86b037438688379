"""BatchNorm (Ioffe & Szegedy, 2015) that leaves its batch counter alone during a step."""

import torch
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

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, H, W) with the batch's statistics in training, with the running ones in evaluation."""
        mean, var, momentum = self.running_mean, self.running_var, self.fixed_momentum()
        return F.batch_norm(input, mean, var, self.weight, self.bias, self.training, momentum, self.eps)

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
