"""Applying plans on the CPU: numba, parallel over samples, no allocation per sample.

Every step gives PIL's bytes: nearest-neighbour geometry in 16.16 fixed point, grey as 19595 R + 38470 G + 7471 B,
blends in float32, histograms as PIL.ImageOps. Leading crops, mirrors and one affine step are folded into the reading
of the image; the normalization is a table of 256 values per channel, which holds the output's type already.
"""

from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from fastcifar.augment.plan import PARAMS, Program, plan_sample
from fastcifar.augment.policy import Code
from fastcifar.philox import split_seed

CHUNKS = 16  # work items per batch: more than threads, because samples differ in cost

IDENTITY, SHIFT, MIRROR, AFFINE = int(Code.IDENTITY), int(Code.SHIFT), int(Code.MIRROR), int(Code.AFFINE)
CUTOUT, SHARPNESS, COLOR, CONTRAST = int(Code.CUTOUT), int(Code.SHARPNESS), int(Code.COLOR), int(Code.CONTRAST)
BRIGHTNESS, POSTERIZE, SOLARIZE = int(Code.BRIGHTNESS), int(Code.POSTERIZE), int(Code.SOLARIZE)
INVERT, AUTOCONTRAST, EQUALIZE = int(Code.INVERT), int(Code.AUTOCONTRAST), int(Code.EQUALIZE)


@nb.njit(cache=True)
def blend(low: Any, high: Any, factor: Any) -> Any:
    """Return the byte ``low + factor * (high - low)``, computed in float32, cut off and clipped to 0..255."""
    value = np.float32(low) + factor * np.float32(np.int32(high) - np.int32(low))
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@nb.njit(cache=True)
def grey(red: Any, green: Any, blue: Any) -> Any:
    """Return the luma byte of ITU-R 601-2 in 16-bit fixed point, rounded."""
    return (np.int64(red) * 19595 + np.int64(green) * 38470 + np.int64(blue) * 7471 + 0x8000) >> 16


@nb.njit(cache=True)
def fold(table: Any, plan: Any, window: Any) -> Any:
    """Fold leading crops and mirrors into ``window`` = (row offset, column offset, column sign).

    Returns:
        The number of slots folded. A second shift stops it, because the first one has blackened pixels.
    """
    window[0], window[1], window[2] = 0, 0, 1
    shifted = False
    for s in range(plan.shape[0]):
        row = table[plan[s]]
        if row[0] == MIRROR:
            window[1] += window[2] * window[3]
            window[2] = -window[2]
        elif row[0] == SHIFT and not shifted:
            window[0] += row[PARAMS]
            window[1] += window[2] * row[PARAMS + 1]
            shifted = True
        elif row[0] != IDENTITY:
            return s
    return plan.shape[0]


@nb.njit(cache=True)
def read_window(image: Any, window: Any, out: Any) -> None:
    """Write ``image`` through a folded window; zero outside."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        source_y = y + window[0]
        inside = 0 <= source_y < height
        for x in range(width):
            source_x = window[1] + window[2] * x
            if inside and 0 <= source_x < width:
                for c in range(3):
                    out[y, x, c] = image[source_y, source_x, c]
            else:
                for c in range(3):
                    out[y, x, c] = 0


@nb.njit(cache=True)
def read_affine(image: Any, window: Any, row: Any, out: Any) -> None:
    """Write ``image`` through a folded window and then an affine step; zero outside of either."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        xx = np.int64(row[PARAMS + 2]) + y * np.int64(row[PARAMS + 1])
        yy = np.int64(row[PARAMS + 5]) + y * np.int64(row[PARAMS + 4])
        for x in range(width):
            x_in, y_in = xx >> 16, yy >> 16
            source_y, source_x = y_in + window[0], window[1] + window[2] * x_in
            inside = 0 <= x_in < width and 0 <= y_in < height
            if inside and 0 <= source_y < height and 0 <= source_x < width:
                for c in range(3):
                    out[y, x, c] = image[source_y, source_x, c]
            else:
                for c in range(3):
                    out[y, x, c] = 0
            xx += row[PARAMS]
            yy += row[PARAMS + 3]


@nb.njit(cache=True)
def geometric(image: Any, row: Any, window: Any, out: Any) -> None:
    """Carry out one shift, mirror or affine step from ``image`` to ``out``."""
    window[0], window[1], window[2] = 0, 0, 1
    if row[0] == AFFINE:
        read_affine(image, window, row, out)
        return
    if row[0] == MIRROR:
        window[1], window[2] = window[3], -1
    else:
        window[0], window[1] = row[PARAMS], row[PARAMS + 1]
    read_window(image, window, out)


@nb.njit(cache=True)
def cutout(image: Any, row: Any) -> None:
    """Blacken one rectangle in place."""
    for y in range(row[PARAMS], row[PARAMS + 2]):
        for x in range(row[PARAMS + 1], row[PARAMS + 3]):
            for c in range(3):
                image[y, x, c] = 0


@nb.njit(cache=True)
def sharpen_row(above: Any, row: Any, below: Any, factor: Any, out: Any) -> None:
    """Write one inner row of `sharpness`; rows are uint8 (W * 3,), so that neighbours lie three bytes apart."""
    last = row.shape[0] - 3
    for i in range(3):
        out[i], out[last + i] = row[i], row[last + i]
    for i in range(last - 3):
        total = np.int32(above[i]) + np.int32(above[i + 3]) + np.int32(above[i + 6])
        total += np.int32(row[i]) + np.int32(5) * np.int32(row[i + 3]) + np.int32(row[i + 6])
        total += np.int32(below[i]) + np.int32(below[i + 3]) + np.int32(below[i + 6])
        # total / 13 rounded; a tie cannot happen, so the integer form equals PIL's float32 sum.
        smooth = np.int32(np.uint32(2 * total + 13) // np.uint32(26))
        out[i + 3] = blend(smooth, row[i + 3], factor)


@nb.njit(cache=True)
def sharpness(image: Any, factor: Any, out: Any) -> None:
    """Blend ``image`` with its 3x3 smoothing (1 1 1, 1 5 1, 1 1 1) / 13, whose border pixels are the image's."""
    height, row_bytes = image.shape[0], image.shape[1] * 3
    rows, to = image.reshape(height, row_bytes), out.reshape(height, row_bytes)
    to[0], to[height - 1] = rows[0], rows[height - 1]
    for y in range(1, height - 1):
        sharpen_row(rows[y - 1], rows[y], rows[y + 1], factor, to[y])


@nb.njit(cache=True)
def color(image: Any, factor: Any) -> None:
    """Blend each pixel with its grey, in place."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            low = grey(image[y, x, 0], image[y, x, 1], image[y, x, 2])
            for c in range(3):
                image[y, x, c] = blend(low, image[y, x, c], factor)


@nb.njit(cache=True)
def mean_grey(image: Any) -> Any:
    """Return the image's mean grey, rounded half up."""
    total = 0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            total += grey(image[y, x, 0], image[y, x, 1], image[y, x, 2])
    count = image.shape[0] * image.shape[1]
    return (2 * total + count) // (2 * count)


@nb.njit(cache=True)
def histogram(image: Any, counts: Any) -> None:
    """Count each channel's values: counts int32 (3, 256)."""
    counts[:] = 0
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                counts[c, image[y, x, c]] += 1


@nb.njit(cache=True)
def autocontrast_lut(counts: Any, lut: Any) -> None:
    """Write one channel's table that stretches its range to 0..255; a single value stays."""
    low, high = 0, 255
    while counts[low] == 0:
        low += 1
    while counts[high] == 0:
        high -= 1
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    for v in range(256):
        lut[v] = np.uint8(min(max(v * scale + offset, 0.0), 255.0))


@nb.njit(cache=True)
def equalize_lut(counts: Any, total: Any, lut: Any) -> None:
    """Write one channel's table that flattens its histogram, or the identity where the step would be 0."""
    high = 255
    while counts[high] == 0:
        high -= 1
    step = (total - counts[high]) // 255
    below = step // 2
    for v in range(256):
        lut[v] = min(below // step, 255) if step else v
        below += counts[v]


@nb.njit(cache=True)
def point_lut(image: Any, row: Any, factor: Any, counts: Any, lut: Any) -> None:
    """Write the tables uint8 (3, 256) of a step that maps each value alone."""
    code, parameter = row[0], row[PARAMS]
    if code == AUTOCONTRAST or code == EQUALIZE:
        histogram(image, counts)
        for c in range(3):
            if code == EQUALIZE:
                equalize_lut(counts[c], image.shape[0] * image.shape[1], lut[c])
            else:
                autocontrast_lut(counts[c], lut[c])
        return
    low = mean_grey(image) if code == CONTRAST else 0
    for v in range(256):
        if code == POSTERIZE:
            value = np.uint8(v & parameter)
        elif code == SOLARIZE:
            value = np.uint8(v if v < parameter else 255 - v)
        elif code == INVERT:
            value = np.uint8(255 - v)
        else:
            value = blend(low, v, factor)
        for c in range(3):
            lut[c, v] = value


@nb.njit(cache=True)
def write_lut(image: Any, lut: Any, out: Any) -> None:
    """Write ``lut[c, image[y, x, c]]``, of any element type."""
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            for c in range(3):
                out[y, x, c] = lut[c, image[y, x, c]]


@nb.njit(cache=True)
def apply_sample(
    image: Any, plan: Any, table: Any, factors: Any, pixels: Any, window: Any, counts: Any, lut: Any
) -> Any:
    """Carry out one plan.

    Returns:
        0 or 1: which half of ``pixels`` uint8 (2, H, W, 3) holds the result.
    """
    slot, now = fold(table, plan, window), 0
    if slot < plan.shape[0] and table[plan[slot], 0] == AFFINE:
        read_affine(image, window, table[plan[slot]], pixels[0])
        slot += 1
    else:
        read_window(image, window, pixels[0])
    for s in range(slot, plan.shape[0]):
        row, factor = table[plan[s]], factors[plan[s], PARAMS]
        source, other = pixels[now], pixels[1 - now]
        if row[0] == IDENTITY:
            continue
        if row[0] <= AFFINE:
            geometric(source, row, window, other)
            now = 1 - now
        elif row[0] == CUTOUT:
            cutout(source, row)
        elif row[0] == SHARPNESS:
            sharpness(source, factor, other)
            now = 1 - now
        elif row[0] == COLOR:
            color(source, factor)
        else:
            point_lut(source, row, factor, counts, lut)
            write_lut(source, lut, source)
    return now


@nb.njit(cache=True)
def apply_chunk(
    images: Any, rows: Any, indices: Any, key: Any, program: Any, normal: Any, out: Any, scratch: Any, span: Any
) -> None:
    """Augment samples ``span[0]`` to ``span[1] - 1`` of a batch; see `augment_batch`."""
    slots, table, factors = program
    plan, window, pixels, counts, lut = scratch
    window[3] = images.shape[2] - 1
    for i in range(span[0], span[1]):
        plan_sample(key[0], key[1], np.uint64(indices[i]), key[2], slots, table, plan)
        now = apply_sample(images[rows[i]], plan, table, factors, pixels, window, counts, lut)
        write_lut(pixels[now], normal, out[i])


@nb.njit(cache=True, parallel=True)
def _augment_parallel(
    images: Any, rows: Any, indices: Any, key: Any, program: Any, normal: Any, out: Any, scratch: Any
) -> None:
    plans, windows, pixels, counts, luts = scratch
    count, chunks = len(rows), plans.shape[0]
    for k in nb.prange(chunks):
        mine = (plans[k, : len(program[0])], windows[k], pixels[k], counts[k], luts[k])
        span = (count * k // chunks, count * (k + 1) // chunks)
        apply_chunk(images, rows, indices, key, program, normal, out, mine, span)


def make_scratch(slots: int, height: int, width: int) -> tuple[NDArray[Any], ...]:
    """Return the work space of `augment_batch`: plans, windows, pixels, histograms, tables, per chunk.

    It serves every program of at most ``slots`` slots.
    """
    return (
        np.zeros((CHUNKS, slots), np.int32),
        np.zeros((CHUNKS, 4), np.int64),
        np.zeros((CHUNKS, 2, height, width, 3), np.uint8),
        np.zeros((CHUNKS, 3, 256), np.int32),
        np.zeros((CHUNKS, 3, 256), np.uint8),
    )


def augment_batch(
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    indices: NDArray[np.int64],
    program: Program,
    normal: NDArray[Any],
    out: NDArray[Any],
    scratch: tuple[NDArray[Any], ...],
    *,
    seed: int,
    epoch: int,
) -> None:
    """Augment and normalize ``images[rows]`` into ``out``.

    Args:
        images: uint8 (M, H, W, 3).
        rows: int64 (B,): which images.
        indices: int64 (B,): the samples' numbers, which key their plans.
        program: the operations, compiled for H x W.
        normal: (3, 256), the output value of each byte and channel, of ``out``'s type.
        out: (B, H, W, 3).
        scratch: from `make_scratch`; not shared between concurrent calls.
        seed: 0..2**64-1.
        epoch: 0..2**32-1.
    """
    low, high = split_seed(seed)
    key = (np.uint64(low), np.uint64(high), np.uint64(epoch))
    tables = (program.slots, program.table, program.table.view(np.float32))
    _augment_parallel(images, rows, indices, key, tables, normal, out, scratch)
