"""Wide residual networks (Zagoruyko & Komodakis, 2016), with two variations of their block and ShakeDrop."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import WideResNetConfig
from fastcifar.models.batch_norm import BatchNorm2d
from fastcifar.models.norm_act import dropout_seeds, fuses, norm_act
from fastcifar.models.shakedrop import ShakeDraws, ShakeDrop, death_rates


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps the size, stride aside."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class WideBlock(nn.Module):
    """Pre-activation block: BN-ReLU-conv-BN-ReLU-dropout-conv, plus the input.

    Where the shape changes, the shortcut is a 1x1 convolution of the pre-activated input.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and of the shortcut.
        config: ``dropout``, ``first_relu`` (False removes the block's first ReLU), ``last_bn`` (True ends the branch
            with a BatchNorm), as in Han et al., 2017, section 4.
        death_rate: ShakeDrop's for this block; None for none.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, config: WideResNetConfig, death_rate: float | None):
        super().__init__()
        self.bn1 = BatchNorm2d(inputs)
        self.relu1 = nn.ReLU() if config.first_relu else nn.Identity()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = BatchNorm2d(outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn3 = BatchNorm2d(outputs) if config.last_bn else nn.Identity()
        self.shakedrop = None if death_rate is None else ShakeDrop(death_rate)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.fused_batch_norm = False

    def forward(self, x: Tensor, scales: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride); ``scales``: see `ShakeDrop`.

        ``seed``, int64 (1,), is what dropout draws from where BatchNorm is fused.
        """
        if fuses(self, x):
            return self._fused(x, scales, seed)
        active = self.relu1(self.bn1(x))
        branch = self.dropout(F.relu(self.bn2(self.conv1(active))))
        branch = self.bn3(self.conv2(branch))
        if self.shakedrop is not None:
            branch = self.shakedrop(branch, scales)
        return branch + (x if self.shortcut is None else self.shortcut(active))

    def _fused(self, x: Tensor, scales: Tensor | None, seed: Tensor | None) -> Tensor:
        """Do the same with BatchNorm, activation, dropout and, after a last BatchNorm, the addition in one."""
        active, x, _ = norm_act(self.bn1, x, relu=isinstance(self.relu1, nn.ReLU))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        branch, _, _ = norm_act(self.bn2, self.conv1(active), relu=True, drop=self.dropout.p, seed=seed)
        branch = self.conv2(branch)
        if isinstance(self.bn3, nn.BatchNorm2d):
            return norm_act(self.bn3, branch, residual=shortcut, scales=scales)[0]
        return (branch if self.shakedrop is None else self.shakedrop(branch, scales)) + shortcut


class WideResNet(nn.Module):
    """A stem of 16 channels, three stages of blocks at 16, 32 and 64 times ``widen`` channels, BN-ReLU-pool-linear."""

    def __init__(self, config: WideResNetConfig, num_classes: int = 10):
        super().__init__()
        per_stage = (config.depth - 4) // 6
        rates: list[float | None] = [None] * (3 * per_stage)
        self.draws: ShakeDraws | None = None
        if config.shakedrop:
            linear = death_rates(config.shakedrop, 3 * per_stage)
            rates, self.draws = [*linear], ShakeDraws(linear, config.shakedrop_gate)
        self.stem = conv3x3(3, 16)
        self.blocks = nn.ModuleList()
        inputs = 16
        for i, rate in enumerate(rates):
            stage, place = divmod(i, per_stage)
            outputs = 16 * config.widen * 2**stage
            self.blocks.append(WideBlock(inputs, outputs, 2 if stage and not place else 1, config, rate))
            inputs = outputs
        self.bn = BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)
        self.fused_batch_norm = False

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        scales = self.draws(len(x)) if self.draws is not None and self.training else [None] * len(self.blocks)
        seeds = dropout_seeds(x, len(self.blocks)) if fuses(self, x) else [None] * len(self.blocks)
        x = self.stem(x)
        for block, scale, seed in zip(self.blocks, scales, seeds, strict=True):
            x = block(x, scale, seed)
        x = norm_act(self.bn, x, relu=True)[0] if fuses(self, x) else F.relu(self.bn(x))
        return self.head(x.mean((2, 3)))


def build(config: WideResNetConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the network that ``config`` describes, with torch's default weights."""
    return WideResNet(config, num_classes)
