"""Residual networks of post-activation blocks (He et al., 2016, "Deep residual learning for image recognition")."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import Residual5Config, Residual15Config
from fastcifar.models.batch_norm import BatchNorm2d

STAGES_15 = ((64, 2, 1), (128, 2, 2), (256, 4, 2), (512, 2, 2))
"""Of residual15: channels, blocks, stride of the first block."""


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size (stride aside), with its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the input (through a 1x1 convolution and BN where the shape changes), ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Residual5(nn.Module):
    """Five basic blocks from 64 to 512 channels with max pooling between them, and a three-layer head.

    Args:
        num_classes: number of logits.
        image_px: side of the square input; 8 or more.
        dropout: probability after each hidden layer of the head (Srivastava et al., 2014).
    """

    def __init__(self, num_classes: int = 10, image_px: int = 32, dropout: float = 0.1):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 64), nn.ReLU())
        self.features = nn.Sequential(
            BasicBlock(64, 64),
            BasicBlock(64, 128),
            nn.MaxPool2d(2),
            BasicBlock(128, 256),
            BasicBlock(256, 256),
            nn.MaxPool2d(2),
            BasicBlock(256, 512),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(512 * (image_px // 8) ** 2, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(self.features(self.stem(x)).flatten(1))


class Residual15(nn.Module):
    """Ten basic blocks in four stages from 64 to 512 channels, global average pooling and one linear layer."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 64), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, count, stride in STAGES_15:
            for i in range(count):
                blocks.append(BasicBlock(inputs, outputs, stride if i == 0 else 1))
                inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(self.features(self.stem(x)).mean((2, 3)))


def build_residual5(config: Residual5Config, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return Residual5(num_classes, image_px, config.dropout)


def build_residual15(config: Residual15Config, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return Residual15(num_classes)
