"""BatchNorm with what surrounds it as four Triton launches: two forward, two backward.

A channels-last batch is a matrix of B * H * W rows and C columns. A program handles a strip of rows of up to 64
columns, tile by tile. The statistics are reduced in two stages without atomics, so that they are the same bits in
every run: each program of the first launch writes its strip's sums, and every program of the second launch adds up
those of its own columns, in the same order, before it uses them. These sums are a few kilobytes that stay in the L2
cache; `strips` keeps them well below the strips' own size.

Bytes moved, in units of one activation tensor: forward 2 reads and 1 write, backward 4 reads and 1 write, plus 1 read
for each of the shortcut and its gradient. Where another BatchNorm reads the output next, the second launch writes that
one's sums while it has the values, which saves it its first launch and a read. Nothing but the input, which the graph
keeps anyway, and 2 floats a channel is saved for the backward pass: the ReLU's mask is computed again, dropout's random
numbers are drawn again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.errors import UserError

TILE = 4096  # elements: 16 for each of a program's 256 threads
WARPS = 8
REGISTERS = 128  # at most, a thread: two programs fit a multiprocessor, and ptxas does not spill to make room for three
MOST_REGISTERS, SHORT_STRIP = 255, 3
"""The compiler unrolls a strip of so few tiles, and wants more registers when it sums too; its programs are few."""
PROGRAMS = 264  # two for each of an H100's multiprocessors
MOST_COLUMNS = 64
MOST_VALUES = 2**31 - 1
"""Of one activation: the kernels count in int32, for 64-bit addresses cost registers in every load."""


class Strips(NamedTuple):
    """How a matrix is divided among programs.

    Attributes:
        programs: strips of rows.
        groups: groups of columns.
        rounds: tiles in a strip.
        rows: of a tile.
        columns: of a tile, a power of 2.
    """

    programs: int
    groups: int
    rounds: int
    rows: int
    columns: int

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along the rows and along the columns."""
        return self.programs, self.groups


def strips(count: int, channels: int) -> Strips:
    """Divide ``count`` rows of ``channels`` columns.

    A strip has about five times as many rows as there are strips, so that the partial sums, which every program reads,
    stay small beside it.
    """
    columns = min(max(triton.next_power_of_2(channels), 16), MOST_COLUMNS)
    rows, groups = TILE // columns, triton.cdiv(channels, columns)
    most = max(1, min(PROGRAMS // groups, int((0.2 * count) ** 0.5)))
    rounds = triton.cdiv(count, most * rows)
    return Strips(triton.cdiv(count, rounds * rows), groups, rounds, rows, columns)


@triton.jit
def _affine(weight, bias, column, T):  # type: ignore[no-untyped-def]
    """Return the weights and biases; both are 0 from channel T on, which only pads, so that it comes out as 0."""
    return tl.load(weight + column, mask=column < T, other=0.0), tl.load(bias + column, mask=column < T, other=0.0)


@triton.jit
def _normalized(x, mean, rstd, weight, bias):  # type: ignore[no-untyped-def]
    """Return the normalized values and those after the affine map, as forward and backward both compute them."""
    normal = (x - mean[None, :]) * rstd[None, :]
    return normal, normal * weight[None, :] + bias[None, :]


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    grad, affine, scales, seed, row, column, inside, C, HW, B, drop,
    RELU: tl.constexpr, DROP: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Return the gradient with regard to the affine map's output."""
    if SCALE:
        grad *= tl.load(scales + B + row // HW, mask=row < B * HW, other=0.0)[:, None]
    if DROP:
        grad *= _kept(seed, row, column, C, drop)
    if RELU:
        grad = tl.where(affine > 0, grad, 0.0)
    return tl.where(inside, grad, 0.0)


@triton.jit
def _kept(seed, row, column, C, drop):  # type: ignore[no-untyped-def]
    """Return dropout's factors: 0 with probability ``drop``, else 1 / (1 - drop)."""
    uniform = tl.rand(tl.load(seed), row[:, None] * C + column[None, :])
    return tl.where(uniform >= drop, 1.0 / (1.0 - drop), 0.0)


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    x, partials, count, C,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each strip's mean and sum of squared deviations: (2, strips, C).

    Deviations are taken from the strip's first row: sums of plain squares would lose all digits where a channel's mean
    is far from 0.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < C
    first = tl.program_id(0) * ROUNDS * ROWS
    origin = tl.load(x + first * C + column, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(ROUNDS):
        row = first + k * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & exists[None, :]
        value = tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        deviation = tl.where(inside, value - origin[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    _store_sums(partials, first, column, origin, total, squares, count, C, ROUNDS * ROWS)


@triton.jit
def _store_sums(partials, first, column, origin, total, squares, count, C, STRIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a strip's mean and sum of squared deviations, from what its values are beyond ``origin``."""
    size = tl.minimum(count - first, STRIP).to(tl.float32)
    moved = tl.sum(total, 0) / size
    place = partials + tl.program_id(0) * C + column
    tl.store(place, origin + moved, mask=column < C)
    tl.store(place + tl.num_programs(0) * C, tl.sum(squares, 0) - moved * moved * size, mask=column < C)


@triton.jit
def _combined(partials, column, count, C, STRIPS: tl.constexpr, STRIP: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the mean and the sum of squared deviations of whole columns (Chan et al., 1983)."""
    origin = tl.load(partials + column, mask=column < C, other=0.0)
    total = tl.zeros((32, COLUMNS), tl.float32)
    squares = tl.zeros((32, COLUMNS), tl.float32)
    for k in range((STRIPS + 31) // 32):
        strip = k * 32 + tl.arange(0, 32)
        inside = (strip < STRIPS)[:, None] & (column < C)[None, :]
        place = partials + strip[:, None] * C + column[None, :]
        size = tl.minimum(count - strip * STRIP, STRIP).to(tl.float32)[:, None]
        away = tl.load(place, mask=inside, other=0.0) - origin[None, :]
        away = tl.where(inside, away, 0.0)
        total += size * away
        squares += tl.load(place + STRIPS * C, mask=inside, other=0.0) + size * away * away
    moved = tl.sum(total, 0) / count
    return origin + moved, tl.maximum(tl.sum(squares, 0) - moved * moved * count, 0.0)


@triton.jit
def _output(  # type: ignore[no-untyped-def]
    x, residual, scales, seed, row, column, exists, mean, rstd, w, b, count, C, R, HW, drop,
    RELU: tl.constexpr, DROP: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Return a tile of the output, float32."""
    inside = (row < count)[:, None] & exists[None, :]
    value = tl.load(x + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    _, value = _normalized(value, mean, rstd, w, b)
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if DROP:
        value *= _kept(seed, row, column, C, drop)
    if SCALE:
        value *= tl.load(scales + row // HW, mask=row < count, other=0.0)[:, None]
    if ADD:
        there = (row < count)[:, None] & (column < R)[None, :]
        value += tl.load(residual + row[:, None] * R + column[None, :], mask=there, other=0.0).to(tl.float32)
    return value


# A shortcut of 16, 32, ... channels under a wider output would be read in another arrangement than the rest, and the
# compiler would spill to bring the two together.
@triton.jit(do_not_specialize_on_alignment=["R"])
def normalize_kernel(  # type: ignore[no-untyped-def]
    x, partials, weight, bias, running_mean, running_var, residual, scales, seed, y, saved, sums,
    count, C, T, R, HW, B, eps, momentum, drop,
    TRACK: tl.constexpr, RELU: tl.constexpr, DROP: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    SUM: tl.constexpr,
    STRIPS: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalize, activate, drop, scale, add; the first strip's programs save and average the statistics.

    With ``SUM`` it writes into ``sums`` what `statistics_kernel` would find in the output, bit for bit.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < C
    mean, spread = _combined(partials, column, count, C, STRIPS, ROUNDS * ROWS, COLUMNS)
    rstd = 1.0 / tl.sqrt(spread / count + eps)
    if tl.program_id(0) == 0:
        tl.store(saved + column, mean, mask=exists)
        tl.store(saved + C + column, rstd, mask=exists)
        if TRACK:
            old = tl.load(running_mean + column, mask=column < T)
            tl.store(running_mean + column, old + momentum * (mean - old), mask=column < T)
            old = tl.load(running_var + column, mask=column < T)
            tl.store(running_var + column, old + momentum * (spread / (count - 1) - old), mask=column < T)
    w, b = _affine(weight, bias, column, T)
    first = tl.program_id(0) * ROUNDS * ROWS
    if SUM:
        origin = _output(
            x, residual, scales, seed, first + tl.arange(0, 1), column, exists, mean, rstd, w, b, count, C, R, HW, drop,
            RELU, DROP, SCALE, ADD,
        )  # fmt: skip
        origin = tl.sum(origin.to(y.dtype.element_ty).to(tl.float32), 0)  # of one row
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(ROUNDS):
        row = first + k * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & exists[None, :]
        value = _output(
            x, residual, scales, seed, row, column, exists, mean, rstd, w, b, count, C, R, HW, drop,
            RELU, DROP, SCALE, ADD,
        ).to(y.dtype.element_ty)  # fmt: skip
        tl.store(y + row[:, None] * C + column[None, :], value, mask=inside)
        if SUM:
            # Of the values as they are stored, rounded: the next BatchNorm reads those.
            deviation = tl.where(inside, value.to(tl.float32) - origin[None, :], 0.0)
            total += deviation
            squares += deviation * deviation
    if SUM:
        _store_sums(sums, first, column, origin, total, squares, count, C, ROUNDS * ROWS)


@triton.jit
def reduce_kernel(  # type: ignore[no-untyped-def]
    x, grad, saved, weight, bias, scales, seed, partials, count, C, T, HW, B, drop,
    RELU: tl.constexpr, DROP: tl.constexpr, SCALE: tl.constexpr,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each strip's sums of the gradient, and of it times the normalized input: (2, strips, C)."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < C
    mean = tl.load(saved + column, mask=exists, other=0.0)
    rstd = tl.load(saved + C + column, mask=exists, other=0.0)
    w, b = _affine(weight, bias, column, T)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(ROUNDS):
        row = (tl.program_id(0) * ROUNDS + k) * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & exists[None, :]
        place = row[:, None] * C + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normal, affine = _normalized(value, mean, rstd, w, b)
        g = _gradient(g, affine, scales, seed, row, column, inside, C, HW, B, drop, RELU, DROP, SCALE)
        total += g
        products += g * normal
    place = partials + tl.program_id(0) * C + column
    tl.store(place, tl.sum(total, 0), mask=exists)
    tl.store(place + tl.num_programs(0) * C, tl.sum(products, 0), mask=exists)


@triton.jit
def _summed(partials, column, C, STRIPS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return whole columns' sums of the two kinds of partial sums."""
    total = tl.zeros((32, COLUMNS), tl.float32)
    products = tl.zeros((32, COLUMNS), tl.float32)
    for k in range((STRIPS + 31) // 32):
        strip = k * 32 + tl.arange(0, 32)
        inside = (strip < STRIPS)[:, None] & (column < C)[None, :]
        place = partials + strip[:, None] * C + column[None, :]
        total += tl.load(place, mask=inside, other=0.0)
        products += tl.load(place + STRIPS * C, mask=inside, other=0.0)
    return tl.sum(total, 0), tl.sum(products, 0)


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    x, grad, saved, weight, bias, scales, seed, partials, extra, dx, dweight, dbias,
    count, C, T, E, HW, B, drop,
    RELU: tl.constexpr, DROP: tl.constexpr, SCALE: tl.constexpr, ADD: tl.constexpr,
    STRIPS: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the input's gradient, plus ``extra`` (rows E apart); the first strip's programs write the parameters'."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < C
    mean = tl.load(saved + column, mask=exists, other=0.0)
    rstd = tl.load(saved + C + column, mask=exists, other=0.0)
    w, b = _affine(weight, bias, column, T)
    total, products = _summed(partials, column, C, STRIPS, COLUMNS)
    if tl.program_id(0) == 0:
        tl.store(dbias + column, total, mask=column < T)
        tl.store(dweight + column, products, mask=column < T)
    total, products = total / count, products / count
    for k in range(ROUNDS):
        row = (tl.program_id(0) * ROUNDS + k) * ROWS + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & exists[None, :]
        place = row[:, None] * C + column[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normal, affine = _normalized(value, mean, rstd, w, b)
        g = _gradient(g, affine, scales, seed, row, column, inside, C, HW, B, drop, RELU, DROP, SCALE)
        g = (g - total[None, :] - normal * products[None, :]) * (rstd * w)[None, :]
        if ADD:
            g += tl.load(extra + row[:, None] * E + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + place, g.to(dx.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    residual: Tensor | None, scales: Tensor | None, seed: Tensor | None, partials: Tensor | None,
    momentum: float, eps: float, relu: bool, drop: float, summarize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the output (B, C, H, W), the saved statistics (2, C), and `sums_shape`; running statistics move in place.

    All images are dense channels-last; see `fastcifar.kernels.batch_norm.batch_norm` for the arguments.

    Raises:
        UserError: the activation has more values than the kernels can count.
    """
    if x.numel() > MOST_VALUES:
        raise UserError(
            f"an activation of {x.numel():,} values ({' x '.join(map(str, x.shape))}) is more than the fused BatchNorm "
            f"takes ({MOST_VALUES:,}): lower train.batch_size, or set engine.fused_batch_norm = false"
        )
    b, c, h, w = x.shape
    count, plan = b * h * w, strips(b * h * w, c)
    y, saved = torch.empty_like(x), torch.empty((2, c), dtype=torch.float32, device=x.device)
    sums = torch.empty(sums_shape(x, summarize), dtype=torch.float32, device=x.device)
    sizes = {"ROUNDS": plan.rounds, "ROWS": plan.rows, "COLUMNS": plan.columns}
    sizes |= {"num_warps": WARPS, "maxnreg": REGISTERS}
    if partials is None:
        partials = torch.empty(sums_shape(x, True), dtype=torch.float32, device=x.device)
        statistics_kernel[plan.grid](x, partials, count, c, **sizes)
    if summarize and plan.rounds <= SHORT_STRIP:
        sizes["maxnreg"] = MOST_REGISTERS
    normalize_kernel[plan.grid](
        x, partials, weight, bias, _or(running_mean, saved), _or(running_var, saved), _or(residual, x),
        _or(scales, saved), _or(seed, saved), y, saved, sums if summarize else saved,
        count, c, len(weight), c if residual is None else residual.shape[1], h * w, b, eps, momentum, drop,
        TRACK=running_mean is not None, RELU=relu, DROP=drop > 0, SCALE=scales is not None, ADD=residual is not None,
        SUM=summarize, STRIPS=plan.programs, **sizes,
    )  # fmt: skip
    return y, saved, sums


def sums_shape(images: Tensor, summarize: bool) -> tuple[int, ...]:
    """Return the shape of the sums of these images, each strip's mean and squares: (2, strips, C), or (0,) for none."""
    b, c, h, w = images.shape
    return (2, strips(b * h * w, c).programs, c) if summarize else (0,)


def backward(
    grad: Tensor, x: Tensor, saved: Tensor, weight: Tensor, bias: Tensor,
    extra: Tensor | None, scales: Tensor | None, seed: Tensor | None, relu: bool, drop: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the input (plus ``extra``), of the weight and of the bias.

    ``extra`` may be the first C channels of a wider channels-last tensor; all else is dense.
    """
    b, c, h, w = x.shape
    count, plan = b * h * w, strips(b * h * w, c)
    partials = torch.empty((2, plan.programs, c), dtype=torch.float32, device=x.device)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    options = {"RELU": relu, "DROP": drop > 0, "SCALE": scales is not None}
    sizes = {"ROUNDS": plan.rounds, "ROWS": plan.rows, "COLUMNS": plan.columns}
    sizes |= {"num_warps": WARPS, "maxnreg": REGISTERS}
    inputs = (x, grad, saved, weight, bias, _or(scales, saved), _or(seed, saved), partials)
    reduce_kernel[plan.grid](*inputs, count, c, len(weight), h * w, b, drop, **options, **sizes)
    gradient_kernel[plan.grid](
        *inputs, _or(extra, x), dx, dweight, dbias,
        count, c, len(weight), row_stride(extra) if extra is not None else c, h * w, b, drop,
        ADD=extra is not None, STRIPS=plan.programs, **options, **sizes,
    )  # fmt: skip
    return dx, dweight, dbias


def row_stride(images: Tensor) -> int:
    """Return how many elements lie between two pixels of channels-last images, whatever their size is."""
    if images.shape[3] > 1:
        return images.stride(3)
    return images.stride(2) if images.shape[2] > 1 else images.stride(0)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a pointer that the kernel can be given but does not read when there is no tensor."""
    return stand_in if tensor is None else tensor
