"""In Triton's interpreter: the fused BatchNorm against float64 and torch's own layers.

What is found is a list of [what, error in ulps of the largest expected value or summand, the ulps allowed].
"""

import itertools
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from pydantic import TypeAdapter
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from fastcifar.config.schema import ModelConfig
from fastcifar.kernels.batch_norm import allow_in_graph, backward_op, batch_norm, forward_op, reference
from fastcifar.kernels.batch_norm import triton as kernels
from fastcifar.models import bind_counter, build_model, pyramidnet, wide_resnet
from fastcifar.models.aligned import pad_channels
from fastcifar.models.norm_act import use_fused_batch_norm

NHWC = torch.channels_last
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# A sum of some thousand values in another order; an input's gradient subtracts three such sums. Low precision rounds
# once; the interpreter cuts bf16 off where the GPU rounds to nearest.
SUM_ULPS, ROUNDED_ULPS = 16.0, 2.0
# Batch, channels, height, width, channels of the shortcut: PyramidNet's widths, odd batches, strips of every kind.
# Smaller tiles than on a GPU let fewer programs have strips of two and three.
TILE = 1024
SHAPES = [
    (3, 27, 5, 7, 25), (2, 16, 3, 3, 16), (3, 43, 7, 7, 41), (5, 66, 4, 4, 64), (3, 43, 10, 10, 0), (1, 1, 1, 2, 0),
]  # fmt: skip
NEAR_ZERO = 1e-5
found: list[tuple[str, float, float]] = []


def note(what: str, ours: Tensor, expected: Tensor, ulps: float, *terms: Tensor) -> None:
    """Record the error; `terms` are what the expected value is a sum of: they may cancel, their rounding does not."""
    ulp = EPSILON[ours.dtype] * max(*(float(t.detach().abs().max()) for t in (expected, *terms)), 1e-3)
    found.append((what, float((ours.detach().double() - expected.detach().double()).abs().max()) / ulp, ulps))


def images(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 2.0) -> Tensor:
    return (torch.randn(shape) * 3 + mean).to(dtype).contiguous(memory_format=NHWC)


def away_from_zero(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, weight and bias of which no normalized value lies where rounding could put it across zero.

    ReLU's gradient jumps there.
    """
    nearest = 0.0
    while nearest < NEAR_ZERO:
        x, weight, bias = images(*shape, dtype=dtype), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        statistics = torch.zeros(2, shape[1]).double()
        wide = reference.batch_norm(x.double(), weight.double(), bias.double(), *statistics, relu=False)
        nearest = float(wide.output.abs().min())
    return x, weight, bias


def variance_error(x: Tensor, rstd: Tensor) -> Tensor:
    """Return by how much each channel's normalized values may be off, (1, C, 1, 1), in units of a sum's rounding.

    A strip's squares are summed from its first row. Where that row lies k deviations from the mean, the variance is a
    difference of numbers 1 + k^2 and k^2 times as large as it is, and its reciprocal root is off by half as much.
    """
    plan = kernels.strips(x.shape[0] * x.shape[2] * x.shape[3], x.shape[1])
    first = x.detach().permute(0, 2, 3, 1).flatten(0, 2)[:: plan.rounds * plan.rows].float()
    k = (first - x.detach().float().mean((0, 2, 3))) * rstd.flatten()
    return (1 + k.square().amax(0)).view(1, -1, 1, 1) / 2


def check_values(shape: tuple[int, ...], dtype: torch.dtype, relu: bool, scaled: bool, padding: int = 0) -> None:
    """Compare outputs, statistics and all gradients with the reference in float64; ``padding`` more channels are 0."""
    b, c, h, w, r = shape
    shortcut = images(b, r, h, w, dtype=dtype) if r else None
    x, weight, bias = away_from_zero(b, c, h, w, dtype=dtype)
    mean, var = torch.randn(c), torch.rand(c)
    scales = torch.rand(2, b) * 2 - 0.5 if scaled else None
    leaves = [t.requires_grad_() for t in (x, weight, bias, shortcut) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = reference.batch_norm(
        *wide[:3], mean.double(), var.double(), momentum=0.3, relu=relu,
        scales=None if scales is None else scales.double(), residual=wide[3] if r else None,
    )  # fmt: skip
    # The variance lies somewhere behind the mean, as in flat parameters, where segments are padded.
    running = torch.cat([mean, torch.full((3,), 7.0), var])
    padded = pad_channels(x, c + padding)
    y, skip, _ = batch_norm(padded, weight, bias, running, c + 3, shortcut, scales, momentum=0.3, relu=relu)
    found.append((f"{shape}: values in {padding} channels of padding", float(y[:, c:].detach().abs().sum()), 0.0))
    y, skip = y[:, :c], skip[:, :c]
    # What comes back along a shortcut is a part of a wider gradient, as PyramidNet's padding leaves it.
    grads = [images(b, c, h, w, dtype=dtype), images(b, c + 5, h, w, dtype=dtype)[:, :c]]
    torch.autograd.backward([y, skip], grads)
    torch.autograd.backward([expected.output, wide[0] * 1.0], [g.double() for g in grads])
    what = f"{shape} {dtype} relu={relu} scaled={scaled} padding={padding}: "
    image_ulps = SUM_ULPS if dtype == torch.float32 else ROUNDED_ULPS
    rstd = (x.detach().float().var((0, 2, 3), correction=0) + 1e-5).rsqrt().view(1, -1, 1, 1)
    note(what + "output", y, expected.output, image_ulps, x * rstd)
    note(what + "running mean", running[:c], expected.running_mean, SUM_ULPS, mean, x)
    # Squares are summed from the first row of a strip, which may lie far from the mean.
    squares = 0.3 * (x.detach().double() - x.detach().double()[:1, :, :1, :1]).square().mean((0, 2, 3))
    note(what + "running variance", running[c + 3 :], expected.running_var, SUM_ULPS, var, squares)
    # The mean is rounded too: where it is far larger than the deviation, every normalized value is off by as much.
    # Beside the rounding of a 16-bit gradient that is nothing.
    off = (x.detach().float() * rstd).abs().amax((0, 2, 3)).clamp_min(1.0)
    for name, leaf, other in zip(("x", "weight", "bias", "shortcut"), leaves, wide, strict=False):
        assert leaf.grad is not None
        assert other.grad is not None
        ulps = image_ulps if leaf.ndim == 4 else SUM_ULPS
        terms = [*grads, grads[0] * rstd * (off.view(1, -1, 1, 1) if leaf.dtype == torch.float32 else 1.0)]
        if leaf.ndim == 1:  # a sum over rows: it may cancel
            terms.append(grads[0].abs().sum((0, 2, 3)) * (off if name == "weight" else 1.0))
        note(what + f"gradient of {name}", leaf.grad, other.grad, ulps, *terms)


def check_sums(shape: tuple[int, ...], dtype: torch.dtype, scaled: bool) -> None:
    """See that a BatchNorm that is given its input's sums returns the bits that it returns without them."""
    b, c, h, w, r = shape
    x, weight, bias = images(b, c, h, w, dtype=dtype), torch.rand(c) + 0.5, torch.randn(c)
    shortcut, scales = images(b, r, h, w, dtype=dtype) if r else None, torch.rand(2, b) if scaled else None
    y, _, sums = batch_norm(x, weight, bias, None, 0, shortcut, scales, relu=not r, summarize=True)
    sides = []
    for partials in (sums, None):
        leaf, running = y.detach().clone().requires_grad_(), torch.ones(2 * c)
        z, skip, _ = batch_norm(leaf, bias, weight, running, c, partials=partials)
        sides.append([z, running, *torch.autograd.grad([z, skip], leaf, [x, y])])
    different = sum(not torch.equal(*pair) for pair in zip(*sides, strict=True))
    found.append((f"{shape} {dtype}: tensors that differ with given sums", float(different), 0.0))


def check_against_torch() -> None:
    """Compare with F.batch_norm and ReLU, also where a channel's mean is 10,000 times its deviation."""
    for mean in (0.5, 30_000.0):
        x, weight, bias, stats = images(7, 19, 6, 6, mean=mean), torch.rand(19), torch.randn(19), torch.zeros(2, 19)
        ours, theirs = stats.clone(), stats.clone()
        wide = [t.double() for t in (x, weight, bias, stats[0], stats[1])]
        exact = reference.batch_norm(*wide, relu=True)
        y, _, _ = batch_norm(x, weight, bias, ours.view(-1), 19, relu=True)
        other = F.relu(F.batch_norm(x, theirs[0], theirs[1], weight, bias, training=True))
        theirs_off = float((other - exact.output).abs().max() / exact.output.abs().max()) / 2.0**-23
        rstd = (wide[0].var((0, 2, 3), correction=0) + 1e-5).rsqrt().view(1, -1, 1, 1)
        normal = (wide[0] - wide[0].mean((0, 2, 3), keepdim=True)) * rstd
        varied = normal * weight.view(1, -1, 1, 1) * variance_error(x, rstd)
        # Half of what a sum may be off: of 4,200 seeds the worst takes 0.6 of the bound.
        ulps = 2 * theirs_off + SUM_ULPS / 2
        note(f"output at mean {mean}; torch's own error times 2", y, exact.output, ulps, varied)
        # Plain sums of squares would be wrong by 50 million.
        note(f"running variance at mean {mean}", ours[1], exact.running_var, 4096.0)


def check_dropout() -> None:
    """See that dropout keeps the right share, scales it, and drops the same places on the way back."""
    x, weight, bias = away_from_zero(4, 43, 8, 8)
    x.requires_grad_()
    plain, _, _ = batch_norm(x, weight, bias, None)
    draws = []
    for relu, seed in itertools.product((False, True), (5, 6)):
        y, _, _ = batch_norm(x, weight, bias, None, 0, None, None, torch.tensor([seed]), relu=relu, drop=0.3)
        draws.append(y.detach())
    keep = ((draws[0] != 0) / 0.7).double()
    found.append(("share of kept values", abs(float((draws[0] != 0).double().mean()) - 0.7), 0.02))
    found.append(("equal masks of two seeds", float(((draws[0] != 0) == (draws[1] != 0)).double().mean()), 0.65))
    note("dropout after ReLU", draws[2], plain.relu() * keep, 2.0)
    y, _, _ = batch_norm(x, weight, bias, None, 0, None, None, torch.tensor([5]), relu=True, drop=0.3)
    grad = images(4, 43, 8, 8)
    (ours,) = torch.autograd.grad(y, x, grad)
    wide, zeros = x.detach().double().requires_grad_(), torch.zeros(43).double()
    expected = reference.batch_norm(wide, weight.double(), bias.double(), zeros, zeros, relu=True, keep=keep)
    note("gradient under dropout", ours, torch.autograd.grad(expected.output, wide, grad.double())[0], SUM_ULPS)


def check_operators() -> None:
    """Let torch check schemas and shape formulas, and a compiler's tracing see one node each way."""
    x, weight, bias = images(3, 27, 5, 5), torch.rand(27), torch.rand(27)
    running = torch.cat([torch.zeros(27), torch.ones(27)])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        forward_op, (x, weight, bias, running, 27, x.clone(), None, None, None, 0.1, 1e-5, True, 0.0, True),
        test_utils=tests,
    )  # fmt: skip
    saved, extra = torch.rand(2, 27), images(3, 30, 5, 5)[:, :27]
    arguments = (x.clone(), x, saved, weight, bias, extra, None, None, True, 0.0)
    torch.library.opcheck(backward_op, arguments, test_utils=tests)
    seen: list[str] = []

    def trace(graph: torch.fx.GraphModule, inputs: object) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    allow_in_graph()
    compiler = aot_autograd(fw_compiler=trace, bw_compiler=trace)
    bare = lambda t: batch_norm(t * 1.0, weight, bias, running, 27, relu=True)[0]  # noqa: E731
    leaf, moved = x.clone().requires_grad_(), running.clone()
    y = torch.compile(bare, backend=compiler, fullgraph=True)(leaf)
    y.sum().backward()
    ours = [name for name in seen if "batch_norm" in name or "auto_functionalized" in name]
    found.append((f"nodes of the compiled graphs: {ours}", abs(len(ours) - 2), 0.0))
    found.append(("the compiled graph left the running statistics alone", float(torch.equal(moved, running)), 0.0))


def check_rerun() -> None:
    """See that two runs give the same bits."""
    x, weight, bias = images(3, 43, 7, 7), torch.rand(43), torch.rand(43)
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y, _, _ = batch_norm(leaf, weight, bias, None, relu=True)
        runs.append([y, *torch.autograd.grad(y, leaf, x)])
    found.append(("bits that differ between runs", float(sum(not torch.equal(*pair) for pair in zip(*runs))), 0.0))  # noqa: B905


MODELS = {
    "wide_resnet": {"name": "wide_resnet", "depth": 10, "widen": 1, "dropout": 0.0},
    "wide_resnet last bn": {
        "name": "wide_resnet", "depth": 10, "widen": 1, "dropout": 0.0, "last_bn": True, "first_relu": False,
        "shakedrop": 0.5,
    },
    "pyramidnet": {"name": "pyramidnet", "depth": 8, "alpha": 11, "shakedrop": 0.5},
    "pyramidnet aligned": {"name": "pyramidnet", "depth": 8, "alpha": 11, "shakedrop": 0.5, "align": 8},
    "bottleneck": {"name": "pyramidnet", "depth": 11, "alpha": 10, "block": "bottleneck", "shakedrop": 0.5},
}  # fmt: skip


def network(table: dict[str, Any], fused: bool) -> torch.nn.Module:
    model = build_model(TypeAdapter(ModelConfig).validate_python(table), image_px=8, seed=3)
    use_fused_batch_norm(model, fused)
    bind_counter(model, torch.ones(1, dtype=torch.int64), seed=1)
    return model


def images_away_from_zero(table: dict[str, Any]) -> Tensor:
    """Return images of which no input of ReLU is so near to zero that rounding puts it on the other side.

    A gradient jumps there, and of many thousand inputs one may be as near as that.
    """
    relu, nearest = F.relu, [0.0]

    def seen(x: Tensor, inplace: bool = False) -> Tensor:
        sizes = x.detach().abs()
        nearest.append(float(sizes[sizes > 0].min()))  # channels of padding are 0 on both sides
        return relu(x)

    while min(nearest) < NEAR_ZERO:
        nearest[:] = []
        x = images(5, 3, 8, 8, mean=0.0)
        with mock.patch.object(F, "relu", seen), torch.no_grad():
            network(table, fused=False)(x)
        assert nearest, "the plain network has no ReLU"
    return x


def check_models() -> None:
    """Compare whole networks, fused and plain: logits, gradients and running statistics."""
    # The interpreter's tensors are on the CPU, where models otherwise take their plain layers.
    for module in (wide_resnet, pyramidnet):
        module.fuses = lambda block, x: block.fused_batch_norm and block.training  # type: ignore[attr-defined]
    weights = torch.randn(5, 10)
    for name, table in MODELS.items():
        x, sides = images_away_from_zero(table), []
        for fused in (True, False):
            model = network(table, fused)
            logits = model(x)
            (logits * weights).sum().backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            stats = torch.cat([t for n, t in model.state_dict().items() if n.endswith(("running_mean", "running_var"))])
            sides.append((logits, grads, stats))
        for what, ours, plain in zip(("logits", "gradients", "statistics"), *sides, strict=True):
            found.append((f"{name}: number of {what}", float(len(ours) != len(plain)), 0.0))
            note(f"{name}: {what}", ours, plain, 512.0)  # a chain of layers multiplies what one rounds


def main() -> list[tuple[str, float, float]]:
    """Return all comparisons."""
    with mock.patch.object(kernels, "TILE", TILE):
        for number, shape in enumerate(SHAPES):
            check_values(shape, torch.float32, relu=number % 2 == 0, scaled=number % 3 != 2)
            check_sums(shape, torch.float32, scaled=number % 3 != 2)
        for number, shape in enumerate(SHAPES[::2]):
            check_values(shape, torch.float32, relu=number % 2 == 0, scaled=number > 0, padding=5)
        for dtype in (torch.bfloat16, torch.float16):
            check_values(SHAPES[0], dtype, relu=True, scaled=True)
            check_sums(SHAPES[3], dtype, scaled=True)
        check_rerun()
    for check in (check_against_torch, check_dropout, check_operators, check_models):
        check()
    return found
