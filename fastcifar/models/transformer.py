"""Transformers for small images: a plain ViT and CCT, the compact convolutional transformer.

Both cut a batch of images into sequences of tokens (B, T, D), run them through encoder blocks of multi-head
self-attention and an MLP, and pool the sequence into logits. Attention is
`torch.nn.functional.scaled_dot_product_attention`, which picks the fused kernel of the device; dropping whole residual
branches is `torchvision.ops.stochastic_depth`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import CCTConfig, ViTConfig
from fastcifar.errors import UserError

POSITION_STD = 0.02
"""Standard deviation of the initial position embeddings and tokens in ViT (Dosovitskiy et al., 2021)."""
CCT_POSITION_STD = 0.2
"""The same in CCT (Hassani et al., 2021)."""


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017).

    Args:
        dim: width D of the tokens, a multiple of ``heads``.
        heads: number of heads.
        bias: whether queries, keys and values have biases.
        dropout: probability that an attention weight is dropped in training.
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        batch, tokens, dim = x.shape
        # (B, T, 3 D) -> three of (B, heads, T, D / heads)
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).reshape(batch, tokens, dim))


def mlp(dim: int, hidden: int, dropout: float = 0.0) -> nn.Sequential:
    """Return the two-layer perceptron of an encoder block, with GELU."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
    )


def dropped_path(rate: float) -> nn.Module:
    """Return a layer that leaves out whole samples with this probability in training (Huang et al., 2016)."""
    # Not imported above: it brings torch's compiler along, which a training on a CPU never needs.
    from torchvision.ops import StochasticDepth

    return StochasticDepth(rate, "row")


def drop_path_rates(last: float, blocks: int) -> list[float]:
    """Return each block's probability of being dropped: rising linearly from 0 to ``last`` (Huang et al., 2016)."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


class EncoderBlock(nn.Module):
    """A pre-norm encoder block: x + attention(LN(x)), then x + MLP(LN(x)).

    Args:
        dim: width D of the tokens.
        heads: number of attention heads.
        hidden: width of the MLP.
        dropout: probability after each layer of the MLP.
        drop_path: probability that a sample's residual branch is left out in training.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden, dropout)
        self.drop_path = dropped_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CCTBlock(nn.Module):
    """CCT's encoder block: y = LN(x + attention(LN(x))), then y + MLP(y). The second norm lies on the residual path.

    Args:
        dim: width D of the tokens.
        heads: number of attention heads.
        hidden: width of the MLP.
        dropout: probability after each layer of the MLP.
        attention_dropout: probability that an attention weight is dropped in training.
        drop_path: probability that a sample's residual branch is left out in training.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, bias=False, dropout=attention_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim, hidden, dropout)
        self.drop_path = dropped_path(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        x = self.norm2(x + self.drop_path(self.attention(self.norm1(x))))
        return x + self.drop_path(self.mlp(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021, "An image is worth 16x16 words") on patches of a few pixels.

    Each patch becomes a token through one linear map; a class token and learned position embeddings are added, and the
    logits are a linear map of the class token after the last block.

    Args:
        config: the recipe's ``model`` table.
        num_classes: number of logits.
        image_px: side of the square images, a multiple of ``config.patch``.
    """

    def __init__(self, config: ViTConfig, num_classes: int = 10, image_px: int = 32):
        super().__init__()
        dim, tokens = config.dim, (image_px // config.patch) ** 2 + 1
        self.patches = nn.Conv2d(3, dim, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, tokens, dim).normal_(std=POSITION_STD))
        self.dropout = nn.Dropout(config.dropout)
        rates = drop_path_rates(config.drop_path, config.depth)
        hidden = round(dim * config.mlp_ratio)
        blocks = [EncoderBlock(dim, config.heads, hidden, config.dropout, rate) for rate in rates]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), -1, -1), x], 1) + self.positions.to(x.dtype)
        return self.head(self.norm(self.blocks(self.dropout(x)))[:, 0])


class CCT(nn.Module):
    """Compact convolutional transformer (Hassani et al., 2021, "Escaping the big data paradigm").

    Tokens come from convolutions with ReLU and max pooling, and the sequence is pooled with weights that are a softmax
    over a linear map of each token (sequence pooling), so that there is no class token. CCT-7/3x1 is ``depth = 7``,
    ``kernel = 3``, ``convs = 1``.

    Args:
        config: the recipe's ``model`` table.
        num_classes: number of logits.
        image_px: side of the square images.
    """

    def __init__(self, config: CCTConfig, num_classes: int = 10, image_px: int = 32):
        super().__init__()
        dim, side = config.dim, image_px
        layers: list[nn.Module] = []
        for i in range(config.convs):
            # Hidden convolutions of the tokenizer have 64 channels, as published.
            inputs, outputs = 3 if i == 0 else 64, dim if i == config.convs - 1 else 64
            conv = nn.Conv2d(inputs, outputs, config.kernel, padding=config.kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
            side = (side + 1) // 2
        self.tokenizer = nn.Sequential(*layers)
        self.positions = nn.Parameter(torch.empty(1, side * side, dim))
        nn.init.trunc_normal_(self.positions, std=CCT_POSITION_STD)
        self.dropout = nn.Dropout(config.dropout)
        hidden, rates = round(dim * config.mlp_ratio), drop_path_rates(config.drop_path, config.depth)
        self.blocks = nn.Sequential(
            *(CCTBlock(dim, config.heads, hidden, config.dropout, config.attention_dropout, rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.Linear(dim, 1)
        self.head = nn.Linear(dim, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        x = self.tokenizer(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(self.dropout(x + self.positions.to(x.dtype))))
        shares = self.pool(x).softmax(1)  # (B, T, 1)
        return self.head((shares.transpose(1, 2) @ x).squeeze(1))


def _initialize(model: nn.Module) -> None:
    """Draw linear weights from a normal distribution cut off at two units, with deviation 0.02; biases start at 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build_vit(config: ViTConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes.

    Raises:
        UserError: the images cannot be cut into whole patches.
    """
    if image_px % config.patch:
        raise UserError(f"model.patch = {config.patch} does not divide the images' {image_px} px")
    return ViT(config, num_classes, image_px)


def build_cct(config: CCTConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes."""
    return CCT(config, num_classes, image_px)
