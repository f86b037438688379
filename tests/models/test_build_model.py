"""The way in: seeds, initializations, formats."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.config import load_recipe
from fastcifar.config.schema import (
    DeepBaselineConfig,
    LeNet5Config,
    ModelConfig,
    ModelUnion,
    Residual15Config,
    WideResNetConfig,
)
from fastcifar.errors import UserError
from fastcifar.models import MODELS, SMALLEST_PX, build_model, smallest_px

SMALL = WideResNetConfig(name="wide_resnet", widen=1)


def test_every_config_has_its_builder():
    from typing import get_args

    configs = get_args(get_args(ModelUnion)[0])
    names = {name for config in configs for name in get_args(config.model_fields["name"].annotation)}
    assert names == set(MODELS)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    a = build_model(SMALL, seed=7).state_dict()
    torch.manual_seed(1)
    b, c = build_model(SMALL, seed=7).state_dict(), build_model(SMALL, seed=8).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["stem.weight"], c["stem.weight"])


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(SMALL, seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_so_is_that_of_gpus_in_use(monkeypatch: pytest.MonkeyPatch):
    forked: list[Any] = []
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.append(devices), real(devices=[]))[1])
    build_model(SMALL, seed=7)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    build_model(SMALL, seed=7)
    assert forked == [[], [0, 1]]


def test_default_weights_are_torchs_own():
    model = build_model(LeNet5Config(name="lenet5"), seed=42)
    torch.manual_seed(42)
    layers = [nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)]
    for ours, theirs in zip(model.parameters(), (p for layer in layers for p in layer.parameters()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [
        DeepBaselineConfig(name="deep_baseline_bn", init="kaiming_normal_fan_out"),
        Residual15Config(name="residual15", init="kaiming_normal_fan_out"),
    ],
    ids=lambda config: config.name,
)
def test_kaiming_normal_fan_out(config):
    for module in build_model(config, seed=1).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            deviation = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
            # Five standard errors of a standard deviation, and of a mean, of normal numbers.
            assert abs(weight.std() / deviation - 1) < 5 / math.sqrt(2 * weight.numel())
            assert abs(weight.mean() / deviation) < 5 / math.sqrt(weight.numel())
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and module.bias is not None:
            assert not module.bias.any()


@pytest.mark.parametrize("row", ["wrn-asam", "pyramid"])
def test_kaiming_normal_fan_out_conv_leaves_the_classifier_to_torch(row: str):
    narrow = {"wrn-asam": ["model.widen=1"], "pyramid": ["model.depth=14", "model.alpha=20"]}[row]
    config = load_recipe(row, narrow).model
    model = build_model(config, seed=3)
    stock, kaiming = (
        build_model(config.model_copy(update={"init": init}), seed=3) for init in ("default", "kaiming_normal_fan_out")
    )
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 1
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.weight, stock.get_submodule(name).weight)
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            deviation = math.sqrt(2 / (weight.shape[0] * weight[0, 0].numel()))
            assert abs(weight.std() / deviation - 1) < 5 / math.sqrt(2 * weight.numel())
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()
    # A new classifier knows nothing: its loss should be the logarithm of the number of classes.
    images, labels = torch.randn(256, 3, 32, 32), torch.arange(256) % 10
    loss, with_linear = (nn.functional.cross_entropy(net(images), labels) for net in (model, kaiming))
    assert abs(loss - math.log(10)) < 0.1
    assert with_linear - math.log(10) > 0.3


def test_fp32_channels_last_in_training_mode():
    model = build_model(SMALL, seed=1)
    assert model.training
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "table", [*({"name": name} for name in SMALLEST_PX), *({"name": "convnextv2", "stem_stride": k} for k in (2, 4))],
    ids=str,
)  # fmt: skip
def test_images_that_are_too_small_are_refused(table: dict[str, Any]):
    from pydantic import TypeAdapter

    from fastcifar.config.schema import ModelConfig

    config = TypeAdapter(ModelConfig).validate_python(table)
    smallest = smallest_px(config)
    with pytest.raises(UserError, match=f"{smallest} px or more"):
        build_model(config, image_px=smallest - 1, seed=1)
    model = build_model(config, image_px=smallest, seed=1).eval()
    assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 10)


class Calls(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_gradient_looks_for_equal_values(name: str):
    """Compiled in 16 bits, values that are computed again are not rounded, and equal nothing: the gradient is NaN."""
    config: Any = TypeAdapter(ModelConfig).validate_python({"name": name})
    with Calls() as calls:
        build_model(config, seed=1)(torch.rand(2, 3, 32, 32))
    assert calls.names & {"convolution", "mm", "addmm"}, "the operators were not seen"
    assert not calls.names & {"amax", "amin", "max", "min", "median"}
