"""Augmenting on the GPU: one Triton launch from the uint8 store and row numbers to the normalized batch.

One program handles one image. The image lives in registers as one packed integer per pixel (red, green << 8,
blue << 16), so that a geometric step moves all channels with one gather. The steps, their order and their integers
are those of `fastcifar.kernels.augment.cpu`;
the launch forbids fused multiply-add, which would round blends differently.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.kernels.augment import decisions as slot_columns
from fastcifar.kernels.augment import policy as row_columns
from fastcifar.kernels.augment.decisions import AUGMENT_STREAM, Program
from fastcifar.kernels.augment.policy import ROW_WIDTH, Code

STREAM = tl.constexpr(AUGMENT_STREAM)
# The columns of slots and steps, as constants that a kernel may read.
BASE, COUNT_A = tl.constexpr(slot_columns.BASE), tl.constexpr(slot_columns.COUNT_A)
COUNT_B, BLOCK_NUMBER = tl.constexpr(slot_columns.COUNT_B), tl.constexpr(slot_columns.BLOCK_NUMBER)
WORD_A, WORD_B = tl.constexpr(slot_columns.WORD_A), tl.constexpr(slot_columns.WORD_B)
GATE_BLOCK, GATE_WORD = tl.constexpr(slot_columns.GATE_BLOCK), tl.constexpr(slot_columns.GATE_WORD)
GATE = tl.constexpr(row_columns.GATE)
P0, P1, P2 = (tl.constexpr(c) for c in (row_columns.P0, row_columns.P1, row_columns.P2))
P3, P4, P5 = (tl.constexpr(c) for c in (row_columns.P3, row_columns.P4, row_columns.P5))
WIDTH = tl.constexpr(ROW_WIDTH)
SHIFT, MIRROR, AFFINE = tl.constexpr(int(Code.SHIFT)), tl.constexpr(int(Code.MIRROR)), tl.constexpr(int(Code.AFFINE))
CUTOUT, SHARPNESS = tl.constexpr(int(Code.CUTOUT)), tl.constexpr(int(Code.SHARPNESS))
COLOR, CONTRAST = tl.constexpr(int(Code.COLOR)), tl.constexpr(int(Code.CONTRAST))
BRIGHTNESS, POSTERIZE = tl.constexpr(int(Code.BRIGHTNESS)), tl.constexpr(int(Code.POSTERIZE))
SOLARIZE, INVERT = tl.constexpr(int(Code.SOLARIZE)), tl.constexpr(int(Code.INVERT))
AUTOCONTRAST, EQUALIZE = tl.constexpr(int(Code.AUTOCONTRAST)), tl.constexpr(int(Code.EQUALIZE))
WARPS = 4


@triton.jit
def channel(packed, c: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return channel ``c`` of packed pixels: int32, 0..255."""
    return packed >> (8 * c) & 255


@triton.jit
def pack(red, green, blue):  # type: ignore[no-untyped-def]
    """Return packed pixels from three int32 channels in 0..255."""
    return red | green << 8 | blue << 16


@triton.jit
def word_of(seed, index, epoch, block, word):  # type: ignore[no-untyped-def]
    """Return one word (uint32) of a Philox block."""
    zero = (block * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, zero + index, zero + epoch, zero + block.to(tl.uint32), zero + STREAM)
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def pick_row(seed, index, epoch, slots, table, s):  # type: ignore[no-untyped-def]
    """Return slot ``s`` of a sample's decisions: a row of ``table``; see decisions.decide_sample."""
    slot = slots + s * WIDTH
    block = tl.load(slot + BLOCK_NUMBER)
    count_b = tl.load(slot + COUNT_B)
    a = tl.umulhi(word_of(seed, index, epoch, block, tl.load(slot + WORD_A)), tl.load(slot + COUNT_A).to(tl.uint32))
    b = tl.umulhi(word_of(seed, index, epoch, block, tl.load(slot + WORD_B)), count_b.to(tl.uint32))
    row = tl.load(slot + BASE) + a.to(tl.int32) * count_b + b.to(tl.int32)
    gate = tl.load(table + row * WIDTH + GATE)
    gate_word = tl.load(slot + GATE_WORD)
    # A gate below 0 alternates: one word for all epochs, and the other way round in the odd ones.
    word = word_of(seed, index, tl.where(gate < 0, 0, epoch), tl.load(slot + GATE_BLOCK), gate_word) >> 8
    odd = (gate < 0) & ((epoch & 1) == 1)
    return tl.where((word.to(tl.int32) < tl.abs(gate)) != odd, row, 0)


@triton.jit
def reflected(at, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return positions in -COUNT + 1 to 2 * COUNT - 2 reflected into 0 to COUNT - 1, the border not repeated."""
    at = tl.abs(at)
    return tl.where(at < COUNT, at, 2 * (COUNT - 1) - at)


@triton.jit
def blend(low, high, factor):  # type: ignore[no-untyped-def]
    """Return the int32 byte ``low + factor * (high - low)`` of float32, cut off and clipped."""
    value = low.to(tl.float32) + factor * (high - low).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def grey_of(packed):  # type: ignore[no-untyped-def]
    """Return the luma byte of packed pixels: ITU-R 601-2 in 16-bit fixed point, rounded."""
    weighted = channel(packed, 0) * 19595 + channel(packed, 1) * 38470 + channel(packed, 2) * 7471
    return weighted + 0x8000 >> 16


@triton.jit
def read_image(image, steps, y, x, LEAD: tl.constexpr, H: tl.constexpr, W: tl.constexpr, key, slots):  # type: ignore[no-untyped-def]
    """Return the packed pixels of an image through its first ``LEAD`` steps: one shift, mirrors, then one affine."""
    seed, index, epoch = key
    shift_y, shift_x, sign, reflect = 0, 0, 1, 0
    a0, a1, a2, a3, a4, a5 = 65536, 0, 0, 0, 65536, 0
    for s in tl.static_range(LEAD):
        row = steps + pick_row(seed, index, epoch, slots, steps, s) * WIDTH
        code = tl.load(row)
        shift_x += tl.where(code == MIRROR, sign * (W - 1), tl.where(code == SHIFT, sign * tl.load(row + P1), 0))
        shift_y += tl.where(code == SHIFT, tl.load(row + P0), 0)
        reflect = tl.where(code == SHIFT, tl.load(row + P2), reflect)
        sign = tl.where(code == MIRROR, -sign, sign)
        affine = code == AFFINE
        a0, a1 = tl.where(affine, tl.load(row + P0), a0), tl.where(affine, tl.load(row + P1), a1)
        a2, a3 = tl.where(affine, tl.load(row + P2), a2), tl.where(affine, tl.load(row + P3), a3)
        a4, a5 = tl.where(affine, tl.load(row + P4), a4), tl.where(affine, tl.load(row + P5), a5)
    x_in, y_in = x * a0 + y * a1 + a2 >> 16, x * a3 + y * a4 + a5 >> 16
    from_y, from_x = y_in + shift_y, shift_x + sign * x_in
    inside = (x_in >= 0) & (x_in < W) & (y_in >= 0) & (y_in < H) & (y < H)
    goes_on = reflect == 1
    from_y, from_x = tl.where(goes_on, reflected(from_y, H), from_y), tl.where(goes_on, reflected(from_x, W), from_x)
    inside = inside & (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    at = image + (from_y * W + from_x) * 3
    red, green = tl.load(at, mask=inside, other=0), tl.load(at + 1, mask=inside, other=0)
    return pack(red.to(tl.int32), green.to(tl.int32), tl.load(at + 2, mask=inside, other=0).to(tl.int32))


@triton.jit
def geometric(packed, row, code, y, x, H: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Execute one shift, mirror or affine step."""
    p0, p1 = tl.load(row + P0), tl.load(row + P1)
    affine_x = x * p0 + y * p1 + tl.load(row + P2) >> 16
    affine_y = x * tl.load(row + P3) + y * tl.load(row + P4) + tl.load(row + P5) >> 16
    reflect = (code == SHIFT) & (tl.load(row + P2) == 1)
    shift_x, shift_y = tl.where(reflect, reflected(x + p1, W), x + p1), tl.where(reflect, reflected(y + p0, H), y + p0)
    from_x = tl.where(code == AFFINE, affine_x, tl.where(code == MIRROR, W - 1 - x, shift_x))
    from_y = tl.where(code == AFFINE, affine_y, tl.where(code == MIRROR, y, shift_y))
    inside = (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
    return tl.where(inside, tl.gather(packed, tl.where(inside, from_y * W + from_x, 0), 0), 0)


@triton.jit
def sharpness(packed, factor, y, x, H: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blend with the 3x3 smoothing; sums of three pixels fit ten bits a channel, so rows are added packed."""
    border = (y == 0) | (x == 0) | (y >= H - 1) | (x == W - 1)
    at = y * W + x
    wide = channel(packed, 0) | channel(packed, 1) << 10 | channel(packed, 2) << 20
    inner_x = (x > 0) & (x < W - 1) & (y < H)
    across = wide + tl.gather(wide, tl.where(inner_x, at - 1, 0), 0) + tl.gather(wide, tl.where(inner_x, at + 1, 0), 0)
    above = tl.gather(across, tl.where(border, 0, at - W), 0)
    below = tl.gather(across, tl.where(border, 0, at + W), 0)
    result = packed * 0
    for c in tl.static_range(3):
        own = channel(packed, c)
        total = (across >> 10 * c & 1023) + (above >> 10 * c & 1023) + (below >> 10 * c & 1023) + 4 * own
        result |= blend((2 * total + 13) // 26, own, factor) << 8 * c
    return tl.where(border, packed, result)


@triton.jit
def enhance(packed, code, factor, valid, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blend with the grey image, its mean, or black."""
    grey = grey_of(packed)
    # In integers, as PIL rounds it: a float mean may fall on the other side.
    mean = (2 * tl.sum(tl.where(valid, grey, 0), 0) + COUNT) // (2 * COUNT)
    low = tl.where(code == COLOR, grey, tl.where(code == CONTRAST, mean, 0))
    red, green = blend(low, channel(packed, 0), factor), blend(low, channel(packed, 1), factor)
    return pack(red, green, blend(low, channel(packed, 2), factor))


@triton.jit
def stretched(value, valid, stretch):  # type: ignore[no-untyped-def]
    """Return one channel with its range stretched to 0..255; ``stretch`` float64 (256,) holds 255 / range."""
    low = tl.min(tl.where(valid, value, 255), 0)
    high = tl.max(tl.where(valid, value, 0), 0)
    scale = tl.load(stretch + high - low)
    # float64, because PIL computes its tables in double and cuts off.
    exact = value.to(tl.float64) * scale + (-low).to(tl.float64) * scale
    mapped = tl.minimum(tl.maximum(exact, 0.0), 255.0).to(tl.int32)
    return tl.where(high > low, mapped, value)


@triton.jit
def equalized(value, valid, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return one channel with its histogram flattened."""
    bins = tl.arange(0, 256)
    counts = tl.histogram(value, 256, mask=valid)
    last = tl.max(tl.where(counts > 0, bins, 0), 0)
    step = (COUNT - tl.sum(tl.where(bins == last, counts, 0), 0)) // 255
    below = tl.cumsum(counts, 0) - counts + step // 2
    lut = tl.where(step > 0, tl.minimum(below // tl.maximum(step, 1), 255), bins)
    return tl.gather(lut, value, 0)


@triton.jit
def pointwise(packed, code, parameter):  # type: ignore[no-untyped-def]
    """Posterize, solarize or invert."""
    result = packed * 0
    for c in tl.static_range(3):
        own = channel(packed, c)
        kept = tl.where(code == POSTERIZE, own & parameter, tl.where(own < parameter, own, 255 - own))
        result |= tl.where(code == INVERT, 255 - own, kept) << 8 * c
    return result


@triton.jit
def apply_step(packed, row, y, x, valid, stretch, H: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Execute one step on packed pixels."""
    code = tl.load(row)
    parameter = tl.load(row + P0)
    factor = parameter.to(tl.float32, bitcast=True)
    if (code >= SHIFT) & (code <= AFFINE):
        packed = geometric(packed, row, code, y, x, H, W)
    elif code == CUTOUT:
        inside = (y >= parameter) & (x >= tl.load(row + P1)) & (y < tl.load(row + P2)) & (x < tl.load(row + P3))
        packed = tl.where(inside, tl.load(row + P4), packed)
    elif code == SHARPNESS:
        packed = sharpness(packed, factor, y, x, H, W)
    elif (code >= COLOR) & (code <= BRIGHTNESS):
        packed = enhance(packed, code, factor, valid, H * W)
    elif (code >= POSTERIZE) & (code <= INVERT):
        packed = pointwise(packed, code, parameter)
    elif code == AUTOCONTRAST:
        red, green = stretched(channel(packed, 0), valid, stretch), stretched(channel(packed, 1), valid, stretch)
        packed = pack(red, green, stretched(channel(packed, 2), valid, stretch))
    elif code == EQUALIZE:
        red, green = equalized(channel(packed, 0), valid, H * W), equalized(channel(packed, 1), valid, H * W)
        packed = pack(red, green, equalized(channel(packed, 2), valid, H * W))
    return packed


@triton.jit
def augment_kernel(  # type: ignore[no-untyped-def]
    images, rows, indices, seed_at, epoch_at, slots, table, stretch, normal, out,
    SLOTS: tl.constexpr, LEAD: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Augment and normalize image ``rows[program]``; see `launch`."""
    # One program an image: 1,024 pixels stay in registers from the first step to the last.
    i = tl.program_id(0)
    index = tl.load(indices + i).to(tl.uint32)
    seed, epoch = tl.load(seed_at), tl.load(epoch_at).to(tl.uint32)
    pixel = tl.arange(0, BLOCK)
    y, x = pixel // W, pixel % W
    valid = pixel < H * W
    image = images + tl.load(rows + i) * (H * W * 3)
    # The first steps cost no more than the reading: they only say which pixel is read.
    packed = read_image(image, table, y, x, LEAD, H, W, (seed, index, epoch), slots)
    for s in range(LEAD, SLOTS):
        row = table + pick_row(seed, index, epoch, slots, table, s) * WIDTH
        packed = apply_step(packed, row, y, x, valid, stretch, H, W)
    to = out + i.to(tl.int64) * (H * W * 3) + pixel * 3
    for c in tl.static_range(3):
        # A table instead of arithmetic: the same bytes become the same values on every device.
        tl.store(to + c, tl.load(normal + 256 * c + channel(packed, c)), mask=valid)


@triton.jit
def decide_kernel(indices, seed_at, epoch_at, slots, table, decisions, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write the decisions of sample ``indices[program]``, for tests: int32 (B, SLOTS)."""
    i = tl.program_id(0)
    index = tl.load(indices + i).to(tl.uint32)
    seed, epoch = tl.load(seed_at), tl.load(epoch_at).to(tl.uint32)
    for s in range(SLOTS):
        tl.store(decisions + i * SLOTS + s, pick_row(seed, index, epoch, slots, table, s))


def leading_slots(program: Program) -> int:
    """Return how many first slots `read_image` folds: mirrors and one shift in any order, then one affine step."""
    shifted = False
    for number, slot in enumerate(program.slots):
        code = program.table[slot[0], 0]
        if code == Code.AFFINE and is_rotation(program, number):
            return number + 1
        if code == Code.SHIFT and not shifted and is_crop(program, number):
            shifted = True
        elif code != Code.MIRROR:
            return number
    return len(program.slots)


def slot_codes(program: Program, number: int) -> NDArray[np.int32]:
    """Return the codes of all rows that a slot may pick."""
    base, count = program.slots[number, 0], program.slots[number, 1] * program.slots[number, 2]
    return program.table[base : base + count, 0]


def is_rotation(program: Program, number: int) -> bool:
    """Tell whether a slot can do nothing but affine steps."""
    return bool((slot_codes(program, number) == Code.AFFINE).all())


def is_crop(program: Program, number: int) -> bool:
    """Tell whether a slot can do nothing but shifts."""
    return bool((slot_codes(program, number) == Code.SHIFT).all())


class Tables:
    """A program's tables on a device, with the seed.

    Attributes:
        slots: int32 (S, 8).
        table: int32 (R, 8).
        seed: int64 (1,), the seed's 64 bits.
        stretch: float64 (256,), 255 / range for AutoContrast.
        lead: how many slots are folded into the reading.
    """

    def __init__(self, program: Program, seed: int, device: torch.device) -> None:
        # A program without slots still needs an address to hand over.
        slots = program.slots if len(program.slots) else np.zeros((1, ROW_WIDTH), np.int32)
        self.count, self.lead = len(program.slots), leading_slots(program)
        self.slots, self.table = torch.from_numpy(slots).to(device), torch.from_numpy(program.table).to(device)
        self.seed = torch.tensor([seed - (1 << 64) if seed >> 63 else seed], device=device)
        spans = np.maximum(np.arange(256), 1)
        self.stretch = torch.from_numpy(255.0 / spans).to(device)


def shared_bytes(tables: Tables, height: int, width: int) -> int:
    """Return the shared memory that a launch takes: what is not folded into the reading keeps whole images there."""
    return 4 * triton.next_power_of_2(height * width) if tables.count > tables.lead else 0


def launch(
    images: Tensor, rows: Tensor, indices: Tensor, epoch: Tensor, tables: Tables, normal: Tensor, out: Tensor
) -> None:
    """Augment and normalize ``images[rows]`` into ``out`` in one launch, without a host-device synchronization.

    Args:
        images: uint8 (M, H, W, 3), contiguous.
        rows: int64 (B,): which images.
        indices: int64 (B,): the samples' numbers, in 0..2**32-1.
        epoch: int64 (1,), on the device.
        tables: the operations.
        normal: bfloat16, float16 or float32 (3, 256): the output value of each byte.
        out: (B, H, W, 3), contiguous, of ``normal``'s dtype.
    """
    height, width = images.shape[1:3]
    # Triton launches on the process's current device, which need not be the one that the images are on.
    with torch.cuda.device(images.device) if images.is_cuda else nullcontext():
        augment_kernel[(len(rows),)](
            images, rows, indices, tables.seed, epoch, tables.slots, tables.table, tables.stretch, normal, out,
            SLOTS=tables.count, LEAD=tables.lead, H=height, W=width, BLOCK=triton.next_power_of_2(height * width),
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def decide_on_device(indices: Tensor, epoch: Tensor, tables: Tables) -> Tensor:
    """Return int32 (B, S), decided by the kernel; see `fastcifar.kernels.augment.decisions.decide_batch`."""
    decisions = torch.zeros((len(indices), tables.count), dtype=torch.int32, device=indices.device)
    options: dict[str, Any] = {"SLOTS": tables.count}
    decide_kernel[(len(indices),)](indices, tables.seed, epoch, tables.slots, tables.table, decisions, **options)
    return decisions
