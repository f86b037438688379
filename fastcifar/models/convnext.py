"""ConvNeXt V2 (Woo et al., 2023, "ConvNeXt V2: co-designing and scaling ConvNets with masked autoencoders").

Adapted to small images by its stem: a convolution of stride 1 keeps all 32x32 pixels for the first stage, where the
published one, for 224 px, divides the side by 4 at once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import ConvNeXtV2Config
from fastcifar.models.transformer import drop_path_rates, dropped_path


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the channels of each pixel: (B, C, H, W) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in channels-last memory the two permutations move nothing."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Global response normalization: each channel is scaled by its share in the mean norm of all channels.

    y = gamma * (x * n) + beta + x with n_c = |x_c| / mean over channels of |x_c|. It starts as the identity.

    Args:
        dim: channels C, the last dimension.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        share = (norm / (norm.mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.weight.to(x.dtype) * (x * share) + self.bias.to(x.dtype) + x


class Block(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm, 1x1 to four times the channels, GELU, GRN, 1x1 back, plus the input.

    Args:
        dim: channels C.
        drop_path: probability that a sample's residual branch is left out in training.
    """

    def __init__(self, dim: int, drop_path: float):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.expand = nn.Linear(dim, 4 * dim)
        self.grn = GlobalResponseNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, dim)
        self.drop_path = dropped_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.reduce(self.grn(F.gelu(self.expand(y))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXtV2(nn.Module):
    """A stem, four stages of blocks with downsampling between them, global average pooling, LayerNorm, a linear layer.

    Args:
        config: the recipe's ``model`` table.
        num_classes: number of logits.
    """

    def __init__(self, config: ConvNeXtV2Config, num_classes: int = 10):
        super().__init__()
        widths, depths = config.widths, config.depths
        # A stem of stride 1 overlaps its windows; the published one of stride 4 cuts patches.
        stem = (
            nn.Conv2d(3, widths[0], 3, padding=1)
            if config.stem_stride == 1
            else nn.Conv2d(3, widths[0], config.stem_stride, stride=config.stem_stride)
        )
        layers: list[nn.Module] = [stem, LayerNorm(widths[0], eps=1e-6)]
        rates = iter(drop_path_rates(config.drop_path, sum(depths)))
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers += [LayerNorm(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, stride=2)]
            layers += [Block(width, next(rates)) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(self.norm(self.features(x).mean((2, 3))))


def build(config: ConvNeXtV2Config, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes."""
    return ConvNeXtV2(config, num_classes)
