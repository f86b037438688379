"""The fused BatchNorm without a GPU: compiled for sm_90, and left out where it must be; see test_interpreted.py."""

from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcifar.errors import UserError
from fastcifar.kernels.batch_norm import batch_norm, reference
from fastcifar.kernels.batch_norm import triton as kernels
from fastcifar.models.aligned import pad_channels
from fastcifar.models.norm_act import norm_act
from tests.kernels.sm90 import resources


@pytest.mark.parametrize("count", [1, 2, 63, 8_192, 32_768, 131_072, 1_048_576])
@pytest.mark.parametrize("channels", [1, 16, 27, 43, 64, 166, 512, 800])
def test_strips_cover_every_element_once(count: int, channels: int) -> None:
    plan = kernels.strips(count, channels)
    height = plan.rounds * plan.rows
    assert (plan.programs - 1) * height < count <= plan.programs * height
    assert (plan.groups - 1) * plan.columns < channels <= plan.groups * plan.columns
    # What a program reads of the partial sums (8 bytes a strip) is less than half of what it reads of two bf16 tensors.
    assert plan.programs == 1 or 8 * plan.programs <= 0.5 * 4 * height


FLOATS = set("partials sums weight bias running_mean running_var scales saved dweight dbias".split())
IMAGES = set("x grad residual y extra dx".split())
# Rows, channels, those of them that do not only pad, and the shortcut's channels: WideResNet's widths are multiples of
# 16, PyramidNet's are anything.
SIZES = {
    "wide_resnet": (131_072, 128, 128, 128), "pyramidnet": (8_192, 166, 166, 163),
    "a narrower shortcut": (32_768, 82, 82, 80), "padded": (32_768, 112, 101, 104),
}  # fmt: skip
KERNELS: dict[str, Any] = {
    "statistics": kernels.statistics_kernel,
    "normalize": kernels.normalize_kernel,
    "reduce": kernels.reduce_kernel,
    "gradient": kernels.gradient_kernel,
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", SIZES)
def test_compiles_for_sm90_without_spills(name: str, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel, (count, channels, true, shortcut) = KERNELS[name], SIZES[size]
    plan, drops = kernels.strips(count, channels), size == "wide_resnet"
    # Everything that its model may ask for at once.
    constants: dict[str, Any] = {
        "TRACK": True, "RELU": True, "DROP": drops, "SCALE": True, "ADD": True, "SUM": not drops,
        "STRIPS": plan.programs, "ROUNDS": plan.rounds, "ROWS": plan.rows, "COLUMNS": plan.columns,
    }  # fmt: skip
    multiples = [k for k, v in {"C": channels, "T": true, "R": shortcut, "E": shortcut}.items() if v % 16 == 0]
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    compiled = compile_for_sm90(kernel, constants, [*multiples, "count", "HW", "B"])
    used = resources(compiled)
    with capsys.disabled():
        print(f"\n  {name} {size}: {used['REG']} registers, {used['STACK']} bytes of stack", end="")
    assert used["LOCAL"] == used["STACK"] == 0
    assert used["REG"] <= kernels.REGISTERS
    if name in ("normalize", "gradient"):
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "the output is not rounded to nearest"
    if channels % 16 == 0:
        assert ".v4" in compiled.asm["ptx"], "memory is not read 16 bytes at a time"


def compile_for_sm90(kernel: Any, constants: dict[str, Any], multiples: list[str]) -> Any:
    """Compile a kernel as a launch does whose arguments of these names are multiples of 16."""
    signature, divisible = {}, {}
    for position, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        kind = "*bf16" if name in IMAGES else "*fp32" if name in FLOATS else "*i64" if name == "seed" else "i32"
        kind = "fp32" if name in ("eps", "momentum", "drop") else kind
        signature[name] = "constexpr" if name in constants else kind
        if (kind.startswith("*") or name in multiples) and not parameter.do_not_specialize_on_alignment:
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": kernels.WARPS, "maxnreg": kernels.REGISTERS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def test_no_fixed_momentum_is_refused() -> None:
    layer = torch.nn.BatchNorm2d(3, momentum=None)
    with pytest.raises(ValueError, match="cumulative average"):
        norm_act(layer, torch.zeros(2, 3, 4, 4))


def test_more_values_than_an_int32_counts_are_refused() -> None:
    images = torch.empty(16_385, 128, 32, 32, device="meta")
    with pytest.raises(UserError, match=r"2,147,614,720 values \(16385 x 128 x 32 x 32\).*lower train\.batch_size"):
        kernels.forward(
            images, images, images, None, None, None, None, None, None, 0.1, 1e-5, relu=False, drop=0.0, summarize=False
        )


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "padding"), [(27, 0), (43, 0), (43, 5), (128, 0)])
def test_on_the_gpu_equals_the_reference(channels: int, padding: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    x = draw(127, channels, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = draw(channels).requires_grad_(), draw(channels).requires_grad_()
    stats, scales = draw(2, channels).abs(), draw(2, 127)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = reference.batch_norm(*wide, *stats.double(), relu=True, scales=scales.double())
    padded = pad_channels(x, channels + padding)
    y, _, _ = batch_norm(padded, weight, bias, stats.view(-1), channels, None, scales, relu=True)
    grad = draw(*y.shape)
    y.backward(grad)
    expected.output.backward(grad[:, :channels].double())
    assert not y[:, channels:].any()
    pairs = [(y[:, :channels], expected.output), (stats[0], expected.running_mean), (stats[1], expected.running_var)]
    pairs += [(a.grad, b.grad) for a, b in zip((x, weight, bias), wide, strict=True)]
    for ours, other in pairs:
        scale = float(other.abs().max())
        torch.testing.assert_close(ours.double() / scale, other / scale, rtol=0, atol=1e-5)
