"""Each sample's random decisions, as integers, from a counter-based hash.

A list of operations becomes a `Program`: a table of steps (`fastcifar.kernels.augment.policy`) and one *slot* per step
that a sample goes through. A slot says which words of Philox (stream `Stream.AUGMENT`) pick the row of the table, so
that a sample's decisions are one row number per slot, 0 for "nothing". It depends on (seed, epoch, sample index) alone.

Draw numbers (draw // 4 is the Philox block, draw % 4 the word). They are fixed, so that adding an operation changes
none of the others; a second operation of the same kind in a list takes the numbers of the first plus 64, and so on.

====== ======================================================================================
 draw  use
====== ======================================================================================
 0, 1  crop: row offset, column offset
 2     flip: gate
 3     rotate: angle, one of 4,096 equal steps' midpoints over +-degrees
 4     autoaugment: sub-policy and both signs, uniform in 0..99
 5, 6  autoaugment: gates of the first and second operation
 8     cutout: gate, for all holes
 9+4j  cutout: centre row of hole j (0 to 3)
 10+4j cutout: centre column of hole j
 24+4j randaugment: operation j (0 to 3) and sign, uniform in 0..27
 40    trivialaugment: operation, magnitude bin and sign, uniform in 0..867
 44,45 erase: shape, place
 46    erase: gate
====== ======================================================================================

Decisions that alternate (``flip(alternate=true)``) take the words of epoch 0 in every epoch.

A word w gives a uniform integer below n as ``w * n >> 32`` (bias below n / 2**32) and passes a gate of probability p
where ``w >> 8 < p * 2**24``.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from fastcifar.config.operations import (
    AutoAugment,
    Crop,
    Cutout,
    Erase,
    Flip,
    Op,
    RandAugment,
    Rotate,
    TrivialAugmentWide,
)
from fastcifar.errors import UserError
from fastcifar.kernels.augment.policy import (
    GATE,
    P0,
    Code,
    autoaugment_rows,
    randaugment_rows,
    rotation_params,
    step_row,
    trivialaugment_rows,
)
from fastcifar.kernels.philox import Stream, philox_scalar, split_seed

ANGLES = 4096
ERASE_STEPS, ERASE_PLACES = 8, 1024
"""Rectangles of ``erase``: so many areas and as many aspects (midpoints of equal intervals), each at so many places."""
ERASE_ASPECTS = (0.3, 3.3)
AUGMENT_STREAM = int(Stream.AUGMENT)
BLOCKS_PER_OCCURRENCE = 16
# The columns of a slot.
BASE, COUNT_A, COUNT_B, BLOCK_NUMBER, WORD_A, WORD_B, GATE_BLOCK, GATE_WORD = range(8)
SLOT_WIDTH = 8


@dataclass(frozen=True)
class Program:
    """A list of operations, compiled for one image size.

    Attributes:
        slots: int32 (S, 8): first row, two counts, Philox block, their two words, the gate's block and word.
        table: int32 (R, 8): the steps; row 0 does nothing.
    """

    slots: NDArray[np.int32]
    table: NDArray[np.int32]


@dataclass(frozen=True)
class Slot:
    """One step of a sample: pick ``rows[a * count_b + b]`` with the words that ``draws`` and ``gate`` number."""

    rows: list[list[int]]
    draws: tuple[int, int]
    gate: int
    count_b: int = 1

    def encode(self, base: int, occurrence: int) -> list[int]:
        """Return the slot's eight columns when its rows start at ``base``."""
        first = BLOCKS_PER_OCCURRENCE * occurrence
        (a, b), count_a = self.draws, len(self.rows) // self.count_b
        return [base, count_a, self.count_b, first + a // 4, a % 4, b % 4, first + self.gate // 4, self.gate % 4]


def build_program(
    ops: Sequence[Op], height: int, width: int, mean: Sequence[float] = (0.0, 0.0, 0.0), before: Sequence[Op] = ()
) -> Program:
    """Compile a list of operations for images of ``height`` x ``width`` pixels; the order is kept.

    Args:
        ops: the operations.
        height: of the images, in pixels.
        width: of the images, in pixels.
        mean: per channel, in 0..1, for operations that fill with the mean colour.
        before: the operations of a program that runs before this one, so that none shares a draw with these.

    Raises:
        UserError: an operation needs larger images.
    """
    check_sizes(ops, height, width)
    table, slots = [step_row(Code.IDENTITY)], []
    seen = Counter(type(op) for op in before)
    for op in ops:
        occurrence = seen[type(op)]
        seen[type(op)] += 1
        for slot in op_slots(op, height, width, mean):
            slots.append(slot.encode(len(table), occurrence))
            table.extend(slot.rows)
    return Program(np.array(slots, np.int32).reshape(-1, SLOT_WIDTH), np.array(table, np.int64).astype(np.int32))


def check_sizes(ops: Sequence[Op], height: int, width: int) -> None:
    """Make sure that the images are large enough for the operations.

    Raises:
        UserError: they are not; the message names the operation.
    """
    for op in ops:
        least = 0
        if isinstance(op, Crop) and op.pad == "reflect":
            least = op.padding_px + 1  # a reflection repeats no pixel, so a border of n pixels needs n others
        if isinstance(op, Cutout) and op.inside:
            least = op.size_px
        if min(height, width) < least:
            raise UserError(f'augment: "{op}" needs images of {least} px or more, these have {height} x {width}')


def op_slots(op: Op, height: int, width: int, mean: Sequence[float] = (0.0, 0.0, 0.0)) -> Iterator[Slot]:
    """Yield the slots of one operation, with the draw numbers of its first occurrence."""
    match op:
        case Crop():
            offsets = range(-op.padding_px, op.padding_px + 1)
            reflect = int(op.pad == "reflect")
            rows = [step_row(Code.SHIFT, dy, dx, reflect) for dy in offsets for dx in offsets]
            yield Slot(rows, (0, 1), 0, count_b=len(offsets))
        case Flip():
            row = step_row(Code.MIRROR, p=op.p)
            yield Slot([alternating(row) if op.alternate else row], (2, 2), 2)
        case Rotate():
            yield Slot(rotate_rows(op.degrees, height, width), (3, 3), 3)
        case AutoAugment():
            yield Slot(autoaugment_rows(0, height, width), (4, 4), 5)
            yield Slot(autoaugment_rows(1, height, width), (4, 4), 6)
        case Cutout():
            rows = cutout_rows(op, height, width, mean)
            places = width - op.size_px + 1 if op.inside else width
            for hole in range(op.holes):
                yield Slot(rows, (9 + 4 * hole, 10 + 4 * hole), 8, count_b=places)
        case Erase():
            yield Slot(erase_rows(op, height, width, mean), (44, 45), 46, count_b=ERASE_PLACES)
        case RandAugment():
            rows = randaugment_rows(op.magnitude, height, width)
            for number in range(op.num_ops):
                yield Slot(rows, (24 + 4 * number, 24 + 4 * number), 24 + 4 * number)
        case TrivialAugmentWide():
            yield Slot(trivialaugment_rows(height, width), (40, 40), 40)


def rotate_rows(degrees: float, height: int, width: int) -> list[list[int]]:
    """Return the 4,096 rotations of ``rotate(degrees)``, from -degrees to +degrees."""
    return [step_row(Code.AFFINE, *rotation_params(rotate_angle(degrees, k), height, width)) for k in range(ANGLES)]


def rotate_angle(degrees: float, k: int) -> float:
    """Return the angle in degrees of step ``k`` in 0..4095 of ``rotate(degrees)``: the midpoint of its interval."""
    return degrees * ((2 * k + 1) / ANGLES - 1)


def alternating(row: list[int]) -> list[int]:
    """Return a step's row with a gate that is open in every second epoch."""
    # A probability of 0 still alternates (always in the odd epochs) and needs a gate below 0: one in 2**24 is lost.
    return [row[0], -max(row[GATE], 1), *row[P0:]]


def cutout_rows(op: Cutout, height: int, width: int, mean: Sequence[float]) -> list[list[int]]:
    """Return one square per place, row by row: clipped around each pixel, or whole from each possible corner."""
    color = mean_color(mean) if op.fill == "mean" else 0
    first, size = (0 if op.inside else -(op.size_px // 2)), op.size_px
    rows = []
    for top in range(first, first + (height - size + 1 if op.inside else height)):
        for left in range(first, first + (width - size + 1 if op.inside else width)):
            bottom, right = min(top + size, height), min(left + size, width)
            rows.append(step_row(Code.CUTOUT, max(top, 0), max(left, 0), bottom, right, color, p=op.p))
    return rows


def erase_shapes(op: Erase, height: int, width: int) -> list[tuple[int, int]]:
    """Return the heights and widths of ``erase``'s rectangles, all equally likely, in pixels.

    Areas are uniform and aspects (height over width) log-uniform, as in torchvision; what would be as high or as wide
    as the image is left out, as torchvision draws again.
    """
    low, high = (math.log(aspect) for aspect in ERASE_ASPECTS)
    middles = [(k + 0.5) / ERASE_STEPS for k in range(ERASE_STEPS)]
    shapes = []
    for area in (height * width * (op.min_area + (op.max_area - op.min_area) * m) for m in middles):
        for aspect in (math.exp(low + (high - low) * m) for m in middles):
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < tall < height and 0 < wide < width:
                shapes.append((tall, wide))
    # Tiny images may leave none: one pixel then.
    return shapes or [(1, 1)]


def erase_rows(op: Erase, height: int, width: int, mean: Sequence[float]) -> list[list[int]]:
    """Return each shape's rectangles: 1,024 places, spread evenly over all that there are, row by row."""
    color, rows = mean_color(mean) if op.fill == "mean" else 0, []
    for tall, wide in erase_shapes(op, height, width):
        across = width - wide + 1
        places = (height - tall + 1) * across
        for number in range(ERASE_PLACES):
            top, left = divmod(number * places // ERASE_PLACES, across)
            rows.append(step_row(Code.CUTOUT, top, left, top + tall, left + wide, color, p=op.p))
    return rows


def mean_color(mean: Sequence[float]) -> int:
    """Return the bytes nearest to a colour in 0..1 per channel, as `Code.CUTOUT` holds them."""
    red, green, blue = (round(255 * min(max(m, 0.0), 1.0)) for m in mean)
    return red | green << 8 | blue << 16


@nb.njit(cache=True)
def decide_sample(seed_low: Any, seed_high: Any, index: Any, epoch: Any, slots: Any, table: Any, chosen: Any) -> None:
    """Write one sample's decisions: int32 (S,), a row of ``table`` per slot, 0 where its gate stays shut."""
    stream = np.uint64(AUGMENT_STREAM)
    shift = np.uint64(32)
    block = -1
    words = (np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0))
    gate_words = words
    for s in range(slots.shape[0]):
        slot = slots[s]
        # Four words come out of one evaluation of Philox; neighbouring slots share them.
        if slot[BLOCK_NUMBER] != block:
            block = slot[BLOCK_NUMBER]
            words = philox_scalar(seed_low, seed_high, index, epoch, np.uint64(block), stream)
        a = words[slot[WORD_A]] * np.uint64(slot[COUNT_A]) >> shift
        b = words[slot[WORD_B]] * np.uint64(slot[COUNT_B]) >> shift
        row = slot[BASE] + np.int64(a) * slot[COUNT_B] + np.int64(b)
        gate_words, gate = words, table[row, GATE]
        if gate < 0:
            zero = np.uint64(0)
            gate_words = philox_scalar(seed_low, seed_high, index, zero, np.uint64(slot[GATE_BLOCK]), stream)
        elif slot[GATE_BLOCK] != block:
            gate_words = philox_scalar(seed_low, seed_high, index, epoch, np.uint64(slot[GATE_BLOCK]), stream)
        open_ = np.int64(gate_words[slot[GATE_WORD]] >> np.uint64(8)) < abs(gate)
        if gate < 0 and epoch & np.uint64(1):
            open_ = not open_
        chosen[s] = row if open_ else 0


@nb.njit(cache=True)
def _decide_batch(
    seed_low: Any, seed_high: Any, indices: Any, epoch: Any, slots: Any, table: Any, decisions: Any
) -> None:
    for i in range(indices.shape[0]):
        decide_sample(seed_low, seed_high, np.uint64(indices[i]), epoch, slots, table, decisions[i])


def decide_batch(program: Program, indices: NDArray[np.int64], epoch: int, seed: int) -> NDArray[np.int32]:
    """Return the decisions of samples: int32 (B, S), row numbers of ``program.table``.

    Args:
        program: the compiled operations.
        indices: int64 (B,), in 0..2**32-1.
        epoch: 0 or more.
        seed: 0..2**64-1.
    """
    decisions = np.zeros((len(indices), len(program.slots)), np.int32)
    low, high = split_seed(seed)
    _decide_batch(
        np.uint64(low), np.uint64(high), np.asarray(indices), np.uint64(epoch), program.slots, program.table, decisions
    )
    return decisions
