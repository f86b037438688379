"""Layers that compute at widths which tensor cores like, and are stored at the widths that the paper states.

Parameters and running statistics have their true sizes. They are padded with zeros during the forward pass, and the
gradient of that padding is its removal: padded channels are zero by construction through any training, whatever the
optimizer does. Counts, saved weights, weight decay and the norms of sharpness-aware steps never see them.

Where training keeps a working copy of the weights (on a GPU by default), no pass pads anything:
`fastcifar.train.flat_parameters` hands over weights that are padded in memory, and the fused BatchNorm knows channels
without a weight.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.models.batch_norm import BatchNorm2d


def round_up(width: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``width``."""
    return -(-width // multiple) * multiple


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """Append zero channels to (B, C, H, W) until there are ``channels``, and keep channels-last."""
    extra = channels - x.shape[1]
    # F.pad alone leaves the layout to the compiler, which may choose another one.
    return F.pad(x, (0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last) if extra else x


class AlignedConv2d(nn.Conv2d):
    """A convolution between channel counts rounded up to multiples of ``align``, with weights of the true size.

    Args:
        inputs: true channels in.
        outputs: true channels out.
        kernel: side of the kernel; the size of the image is kept, stride aside.
        stride: of the convolution.
        bias: whether it has one.
        align: 1 for a plain convolution.
        pad_input: False where the input comes at its true width (the image).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        bias: bool = False,
        align: int = 1,
        pad_input: bool = True,
    ):
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.extra_inputs = round_up(inputs, align) - inputs if pad_input else 0
        self.extra_outputs = round_up(outputs, align) - outputs

    @property
    def is_padded(self) -> bool:
        """Whether the width at which it computes is not its own."""
        return bool(self.extra_inputs or self.extra_outputs)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape of the weight with its padding, (O, I, K, K)."""
        return self.out_channels + self.extra_outputs, self.in_channels + self.extra_inputs, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, inputs rounded up, H, W) to (B, outputs rounded up, H / stride, W / stride)."""
        weight, bias = self.weight, self.bias
        # The weight may be given with its padding.
        if self.is_padded and weight.shape[:2] == (self.out_channels, self.in_channels):
            weight = F.pad(weight, (0, 0, 0, 0, 0, self.extra_inputs, 0, self.extra_outputs))
            weight = weight.contiguous(memory_format=torch.channels_last)
        if bias is not None and self.extra_outputs:
            bias = F.pad(bias, (0, self.extra_outputs))
        return F.conv2d(input, weight, bias, self.stride, self.padding)


class AlignedBatchNorm2d(BatchNorm2d):
    """BatchNorm over a channel count rounded up to a multiple of ``align``; zero channels come out as exactly zero.

    Args:
        width: true number of channels.
        align: 1 for a plain BatchNorm.
    """

    def __init__(self, width: int, align: int = 1):
        super().__init__(width)
        self.extra = round_up(width, align) - width

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, width rounded up, H, W)."""
        if not self.extra:
            return super().forward(input)
        weight, bias = F.pad(self.weight, (0, self.extra)), F.pad(self.bias, (0, self.extra))
        if self.training and not self.track_running_stats:
            return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
        mean, var = F.pad(self.running_mean, (0, self.extra)), F.pad(self.running_var, (0, self.extra), value=1.0)
        output = self.normalize(input, mean, var, weight, bias)
        if self.training:
            self.running_mean.copy_(mean[: self.num_features])
            self.running_var.copy_(var[: self.num_features])
        return output
