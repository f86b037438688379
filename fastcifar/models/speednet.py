"""A small network in the manner of the CIFAR-10 speed records (Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds").

What makes it learn in a few epochs: a first layer that whitens 2x2 patches and is computed from the training images
instead of learnt, BatchNorm without a learnt scale, convolutions that start near the identity, and logits scaled down.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import SpeedNetConfig
from fastcifar.models.batch_norm import BatchNorm2d
from fastcifar.models.hooks import Learning

PATCH_PX = 2
PATCH_VALUES = 3 * PATCH_PX**2
WHITEN_WIDTH = 2 * PATCH_VALUES
EIGENVALUE_FLOOR = 5e-4
"""Added to the eigenvalues, so that directions that hold mostly noise are not blown up."""
BATCH_NORM_EPS = 1e-12
"""As published: the scale is fixed, so that a channel of small variance has no other way to count."""


class BiasBatchNorm2d(BatchNorm2d):
    """BatchNorm whose scale stays 1: a buffer, not a parameter, so that no optimizer sees it."""

    def __init__(self, width: int, momentum: float):
        super().__init__(width, eps=BATCH_NORM_EPS, momentum=momentum)
        scale = self.weight.detach()
        del self.weight
        self.register_buffer("weight", scale)


class Whitening(nn.Module):
    """A 2x2 convolution onto the eigenvectors of the training patches, both signs, each scaled to variance 1.

    The filters are a buffer of 2 * 12 filters, random until `fit` computes them. Only the bias is learnt, and only
    while ``learning`` is 1. It starts at torch's default for a convolution (airbench94) or at 0 (airbench96).
    """

    weight: Tensor
    learning: Tensor

    def __init__(self, bias: str = "default") -> None:
        super().__init__()
        conv = nn.Conv2d(3, WHITEN_WIDTH, PATCH_PX)
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("learning", torch.ones(()), persistent=False)
        assert conv.bias is not None  # Conv2d makes one unless told otherwise
        self.bias = nn.Parameter(conv.bias.detach().clone() if bias == "default" else torch.zeros(WHITEN_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to (B, 24, S - 1, S - 1)."""
        # A factor instead of requires_grad, so that a captured graph stays valid when the bias stops learning.
        bias = self.bias * self.learning + self.bias.detach() * (1 - self.learning)
        return F.conv2d(x, self.weight, bias)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Compute the filters from images (N, 3, S, S), normalized as in training; a few thousand are enough."""
        # (N, 3, S - 1, S - 1, 2, 2), a view, to (N, positions, 12).
        windows = images.to(torch.float64).unfold(2, PATCH_PX, 1).unfold(3, PATCH_PX, 1)
        patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(len(images), -1, PATCH_VALUES)
        centred = patches - patches.mean((0, 1))
        # A batch of one small product an image, rather than one product of 12 rows and millions of columns.
        covariance = (centred.mT @ centred).sum(0) / (centred.shape[0] * centred.shape[1] - 1)
        values, vectors = torch.linalg.eigh(covariance.cpu())
        # The sign of an eigenvector is arbitrary: fix it, so that every machine gets the same filters.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        filters = (vectors * largest.sign() / (values + EIGENVALUE_FLOOR).sqrt()).T
        filters = filters.reshape(PATCH_VALUES, 3, PATCH_PX, PATCH_PX)
        self.weight.copy_(torch.cat([filters, -filters]))


class SpeedBlock(nn.Module):
    """conv-pool-BN-GELU, then conv-BN-GELU once, or twice with a residual connection around both.

    As in airbench96 since June 2024, the residual is what goes into the second convolution, and the third one's GELU
    comes after the sum.

    Args:
        inputs: channels in.
        outputs: channels out.
        convs: 2 or 3.
        bn_momentum: share of a batch in the running statistics, in 0..1.
    """

    def __init__(self, inputs: int, outputs: int, convs: int, bn_momentum: float):
        super().__init__()
        self.convs = nn.ModuleList(near_identity(inputs if i == 0 else outputs, outputs) for i in range(convs))
        self.norms = nn.ModuleList(BiasBatchNorm2d(outputs, bn_momentum) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H // 2, W // 2)."""
        x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        before = x
        x = F.gelu(self.norms[1](self.convs[1](x)))
        return x if len(self.convs) == 2 else F.gelu(self.norms[2](self.convs[2](x)) + before)


def near_identity(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution without bias whose first filters pass their channel through."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    passed = min(inputs, outputs)
    nn.init.dirac_(conv.weight[:passed])
    return conv


class SpeedNet(nn.Module):
    """Whitening, GELU, three blocks, global max pooling and a linear layer without bias whose output is scaled.

    Call `fit_images` before training and, where the bias of the whitening layer is to stop learning after some epochs,
    `begin_epoch` before each. `learning_epochs` tells the optimizer of that bias, because weight decay and momentum
    would move it without any gradient.
    """

    images_to_fit = 5000

    def __init__(self, config: SpeedNetConfig, num_classes: int = 10):
        super().__init__()
        self.scale = config.scale
        self.whiten_bias_epochs, self.whiten_bias_rate = config.whiten_bias_epochs, config.whiten_bias_rate
        self.whitening = Whitening(config.whiten_bias_init)
        channels = [WHITEN_WIDTH, *config.widths]
        self.blocks = nn.Sequential(
            *(
                SpeedBlock(inputs, outputs, config.convs_per_block, config.bn_momentum)
                for inputs, outputs in pairwise(channels)
            )
        )
        self.head = nn.Linear(channels[-1], num_classes, bias=False)
        if config.head_std:
            with torch.no_grad():
                self.head.weight.mul_(config.head_std / self.head.weight.std())

    def fit_images(self, images: Tensor) -> None:
        """Compute the first layer's filters from training images, float (N, 3, S, S), normalized as in training."""
        self.whitening.fit(images)

    def begin_epoch(self, epoch: int) -> None:
        """Stop the first layer's bias from learning once ``whiten_bias_epochs`` epochs (counted from 0) are done."""
        self.whitening.learning.fill_(float(epoch < self.whiten_bias_epochs))

    def learning_epochs(self) -> dict[str, Learning]:
        """Return how long the first layer's bias learns; see `fastcifar.models.hooks.StopsLearning`."""
        return {"whitening.bias": Learning(self.whiten_bias_epochs, fade=self.whiten_bias_rate == "fade")}

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        x = self.blocks(F.gelu(self.whitening(x)))
        # Not `amax`: its gradient looks for the values that equal the maximum, and compiled code that computes them
        # again, without rounding to 16 bits in between, finds none and divides by that count of 0.
        return self.head(F.max_pool2d(x, x.shape[2:]).flatten(1)) * self.scale


def build(config: SpeedNetConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with its own initial weights."""
    return SpeedNet(config, num_classes)
