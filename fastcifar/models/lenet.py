"""LeNet-5 (LeCun et al., 1998, "Gradient-based learning applied to document recognition"), ReLU and max pooling."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import LeNet5Config


class LeNet5(nn.Module):
    """Two 5x5 convolutions without padding, each with a 2x2 max pooling, and three linear layers.

    Args:
        num_classes: number of logits.
        image_px: side of the square input; 16 or more.
    """

    def __init__(self, num_classes: int = 10, image_px: int = 32):
        super().__init__()
        side_px = ((image_px - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side_px * side_px, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def build(config: LeNet5Config, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return LeNet5(num_classes, image_px)
