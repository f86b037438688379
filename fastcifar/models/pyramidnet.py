"""PyramidNet (Han et al., 2017, "Deep pyramidal residual networks"), with ShakeDrop and widths for tensor cores.

The width grows by the same amount in every block: after block i of N it is 16 + ceil(alpha * i / N). Shortcuts have no
parameters: 2x2 average pooling where the image shrinks, zero channels where the width grows.

Most of these widths are no multiple of 8. With ``align = 8`` all are computed at the next multiple (see
`fastcifar.models.aligned`), and the shortcut is a plain addition wherever two neighbours share a multiple.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import PyramidNetConfig
from fastcifar.models.aligned import AlignedBatchNorm2d, AlignedConv2d, pad_channels, round_up
from fastcifar.models.norm_act import fuses, norm_act
from fastcifar.models.shakedrop import ShakeDraws, ShakeDrop, death_rates

STEM = 16
EXPANSION = {"basic": 1, "bottleneck": 4}
CONVS_PER_BLOCK = {"basic": 2, "bottleneck": 3}


def widths(config: PyramidNetConfig) -> list[int]:
    """Return the width after the stem and after each block, before the bottleneck's expansion by 4."""
    blocks = (config.depth - 2) // CONVS_PER_BLOCK[config.block]
    # -(-a // b) is the exact ceiling of a / b.
    return [STEM + -(-config.alpha * i // blocks) for i in range(blocks + 1)]


class PyramidBlock(nn.Module):
    """BN-conv-BN-ReLU-conv-BN, or BN-conv1x1-BN-ReLU-conv3x3-BN-ReLU-conv1x1-BN, plus the input.

    Args:
        inputs: true channels in.
        width: the block's width; a bottleneck puts out four times as many channels.
        stride: 1, or 2 to halve the image.
        config: ``block`` and ``align``.
        death_rate: ShakeDrop's for this block; None for none.
    """

    def __init__(self, inputs: int, width: int, stride: int, config: PyramidNetConfig, death_rate: float | None):
        super().__init__()
        align, outputs = config.align, width * EXPANSION[config.block]
        kernels, strides, channels = (3, 3), (stride, 1), (inputs, width, outputs)
        if config.block == "bottleneck":
            kernels, strides, channels = (1, 3, 1), (1, stride, 1), (inputs, width, width, outputs)  # type: ignore[assignment]
        layers: list[nn.Module] = [AlignedBatchNorm2d(inputs, align)]
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            layers += [nn.ReLU()] if i else []
            layers.append(AlignedConv2d(channels[i], channels[i + 1], kernel, step, align=align))
            layers.append(AlignedBatchNorm2d(channels[i + 1], align))
        self.branch = nn.Sequential(*layers)
        self.shakedrop = None if death_rate is None else ShakeDrop(death_rate)
        self.stride = stride
        self.channels = round_up(outputs, align)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride), widths rounded up; see `ShakeDrop`."""
        branch = self.branch(x)
        if self.shakedrop is not None:
            branch = self.shakedrop(branch, scales)
        # An image of odd side shrinks as under the branch's convolution: rounded up.
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return branch + pad_channels(shortcut, self.channels)

    def fused(self, x: Tensor, scales: Tensor | None, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same with each BatchNorm, its ReLU and, after the last one, scale and addition in one.

        Args:
            x: as in `forward`.
            scales: as in `forward`.
            sums: of ``x``; see `fastcifar.kernels.batch_norm.batch_norm`.

        Returns:
            The output and its sums: the next block starts with a BatchNorm too.
        """
        norms = [m for m in self.branch if isinstance(m, nn.BatchNorm2d)]
        convolutions = [m for m in self.branch if isinstance(m, nn.Conv2d)]
        branch, x, _ = norm_act(norms[0], x, partials=sums)
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        for convolution, norm in zip(convolutions[:-1], norms[1:-1], strict=True):
            branch, _, _ = norm_act(norm, convolution(branch), relu=True)
        out, _, sums = norm_act(norms[-1], convolutions[-1](branch), residual=shortcut, scales=scales, summarize=True)
        return out, sums


class PyramidNet(nn.Module):
    """A stem convolution with bias and BN, three stages of blocks, BN-ReLU-pool-linear."""

    def __init__(self, config: PyramidNetConfig, num_classes: int = 10):
        super().__init__()
        channels = widths(config)
        count = len(channels) - 1
        rates: list[float | None] = [None] * count
        self.draws: ShakeDraws | None = None
        if config.shakedrop:
            linear = death_rates(config.shakedrop, count)
            rates, self.draws = [*linear], ShakeDraws(linear, config.shakedrop_gate)
        self.stem = nn.Sequential(
            AlignedConv2d(3, STEM, 3, bias=True, align=config.align, pad_input=False),
            AlignedBatchNorm2d(STEM, config.align),
        )
        self.blocks = nn.ModuleList()
        for i, (inputs, width) in enumerate(pairwise(channels)):
            inputs *= EXPANSION[config.block] if i else 1
            # The first block of the second and the third stage.
            stride = 2 if i in (count // 3, 2 * count // 3) else 1
            self.blocks.append(PyramidBlock(inputs, width, stride, config, rates[i]))
        self.width = channels[-1] * EXPANSION[config.block]
        self.bn = AlignedBatchNorm2d(self.width, config.align)
        self.head = nn.Linear(self.width, num_classes)
        self.fused_batch_norm = False

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        scales = self.draws(len(x)) if self.draws is not None and self.training else [None] * len(self.blocks)
        x = self._fused(x, scales) if fuses(self, x) else self._plain(x, scales)
        # The padded channels are zero, but the head has no weights for them.
        return self.head(x.mean((2, 3))[:, : self.width])

    def _plain(self, x: Tensor, scales: Sequence[Tensor | None]) -> Tensor:
        x = self.stem(x)
        for block, scale in zip(self.blocks, scales, strict=True):
            x = block(x, scale)
        return F.relu(self.bn(x))

    def _fused(self, x: Tensor, scales: Sequence[Tensor | None]) -> Tensor:
        """Do the same with fused BatchNorm, each of which hands its output's sums to the next."""
        x, _, sums = norm_act(cast(nn.BatchNorm2d, self.stem[1]), self.stem[0](x), summarize=True)
        for block, scale in zip(self.blocks, scales, strict=True):
            x, sums = cast(PyramidBlock, block).fused(x, scale, sums)
        return norm_act(self.bn, x, relu=True, partials=sums)[0]


def build(config: PyramidNetConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return PyramidNet(config, num_classes)
