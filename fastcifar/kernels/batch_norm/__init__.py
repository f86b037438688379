"""BatchNorm fused with ReLU, dropout, ShakeDrop's scale and the addition of a shortcut, for training on a GPU.

`batch_norm` is one node of a compiled graph forward and one backward: two custom operators, and an autograd function
between them. (The forward operator moves the running statistics in place, and torch derives autograd formulas of
functional operators only.) `allow_in_graph` tells the compiler so. `fastcifar.kernels.batch_norm.reference` is the
definition, ``triton`` the kernels.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NHWC = torch.channels_last


def _dense(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=NHWC)


@torch.library.custom_op("fastcifar::batch_norm", mutates_args=("running",))
def forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Tensor | None,
    variance_at: int,
    residual: Tensor | None,
    scales: Tensor | None,
    seed: Tensor | None,
    partials: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    drop: float,
    summarize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, C, H, W), channels-last, what the backward pass needs, float32 (2, C), and the sums."""
    from fastcifar.kernels.batch_norm import triton as kernels

    shortcut = None if residual is None else _dense(residual)
    mean = None if running is None else running[: len(weight)]
    variance = None if running is None else running[variance_at : variance_at + len(weight)]
    return kernels.forward(
        _dense(x), weight, bias, mean, variance, shortcut, scales, seed, partials, momentum, eps, relu, drop, summarize
    )


@forward_op.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastcifar.kernels.batch_norm.triton import sums_shape

    saved, sums = (x.new_empty(shape, dtype=torch.float32) for shape in ((2, x.shape[1]), sums_shape(x, rest[-1])))
    return torch.empty_like(x, memory_format=NHWC), saved, sums


@torch.library.custom_op("fastcifar::batch_norm_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor,
    saved: Tensor,
    weight: Tensor,
    bias: Tensor,
    extra: Tensor | None,
    scales: Tensor | None,
    seed: Tensor | None,
    relu: bool,
    drop: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (plus ``extra``, where given), weight and bias."""
    from fastcifar.kernels.batch_norm import triton as kernels

    if extra is not None and not _rows(extra):
        extra = _dense(extra)
    return kernels.backward(_dense(grad), _dense(x), saved, weight, bias, extra, scales, seed, relu, drop)


@backward_op.register_fake
def _(grad: Tensor, x: Tensor, saved: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x, memory_format=NHWC), torch.empty_like(weight), torch.empty_like(bias)


def _rows(images: Tensor) -> bool:
    """Tell whether the pixels of images lie at equal distances in memory, each pixel's channels side by side."""
    from fastcifar.kernels.batch_norm.triton import row_stride

    b, c, h, w = images.shape
    step = row_stride(images)
    wanted = (h * w * step, 1, w * step, step)
    return all(n == 1 or s == t for n, s, t in zip((b, c, h, w), images.stride(), wanted, strict=True))


class _BatchNorm(torch.autograd.Function):
    """Joins the two operators; its second output is the input itself, for a shortcut that starts there.

    The third are the sums of the first; they are no function of anything as far as autograd is concerned.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *rest: Any) -> Any:
        running, variance_at, scales, seed, partials, momentum, eps, relu, drop, summarize = rest
        y, saved, sums = forward_op(
            x, weight, bias, running, variance_at, residual, scales, seed, partials,
            momentum, eps, relu, drop, summarize,
        )  # fmt: skip
        ctx.save_for_backward(x, saved, weight, bias, scales, seed)
        ctx.relu, ctx.drop = relu, drop
        ctx.channels = 0 if residual is None else residual.shape[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sums)
        return y, x.view_as(x), sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad, extra, _ = grads
        x, saved, weight, bias, scales, seed = ctx.saved_tensors
        if grad is None:
            return extra, *(None,) * 13
        dx, dweight, dbias = backward_op(grad, x, saved, weight, bias, extra, scales, seed, ctx.relu, ctx.drop)
        shortcut = grad[:, : ctx.channels] if ctx.channels and ctx.needs_input_grad[3] else None
        return dx, dweight, dbias, shortcut, *(None,) * 10


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: Tensor | None,
    variance_at: int = 0,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
    seed: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    drop: float = 0.0,
    partials: Tensor | None = None,
    summarize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize a batch with its own statistics, activate, drop, scale per sample and add a shortcut.

    Every image tensor is bf16, fp16 or fp32 on one CUDA device; sums are float32, the output is rounded once.

    Args:
        x: (B, C, H, W), channels-last, B * H * W above 1.
        weight: float32 (T,), T <= C. Channels from T on pad the width for tensor cores (`fastcifar.models.aligned`):
            before the shortcut is added they come out as 0, and so does their gradient.
        bias: float32 (T,).
        running: float32 (n,), the running statistics, moved in place by ``momentum`` towards the batch's: the mean in
            its first T elements, the unbiased variance in T elements from ``variance_at`` on. None for none. It is one
            tensor, because Inductor copies all but one of several mutated arguments that share memory.
        variance_at: T or more, where ``running`` is given.
        residual: (B, R, H, W), R <= C, added last to the first R channels; None for none.
        scales: float32 (2, B), contiguous: each sample's factor of the output and of its gradient (ShakeDrop).
        seed: int64 (1,), that dropout draws from; needed where ``drop`` is above 0. A new one for each pass.
        momentum: share of the batch in the running statistics, 0..1.
        eps: added to the variance.
        relu: whether negative values become 0.
        drop: probability of dropout in 0..1, after the activation.
        partials: the sums of ``x``, where the BatchNorm that made it has ``summarize``: they save a launch and one pass
            over memory, and change no bit.
        summarize: return the output's sums, for a BatchNorm that reads it as it is.

    Returns:
        The output (B, C, H, W), channels-last; ``x`` itself; and the output's sums, float32 (2, strips, C), or (0,)
        without ``summarize``. A shortcut that starts from the second output has its gradient added inside the backward
        kernel; one that starts from ``x`` costs a launch and three passes over memory.
    """
    return _BatchNorm.apply(
        x, weight, bias, residual, running, variance_at, scales, seed, partials, momentum, eps, relu, drop, summarize
    )


def allow_in_graph() -> None:
    """Let torch.compile see `batch_norm` as one node, and keep graphs that have it; call this before compiling.

    Not done on import: it imports torch._dynamo, which takes as long as torch itself, and most runs on a CPU, and most
    commands, never compile.
    """
    from torch._inductor import config

    torch.compiler.allow_in_graph(batch_norm)
    # The cache of traced graphs refuses functions that it does not know; a hash of our sources makes this one known.
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    config.unsafe_marked_cacheable_functions |= {f"{__name__}.{batch_norm.__name__}": code.hexdigest()}
