"""Aligned widths: the same function, the same training, the same files as the model of the paper's widths."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import PyramidNetConfig
from fastcifar.models import bind_counter, build_model
from fastcifar.models.aligned import AlignedBatchNorm2d, AlignedConv2d, round_up

CONFIGS = {
    "basic": PyramidNetConfig(name="pyramidnet", depth=14, alpha=10, shakedrop=0.5, init="kaiming_normal_fan_out"),
    "bottleneck": PyramidNetConfig(name="pyramidnet", depth=11, alpha=7, block="bottleneck", shakedrop=0.5),
}


def pair(kind: str, align: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    configs = (CONFIGS[kind], CONFIGS[kind].model_copy(update={"align": align}))
    models = [build_model(config, seed=5).to(dtype) for config in configs]
    for model in models:
        bind_counter(model, torch.ones(1, dtype=torch.int64), seed=6)
    return models[0], models[1]


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images.contiguous(memory_format=torch.channels_last), torch.randint(10, (size,), generator=generator)


def asam_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, rho: float) -> None:
    """Take a step of ASAM (Kwon et al., 2021) as the ladder defines it, over all parameters."""
    parameters = list(model.parameters())
    ascent = []
    for module in model.modules():
        if hasattr(module, "counter"):
            module.counter.add_(1)
    F.cross_entropy(model(images), labels).backward()
    norm = torch.cat([(p.abs() * p.grad).flatten() for p in parameters]).norm()
    with torch.no_grad():
        for p in parameters:
            ascent.append(rho * p**2 * p.grad / (norm + 1e-12))
            p.add_(ascent[-1])
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for p, e in zip(parameters, ascent, strict=True):
            p.sub_(e)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "align"), [("basic", 8), ("basic", 32), ("bottleneck", 16)])
def test_same_logits_and_same_weights_after_ten_steps(kind: str, align: int):
    models = pair(kind, align)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True) for m in models]
    start = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    for seed in range(10):
        images, labels = batch(seed)
        with torch.no_grad():
            a, b = (model.eval()(images) for model in models)
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        for model, optimizer in zip(models, optimizers, strict=True):
            asam_step(model.train(), optimizer, images, labels, rho=0.5)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)
        assert not a.is_floating_point() or not torch.equal(a, start[name]), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_state_and_count_are_those_of_the_true_widths(kind: str):
    plain, aligned = pair(kind, 8)
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (plain, aligned)]
    assert shapes[0] == shapes[1]
    other = build_model(CONFIGS[kind], seed=99).double()
    other.load_state_dict(aligned.state_dict())
    images, _ = batch(1)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), aligned.eval()(images))


def true_widths(model: nn.Module) -> dict[nn.Module, int]:
    convolutions = {m: m.out_channels for m in model.modules() if isinstance(m, AlignedConv2d)}
    return convolutions | {m: m.num_features for m in model.modules() if isinstance(m, AlignedBatchNorm2d)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_padded_channels_are_exactly_zero_and_widths_are_multiples(dtype: torch.dtype):
    _, model = pair("basic", 8, torch.float32)
    found = []

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert output.shape[1] % 8 == 0
        assert not output[:, width[module] :].any()
        found.append(output.shape[1] - width[module])

    width = true_widths(model)
    for module in width:
        module.register_forward_hook(hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    for seed in range(3):
        images, labels = batch(seed)
        with torch.autocast("cpu", dtype):
            asam_step(model, optimizer, images.float(), labels, rho=0.5)
    assert max(found) > 0
    assert all(p.isfinite().all() for p in model.parameters())


def test_most_widths_of_the_published_pyramid_are_no_multiple_of_8():
    from fastcifar.models.pyramidnet import widths

    published = widths(PyramidNetConfig(name="pyramidnet"))
    assert (published[0], published[-1]) == (16, 166)
    assert len(published) == 55
    assert sum(width % 8 == 0 for width in published) == 7
    assert [round_up(width, 8) for width in (16, 17, 166)] == [16, 24, 168]


def test_frozen_statistics_stay_frozen_and_untracked_ones_are_those_of_the_batch():
    norm = AlignedBatchNorm2d(20, 8)
    x = torch.randn(4, 24, 3, 3).contiguous(memory_format=torch.channels_last)
    x[:, 20:] = 0
    expected = F.batch_norm(x[:, :20], None, None, training=True)
    for frozen in ("momentum", "track_running_stats"):
        setattr(norm, frozen, 0)
        torch.testing.assert_close(norm(x)[:, :20], expected)
        assert not norm.running_mean.any()


def test_a_plain_layer_where_nothing_is_padded():
    x = torch.randn(2, 16, 5, 5)
    conv, norm = AlignedConv2d(16, 24, 3, align=8), AlignedBatchNorm2d(16, 8)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, padding=1))
    assert torch.equal(norm(x), nn.BatchNorm2d(16)(x))
