"""Shake-Shake regularization (Gastaldi, 2017): two residual branches, mixed by shares that differ on the way back."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import ShakeShakeConfig
from fastcifar.models.batch_norm import BatchNorm2d

STEM_CHANNELS = 16


class ShakeShake(torch.autograd.Function):
    """Mix two branches as alpha * a + (1 - alpha) * b, and their gradients with a share beta of their own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """Mix ``a`` and ``b`` (B, C, H, W) by ``alpha`` (B, 1, 1, 1); the gradients are mixed by ``beta``, likewise."""
        ctx.save_for_backward(beta)
        return alpha * a + (1 - alpha) * b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of both branches, each (B, C, H, W)."""
        (beta,) = ctx.saved_tensors
        return beta * grads[0], (1 - beta) * grads[0], None, None


def branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return one residual branch: ReLU-conv3x3-BN-ReLU-conv3x3-BN."""
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), BatchNorm2d(outputs),
        nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), BatchNorm2d(outputs),
    )  # fmt: skip


class Shortcut(nn.Module):
    """The shortcut where the shape changes: two subsamplings of ReLU(x), one shifted by a pixel, 1x1 convolutions, BN.

    Args:
        inputs: channels of the input.
        outputs: channels of the output, even.
        stride: 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # By its stride a convolution subsamples without a copy.
        self.straight = nn.Conv2d(inputs, outputs // 2, 1, stride, bias=False)
        self.shifted = nn.Conv2d(inputs, outputs // 2, 1, stride, bias=False)
        self.norm = BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        x = F.relu(x)
        moved = F.pad(x, (-1, 1, -1, 1))  # to the left and up; zeros come in
        return self.norm(torch.cat([self.straight(x), self.shifted(moved)], 1))


class Block(nn.Module):
    """Two branches, mixed in training by shares drawn for each sample and pass, in evaluation half and half.

    The shares come from torch's generator, as those of dropout do: the step seeds it for each epoch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first, self.second = branch(inputs, outputs, stride), branch(inputs, outputs, stride)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        a, b = self.first(x), self.second(x)
        if not self.training:
            return self.shortcut(x) + 0.5 * (a + b)
        alpha, beta = torch.rand(2, len(x), 1, 1, 1, device=x.device).to(a.dtype).unbind()
        return self.shortcut(x) + ShakeShake.apply(a, b, alpha, beta)


class ShakeShakeNet(nn.Module):
    """ResNet 6n + 2 of two-branch blocks in three stages, from ``width`` channels to four times as many.

    26 2x64d is ``depth = 26``, ``width = 64``.

    Args:
        config: the recipe's ``model`` table.
        num_classes: number of logits.
    """

    def __init__(self, config: ShakeShakeConfig, num_classes: int = 10):
        super().__init__()
        per_stage = (config.depth - 2) // 6
        self.stem = nn.Sequential(nn.Conv2d(3, STEM_CHANNELS, 3, padding=1, bias=False), BatchNorm2d(STEM_CHANNELS))
        blocks: list[nn.Module] = []
        inputs = STEM_CHANNELS
        for stage in range(3):
            outputs = config.width * 2**stage
            for i in range(per_stage):
                blocks.append(Block(inputs, outputs, 2 if stage and i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(F.relu(self.blocks(self.stem(x))).mean((2, 3)))


def build(config: ShakeShakeConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes."""
    return ShakeShakeNet(config, num_classes)
