"""A deeper plain network than LeNet-5: five 3x3 convolutions and four linear layers, BatchNorm where asked for."""

from torch import Tensor, nn

from fastcifar.config.schema import DeepBaselineConfig
from fastcifar.models.batch_norm import BatchNorm2d

WIDTHS = (32, 64, 128, 128, 256)
POOL_AFTER = (1, 3, 4)
"""The convolutions (counted from 0) that a 2x2 max pooling follows."""


class DeepBaseline(nn.Module):
    """Convolutions 3-32-64-pool-128-128-pool-256-pool, then linear layers to 512, 256, 128 and the classes.

    Args:
        num_classes: number of logits.
        image_px: side of the square input; 8 or more.
        batch_norm: put BatchNorm (Ioffe & Szegedy, 2015) between each convolution and its ReLU.
    """

    def __init__(self, num_classes: int = 10, image_px: int = 32, *, batch_norm: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += [BatchNorm2d(outputs)] if batch_norm else []
            layers.append(nn.ReLU())
            layers += [nn.MaxPool2d(2)] if i in POOL_AFTER else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(WIDTHS[-1] * (image_px // 8) ** 2, 512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(self.features(x).flatten(1))


def build(config: DeepBaselineConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return DeepBaseline(num_classes, image_px, batch_norm=config.name == "deep_baseline_bn")
