"""Every family against a plain formulation of its own, in float64, on random weights and images.

The formulations below call nothing but functions, share no code with fastcifar.models, and spell out BatchNorm.
"""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional as F

from fastcifar.config.schema import (
    DeepBaselineConfig,
    LeNet5Config,
    ModelBase,
    ModelConfig,
    PyramidNetConfig,
    Residual5Config,
    Residual15Config,
    SpeedNetConfig,
    WideResNetConfig,
)
from fastcifar.models import build_model


class Weights:
    """A state dict and the two layers that use most of it."""

    def __init__(self, state: dict[str, Tensor], training: bool):
        self.state, self.training = state, training

    def __call__(self, name: str) -> Tensor | None:
        return self.state.get(name)

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self(f"{name}.bias"), stride, padding)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.state[f"{name}.weight"].T
        bias = self(f"{name}.bias")
        return y if bias is None else y + bias

    def bn(self, x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            mean = x.mean((0, 2, 3))
            var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
        return scaled * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]


def lenet5(w: Weights, x: Tensor) -> Tensor:
    x = F.max_pool2d(w.conv(x, "conv1", padding=0).clamp(min=0), 2)
    x = F.max_pool2d(w.conv(x, "conv2", padding=0).clamp(min=0), 2)
    x = w.linear(x.reshape(len(x), 400), "fc1").clamp(min=0)
    return w.linear(w.linear(x, "fc2").clamp(min=0), "fc3")


def deep_baseline(w: Weights, x: Tensor) -> Tensor:
    for i in (0, 2, 5, 7, 10):
        x = w.conv(x, f"features.{i}").clamp(min=0)
        x = F.max_pool2d(x, 2) if i in (2, 7, 10) else x
    return deep_head(w, x)


def deep_baseline_bn(w: Weights, x: Tensor) -> Tensor:
    for i in (0, 3, 7, 10, 14):
        x = w.bn(w.conv(x, f"features.{i}"), f"features.{i + 1}").clamp(min=0)
        x = F.max_pool2d(x, 2) if i in (3, 10, 14) else x
    return deep_head(w, x)


def deep_head(w: Weights, x: Tensor) -> Tensor:
    x = x.reshape(len(x), 4096)
    for i in (0, 2, 4):
        x = w.linear(x, f"head.{i}").clamp(min=0)
    return w.linear(x, "head.6")


def post_block(w: Weights, x: Tensor, name: str, stride: int = 1) -> Tensor:
    y = w.bn(w.conv(x, f"{name}.first.0", stride), f"{name}.first.1").clamp(min=0)
    y = w.bn(w.conv(y, f"{name}.second.0"), f"{name}.second.1")
    if w(f"{name}.shortcut.0.weight") is not None:
        x = w.bn(w.conv(x, f"{name}.shortcut.0", stride, padding=0), f"{name}.shortcut.1")
    return (x + y).clamp(min=0)


def residual5(w: Weights, x: Tensor) -> Tensor:
    x = w.bn(w.conv(x, "stem.0"), "stem.1").clamp(min=0)
    for i in range(8):
        x = F.max_pool2d(x, 2) if i in (2, 5, 7) else post_block(w, x, f"features.{i}")
    x = w.linear(x.reshape(len(x), 8192), "head.0").clamp(min=0)
    return w.linear(w.linear(x, "head.3").clamp(min=0), "head.6")


def residual15(w: Weights, x: Tensor) -> Tensor:
    x = w.bn(w.conv(x, "stem.0"), "stem.1").clamp(min=0)
    for i in range(10):
        x = post_block(w, x, f"features.{i}", stride=2 if i in (2, 4, 8) else 1)
    return w.linear(x.mean((2, 3)), "head")


def wide_resnet(w: Weights, x: Tensor, first_relu: bool = True, last_bn: bool = False) -> Tensor:
    x = w.conv(x, "stem")
    for i in range(6):
        name, stride = f"blocks.{i}", 2 if i in (2, 4) else 1
        pre = w.bn(x, f"{name}.bn1")
        pre = pre.clamp(min=0) if first_relu else pre
        y = w.bn(w.conv(pre, f"{name}.conv1", stride), f"{name}.bn2").clamp(min=0)
        y = w.conv(y, f"{name}.conv2")
        y = w.bn(y, f"{name}.bn3") if last_bn else y
        x = y + (w.conv(pre, f"{name}.shortcut", stride, padding=0) if i in (0, 2, 4) else x)
    return w.linear(w.bn(x, "bn").clamp(min=0).mean((2, 3)), "head")


def grow(x: Tensor, channels: int) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), channels - x.shape[1], *x.shape[2:])], 1)


def pyramid_basic(w: Weights, x: Tensor, death_rate: float = 0.0) -> Tensor:
    x = w.bn(w.conv(x, "stem.0"), "stem.1")
    for i in range(6):
        name, stride = f"blocks.{i}.branch", 2 if i in (2, 4) else 1
        y = w.bn(w.conv(w.bn(x, f"{name}.0"), f"{name}.1", stride), f"{name}.2").clamp(min=0)
        y = w.bn(w.conv(y, f"{name}.4"), f"{name}.5") * (1 - death_rate * (i + 1) / 6)
        x = F.avg_pool2d(x, 2) if stride == 2 else x
        x = grow(x, 16 + math.ceil(10 * (i + 1) / 6)) + y
    return w.linear(w.bn(x, "bn").clamp(min=0).mean((2, 3)), "head")


def pyramid_bottleneck(w: Weights, x: Tensor) -> Tensor:
    x = w.bn(w.conv(x, "stem.0"), "stem.1")
    for i in range(3):
        name, stride = f"blocks.{i}.branch", 2 if i else 1
        y = w.bn(w.conv(w.bn(x, f"{name}.0"), f"{name}.1", padding=0), f"{name}.2").clamp(min=0)
        y = w.bn(w.conv(y, f"{name}.4", stride), f"{name}.5").clamp(min=0)
        y = w.bn(w.conv(y, f"{name}.7", padding=0), f"{name}.8")
        x = F.avg_pool2d(x, 2) if stride == 2 else x
        x = grow(x, 4 * (16 + math.ceil(7 * (i + 1) / 3))) + y
    return w.linear(w.bn(x, "bn").clamp(min=0).mean((2, 3)), "head")


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def speednet(w: Weights, x: Tensor, convs: int = 2) -> Tensor:
    eps = 1e-12  # airbench's, not torch's default
    x = gelu(w.conv(x, "whitening", padding=0))
    for b in range(3):
        name = f"blocks.{b}"
        x = gelu(w.bn(F.max_pool2d(w.conv(x, f"{name}.convs.0"), 2), f"{name}.norms.0", eps))
        first = x
        x = gelu(w.bn(w.conv(x, f"{name}.convs.1"), f"{name}.norms.1", eps))
        x = gelu(w.bn(w.conv(x, f"{name}.convs.2"), f"{name}.norms.2", eps) + first) if convs == 3 else x
    return w.linear(x.flatten(2).max(2).values, "head") / 9


WRN = {"name": "wide_resnet", "depth": 16, "widen": 2, "dropout": 0.0}
CASES = {
    "lenet5": (LeNet5Config(name="lenet5"), lenet5),
    "deep_baseline": (DeepBaselineConfig(name="deep_baseline"), deep_baseline),
    "deep_baseline_bn": (DeepBaselineConfig(name="deep_baseline_bn"), deep_baseline_bn),
    "residual5": (Residual5Config(name="residual5", dropout=0.0), residual5),
    "residual15": (Residual15Config(name="residual15"), residual15),
    "wide_resnet": (WideResNetConfig(**WRN), wide_resnet),
    "wide_resnet no first relu": (
        WideResNetConfig(**WRN, first_relu=False),
        lambda w, x: wide_resnet(w, x, first_relu=False),
    ),
    "wide_resnet last bn": (
        WideResNetConfig(**WRN, first_relu=False, last_bn=True),
        lambda w, x: wide_resnet(w, x, first_relu=False, last_bn=True),
    ),
    "pyramidnet": (PyramidNetConfig(name="pyramidnet", depth=14, alpha=10), pyramid_basic),
    "pyramidnet aligned": (PyramidNetConfig(name="pyramidnet", depth=14, alpha=10, align=8), pyramid_basic),
    "pyramidnet bottleneck": (
        PyramidNetConfig(name="pyramidnet", depth=11, alpha=7, block="bottleneck"),
        pyramid_bottleneck,
    ),
    "pyramidnet bottleneck aligned": (
        PyramidNetConfig(name="pyramidnet", depth=11, alpha=7, block="bottleneck", align=16),
        pyramid_bottleneck,
    ),
    "speednet": (SpeedNetConfig(name="speednet", widths=[8, 12, 20]), speednet),
    "speednet 3 convs": (
        SpeedNetConfig(name="speednet", widths=[8, 12, 20], convs_per_block=3),
        lambda w, x: speednet(w, x, convs=3),
    ),
}


def random_model(config: ModelBase, seed: int):
    """Build a model in float64 and shake every tensor of its state, so that no default value hides a mistake."""
    model = build_model(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def images(seed: int, count: int = 3) -> Tensor:
    x = torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_a_plain_formulation(case: str, training: bool):
    config, reference = CASES[case]
    model, x = random_model(config, seed=11).train(training), images(12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(Weights(state, training), x), rtol=1e-9, atol=1e-9)


def test_evaluation_scales_each_branch_by_its_survival():
    config = PyramidNetConfig(name="pyramidnet", depth=14, alpha=10, shakedrop=0.5)
    model, x = random_model(config, seed=3).eval(), images(4)
    with torch.no_grad():
        expected = pyramid_basic(Weights(model.state_dict(), False), x, death_rate=0.5)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_running_statistics_move_as_in_torch():
    plain = random_model(PyramidNetConfig(name="pyramidnet", depth=14, alpha=10), seed=5)
    aligned = random_model(PyramidNetConfig(name="pyramidnet", depth=14, alpha=10, align=8), seed=5)
    for seed in range(3):
        plain(images(seed)), aligned(images(seed))
    for (name, a), b in zip(plain.state_dict().items(), aligned.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("image_px", [27, 64])
@pytest.mark.parametrize(
    "table",
    [
        {"name": "lenet5"},
        {"name": "deep_baseline_bn"},
        {"name": "residual5"},
        {"name": "residual15"},
        {"name": "wide_resnet", "widen": 1},
        {"name": "pyramidnet", "depth": 8, "alpha": 4, "align": 8},
        {"name": "speednet"},
    ],
    ids=lambda table: table["name"],
)
def test_other_sizes_and_classes(table: dict, image_px: int):
    config = TypeAdapter(ModelConfig).validate_python(table)
    model = build_model(config, num_classes=7, image_px=image_px, seed=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, image_px, image_px)).shape == (2, 7)
