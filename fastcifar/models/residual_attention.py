"""Residual Attention Network (Wang et al., 2017, "Residual Attention Network for Image Classification"), for 32 px.

Three stages of attention modules: a trunk of residual units T(x), and beside it a mask M(x) in 0..1 that looks at the
image from further and further away and comes back; a module's output is (1 + M(x)) T(x), so that a mask of zeros leaves
the trunk as it is. All units are pre-activation bottlenecks.

For CIFAR the paper gives p = 1, t = 2 and r = 1 units, a trunk of 36 m + 20 layers, and 1.9 M parameters for
Attention-92 (m = 2), 5.1 M for Attention-236 (m = 6). It leaves channels and poolings open: 64, 128 and 256 channels
with 2, 2 and 1 poolings have both counts. (Its 8.6 M for Attention-452 do not grow with m as the first two do; this
network has 9.9 M at that depth.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import ResidualAttentionConfig
from fastcifar.models.batch_norm import BatchNorm2d

POOLINGS = (2, 2, 1)
"""How often the mask of a stage halves the side; from 32 px the three stages look at 8, 4 and 4 px."""
LAST_UNITS = 3


def norm_act_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return BatchNorm, ReLU and a convolution without bias that keeps the size, but for its stride."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(BatchNorm2d(inputs), nn.ReLU(), conv)


class Unit(nn.Module):
    """A pre-activation bottleneck (He et al., 2016): 1x1 to a quarter of the channels, 3x3, 1x1, and the shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.

    Args:
        inputs: channels in.
        outputs: channels out, a multiple of 4.
        stride: of the 3x3 convolution, 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        inner = outputs // 4
        self.norm = BatchNorm2d(inputs)
        self.narrow = nn.Conv2d(inputs, inner, 1, bias=False)
        self.middle, self.wide = norm_act_conv(inner, inner, 3, stride), norm_act_conv(inner, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        active = F.relu(self.norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.wide(self.middle(self.narrow(active))) + shortcut


class Hourglass(nn.Module):
    """Halve the side, transform, and go back to the size that came in; deeper ones lie within, with a skip around them.

    Args:
        channels: in and out.
        poolings: how often the side is halved, at least once.
    """

    def __init__(self, channels: int, poolings: int):
        super().__init__()
        self.down, self.up = Unit(channels, channels), Unit(channels, channels)
        deeper = poolings > 1
        self.inner = Hourglass(channels, poolings - 1) if deeper else None
        self.skip = Unit(channels, channels) if deeper else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        y = self.down(F.max_pool2d(x, 3, 2, 1))
        if self.inner is not None and self.skip is not None:
            y = self.inner(y) + self.skip(y)
        return F.interpolate(self.up(y), size=x.shape[-2:], mode="bilinear", align_corners=False)


class AttentionModule(nn.Module):
    """A unit, then trunk and mask side by side, (1 + M) T, then a unit.

    Args:
        channels: in and out.
        poolings: of the mask.
    """

    def __init__(self, channels: int, poolings: int):
        super().__init__()
        self.before, self.after = Unit(channels, channels), Unit(channels, channels)
        self.trunk = nn.Sequential(Unit(channels, channels), Unit(channels, channels))
        self.mask = nn.Sequential(
            Hourglass(channels, poolings), norm_act_conv(channels, channels, 1), norm_act_conv(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        x = self.before(x)
        return self.after((1 + torch.sigmoid(self.mask(x))) * self.trunk(x))


class ResidualAttention(nn.Module):
    """A convolution, three stages of a unit and ``m`` attention modules, three units, global pooling, a linear layer.

    Args:
        config: the recipe's ``model`` table.
        num_classes: number of logits.
    """

    def __init__(self, config: ResidualAttentionConfig, num_classes: int = 10):
        super().__init__()
        modules = (config.depth - 20) // 36
        inputs = config.width // 4
        layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, padding=1, bias=False)]
        for stage, poolings in enumerate(POOLINGS):
            outputs = config.width * 2**stage
            layers.append(Unit(inputs, outputs, 2 if stage else 1))
            layers += [AttentionModule(outputs, poolings) for _ in range(modules)]
            inputs = outputs
        layers += [Unit(inputs, inputs) for _ in range(LAST_UNITS)]
        self.features = nn.Sequential(*layers)
        self.norm, self.head = BatchNorm2d(inputs), nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(F.relu(self.norm(self.features(x))).mean((2, 3)))


def build(config: ResidualAttentionConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes."""
    return ResidualAttention(config, num_classes)
