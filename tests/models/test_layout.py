"""Channels-last in, channels-last out: every layer, forward and backward, and under a compiler that chooses layouts."""

from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcifar.config.schema import ModelConfig, PyramidNetConfig
from fastcifar.models import bind_counter, build_model
from fastcifar.models.aligned import pad_channels
from fastcifar.models.pyramidnet import PyramidBlock

PYRAMID = {"name": "pyramidnet", "depth": 14, "alpha": 10, "shakedrop": 0.5}
SMALL = {
    "lenet5": {"name": "lenet5"},
    "deep_baseline_bn": {"name": "deep_baseline_bn"},
    "residual5": {"name": "residual5"},
    "residual15": {"name": "residual15"},
    "wide_resnet": {"name": "wide_resnet", "widen": 1, "shakedrop": 0.3},
    "wide_resnet last bn": {"name": "wide_resnet", "widen": 1, "first_relu": False, "last_bn": True},
    "pyramidnet": PYRAMID,
    "pyramidnet aligned": {**PYRAMID, "align": 8},
    "bottleneck": {**PYRAMID, "depth": 11, "block": "bottleneck"},
    "bottleneck aligned": {**PYRAMID, "depth": 11, "block": "bottleneck", "align": 8},
    "speednet": {"name": "speednet", "widths": [8, 8, 8]},
}


def ready(case: str) -> nn.Module:
    model = build_model(TypeAdapter(ModelConfig).validate_python(SMALL[case]), seed=1)
    bind_counter(model, torch.ones(1, dtype=torch.int64), seed=1)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def odd(x: object) -> bool:
    """Whether ``x`` holds images in another format than channels-last; images of one pixel have every format."""
    return isinstance(x, Tensor) and x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", SMALL)
def test_every_layer_keeps_channels_last(case: str, precision: torch.dtype | None):
    model, wrong, seen = ready(case), [], []

    def check(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen.append(name)
            wrong.extend([name] if any(map(odd, [*inputs, output])) else [])

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(check(name))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: wrong.extend([f"grad of {name}"] if odd(grad) else []))
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        model(images()).sum().backward()
    assert len(seen) > 5
    assert wrong == []


class FourDimensional(TorchDispatchMode):
    """Collects the operations, backward ones too, that put out images in another format."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.wrong += [str(func) for x in outputs if odd(x) and len(x) == 2]
        return result


@pytest.mark.parametrize("case", ["residual15", "wide_resnet", "pyramidnet", "pyramidnet aligned", "bottleneck"])
def test_every_operation_of_a_training_step_keeps_channels_last(case: str):
    model, x = ready(case), images()
    with FourDimensional() as mode:
        model(x).square().sum().backward()
    # The gradient of the global mean is one value per channel, spread over the image in no image's format; the
    # backward of the ReLU before it puts it back into channels-last.
    assert set(mode.wrong) <= {"aten.expand.default", "aten.div.Scalar"}


# The compiler's own imports warn of things that are not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_a_compiled_block_keeps_channels_last_where_channels_are_padded():
    """F.pad of a width that is no multiple of 8, of a pooled image, and of a weight, as the compiler lays them out."""
    config = PyramidNetConfig(name="pyramidnet", depth=8, alpha=4, align=8)
    block = PyramidBlock(20, 28, 2, config, None).to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 24, 8, 8).contiguous(memory_format=torch.channels_last)
    x[:, 20:] = 0

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return block(x), pad_channels(x, 29)

    # Plain scalar code compiles in seconds; the layout is decided before.
    options = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    for ours, eager in zip(torch.compile(both, fullgraph=True, options=options)(x), both(x), strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def test_the_shortcut_is_a_plain_addition_between_equal_widths():
    plain, aligned = ready("pyramidnet"), ready("pyramidnet aligned")
    pads = [sum(a.channels != b.channels for a, b in pairwise(model.blocks)) for model in (plain, aligned)]
    assert pads == [5, 1]
