"""Applying decisions on the CPU: numba, parallel over samples, no allocation per sample.

Every step gives PIL's bytes: nearest-neighbour geometry in 16.16 fixed point, grey as 19595 R + 38470 G + 7471 B,
blends in float32, histograms as PIL.ImageOps. Crops and mirrors and the affine step after them move each pixel once;
the normalization is vector arithmetic or a table of 256 values per channel, which holds the output's type already.
"""

import os
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from fastcifar.kernels.augment.decisions import Program, decide_sample
from fastcifar.kernels.augment.policy import CODE, P0, P1, P2, P3, P4, Code
from fastcifar.kernels.philox import split_seed

# The columns of a window, which `fold` makes of crops, mirrors and one affine step.
SHIFT_Y, SHIFT_X, SIGN, LAST_COLUMN, M00, M01, M02, M10, M11, M12, REFLECT = range(11)
CHUNKS = 16  # most work items per batch: more than threads, because samples differ in cost
CHUNK_SAMPLES = 32  # fewer are some 50 microseconds of work, which is not worth a second thread

# OpenMP's threads look out for the next batch for a while, TBB's and numba's own go to sleep and must be woken: at 128
# samples a batch, OpenMP's were two to two and a half times as fast. Who names an order of layers gets it.
if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    nb.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

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
def fold(table: Any, chosen: Any, first: Any, window: Any) -> Any:
    """Fold the crops and mirrors from slot ``first`` on, and an affine step after them, into one ``window``.

    It is int32 (11,): row offset, column offset, column sign, last column (given), the affine parameters, and whether
    the image goes on reflected beyond its borders.

    Returns:
        The first slot that is not folded. A second shift is not, because the first one has blackened pixels.
    """
    window[SHIFT_Y], window[SHIFT_X], window[SIGN], window[REFLECT] = 0, 0, 1, 0
    window[M00], window[M01], window[M02] = 1 << 16, 0, 0
    window[M10], window[M11], window[M12] = 0, 1 << 16, 0
    shifted = False
    for s in range(first, chosen.shape[0]):
        row = table[chosen[s]]
        if row[CODE] == AFFINE:
            for i in range(6):
                window[M00 + i] = row[P0 + i]
            return s + 1
        if row[CODE] == MIRROR:
            # A mirror reads from the last column backwards; after another mirror, forwards again.
            window[SHIFT_X] += window[SIGN] * window[LAST_COLUMN]
            window[SIGN] = -window[SIGN]
        elif row[CODE] == SHIFT and not shifted:
            window[SHIFT_Y] += row[P0]
            window[SHIFT_X] += window[SIGN] * row[P1]
            window[REFLECT] = row[P2]
            shifted = True
        elif row[CODE] != IDENTITY:
            return s
    return chosen.shape[0]


@nb.njit(cache=True)
def find_pixels(window: Any, height: Any, width: Any, index: Any) -> None:
    """Write which pixel each pixel of a folded window shows: index uint32 (H * W,).

    What lies outside shows pixel ``H * W + 1``, which is black. There is no branch, so that a line is a few vector
    operations. Coordinates are 16.16 in 32 bits, which holds images of up to 8,000 pixels a side.
    """
    a, b, c, d, e, f = window[M00], window[M01], window[M02], window[M10], window[M11], window[M12]
    top, bottom = max(0, -window[SHIFT_Y]), min(height, height - window[SHIFT_Y])
    if window[SIGN] > 0:
        left, right = max(0, -window[SHIFT_X]), min(width, width - window[SHIFT_X])
    else:
        left, right = max(0, window[SHIFT_X] - width + 1), min(width, window[SHIFT_X] + 1)
    rows, columns = np.uint32(max(bottom - top, 0)), np.uint32(max(right - left, 0))
    first_row, first_column, sign = np.int32(top), np.int32(left), window[SIGN]
    origin, stride, outside = np.int32(window[SHIFT_Y] * width + window[SHIFT_X]), np.int32(width), \
        np.uint32(height * width + 1)
    sixteen = np.int32(16)
    for y in range(height):
        line = index[y * width : y * width + width]
        xx, yy = np.int32(c + np.int32(y) * b), np.int32(f + np.int32(y) * e)
        for x in range(width):
            x_in = np.int32(np.int32(xx + np.int32(x) * a) >> sixteen)
            y_in = np.int32(np.int32(yy + np.int32(x) * d) >> sixteen)
            # A negative difference is a large unsigned one, so two comparisons do for four.
            inside = (np.uint32(x_in - first_column) < columns) & (np.uint32(y_in - first_row) < rows)
            pixel = np.uint32(origin + x_in * sign + y_in * stride)
            line[x] = pixel if inside else outside


@nb.njit(cache=True)
def reflect(at: Any, count: Any) -> Any:
    """Return ``at`` in -count + 1 to 2 * count - 2 reflected into 0 to count - 1, the border pixels not repeated."""
    at = abs(at)
    return at if at < count else 2 * (count - 1) - at


@nb.njit(cache=True)
def find_reflected(window: Any, height: Any, width: Any, index: Any) -> None:
    """Write what `find_pixels` does, where the image goes on reflected; what an affine step puts outside is black.

    A mirror before a shift and one after it come to the same, because a reflection commutes with them.
    """
    a, b, c, d, e, f = window[M00], window[M01], window[M02], window[M10], window[M11], window[M12]
    for y in range(height):
        for x in range(width):
            x_in, y_in = x * a + y * b + c >> 16, x * d + y * e + f >> 16
            if 0 <= x_in < width and 0 <= y_in < height:
                column = reflect(window[SHIFT_X] + window[SIGN] * x_in, width)
                index[y * width + x] = reflect(window[SHIFT_Y] + y_in, height) * width + column
            else:
                index[y * width + x] = height * width + 1


@nb.njit(cache=True)
def move_pixels(source: Any, index: Any, out: Any) -> None:
    """Write ``source[index]``, pixels as overlapping words, in rising order: a word's fourth byte is the next's first.

    The last one spills into pixel ``H * W``, which nobody reads.
    """
    for i in range(index.shape[0]):
        out[np.uint64(i)] = source[np.uint64(index[i])]


@nb.njit(cache=True)
def cutout(image: Any, row: Any) -> None:
    """Fill one rectangle with one colour in place."""
    color = row[P4]
    for y in range(row[P0], row[P2]):
        for x in range(row[P1], row[P3]):
            for c in range(3):
                image[y, x, c] = color >> 8 * c & 255


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
    flat, one, two = image.reshape(-1), np.uint64(1), np.uint64(2)  # unsigned indices, so that this becomes vector code
    for i in range(image.shape[0] * image.shape[1]):
        k = np.uint64(3 * i)
        red, green, blue = flat[k], flat[k + one], flat[k + two]
        low = grey(red, green, blue)
        flat[k], flat[k + one] = blend(low, red, factor), blend(low, green, factor)
        flat[k + two] = blend(low, blue, factor)


@nb.njit(cache=True)
def mean_grey(image: Any) -> Any:
    """Return the image's mean grey, rounded half up."""
    flat, one, two = image.reshape(-1), np.uint64(1), np.uint64(2)
    total, count = 0, image.shape[0] * image.shape[1]
    for i in range(count):
        k = np.uint64(3 * i)
        total += grey(flat[k], flat[k + one], flat[k + two])
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
        # Whole numbers, whose quotient float64 rounds down right; integer divisions took 1.4 times as long.
        lut[v] = np.uint8(min(np.float64(below) / np.float64(step), 255.0)) if step else v
        below += counts[v]


@nb.njit(cache=True)
def point_lut(image: Any, row: Any, factor: Any, counts: Any, lut: Any) -> None:
    """Write the tables uint8 (3, 256) of a step that maps each value alone."""
    code, parameter = row[CODE], row[P0]
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
def write_linear(pixels: Any, center: Any, scale: Any, line: Any, out: Any) -> None:
    """Write ``(pixel - center) * scale`` as the bits of bfloat16, rounded to nearest even, an image line at a time.

    Twice as fast as the table, because it is vector arithmetic;
    `fastcifar.augment.augment.linear_form` proves it equal.
    """
    bits, width = line.view(np.uint32), line.shape[0]
    for first in range(0, out.shape[0], width):
        source, to = pixels[first : first + width], out[first : first + width]
        for i in range(width):
            line[i] = (np.float32(source[i]) - center[i]) * scale[i]
        for i in range(width):
            odd = bits[i] >> np.uint32(16) & np.uint32(1)
            to[i] = np.uint16(bits[i] + np.uint32(0x7FFF) + odd >> np.uint32(16))


@nb.njit(cache=True)
def apply_sample(image: Any, chosen: Any, table: Any, factors: Any, work: Any) -> Any:
    """Execute one sample's decisions.

    Returns:
        0 or 1: which half of the work space's pixels holds the result.
    """
    window, pixels, words, index, counts, lut = work
    height, width, size, now, s = image.shape[0], image.shape[1], image.size, 0, 0
    source = image.reshape(size)
    # Into memory with room for what the word-wise move spills; the source may be the caller's data set.
    for i in range(size):
        pixels[0, i] = source[i]
    while s < chosen.shape[0]:
        row, factor = table[chosen[s]], factors[chosen[s], P0]
        if IDENTITY < row[CODE] <= AFFINE:
            # Crop, mirror and rotation together move each pixel once, and round once.
            s = fold(table, chosen, s, window)
            if window[REFLECT]:
                find_reflected(window, height, width, index)
            elif height == 32 and width == 32:
                # The compiler writes a line of known length without a loop: half the time.
                find_pixels(window, 32, 32, index)
            else:
                find_pixels(window, height, width, index)
            move_pixels(words[now], index, words[1 - now])
            now = 1 - now
            continue
        s += 1
        if row[CODE] == IDENTITY:
            continue
        here = pixels[now][:size].reshape((height, width, 3))
        if row[CODE] == CUTOUT:
            cutout(here, row)
        elif row[CODE] == SHARPNESS:
            sharpness(here, factor, pixels[1 - now][:size].reshape((height, width, 3)))
            now = 1 - now
        elif row[CODE] == COLOR:
            color(here, factor)
        else:
            point_lut(here, row, factor, counts, lut)
            write_lut(here, lut, here)
    return now


@nb.njit(cache=True)
def apply_chunk(
    images: Any, rows: Any, indices: Any, key: Any, program: Any, normal: Any, out: Any, scratch: Any, span: Any
) -> None:
    """Augment samples ``span[0]`` to ``span[1] - 1`` of a batch; see `augment_batch`."""
    slots, table, factors = program
    lut, center, scale = normal
    chosen, line, work = scratch[0][: len(slots)], scratch[1], scratch[2:]
    pixels, shape = work[1], images.shape[1:]
    size = shape[0] * shape[1] * shape[2]
    work[0][3] = shape[1] - 1
    for i in range(span[0], span[1]):
        decide_sample(key[0], key[1], np.uint64(indices[i]), key[2], slots, table, chosen)
        now = apply_sample(images[rows[i]], chosen, table, factors, work)
        if center.size:
            write_linear(pixels[now], center, scale, line, out[i].reshape(size))
        else:
            write_lut(pixels[now][:size].reshape(shape), lut, out[i])


@nb.njit(cache=True, parallel=True)
def _augment_parallel(
    images: Any, rows: Any, indices: Any, key: Any, program: Any, normal: Any, out: Any, scratch: Any, chunks: Any
) -> None:
    decisions, lines, windows, pixels, words, indexes, counts, luts = scratch
    count = len(rows)
    for k in nb.prange(chunks):
        mine = (decisions[k], lines[k], windows[k], pixels[k], words[k], indexes[k], counts[k], luts[k])
        span = (count * k // chunks, count * (k + 1) // chunks)
        apply_chunk(images, rows, indices, key, program, normal, out, mine, span)


def share_threads() -> int:
    """Let numba use as many threads as torch, whose OpenMP it shares; return how many.

    Starting them sets torch's number to that of the cores, and with it the last bits of sums; it is put back.
    """
    count = torch.get_num_threads()
    # With one thread numba's are not started at all: starting them is what changes torch's number.
    if count > 1:
        nb.set_num_threads(min(count, nb.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
    return count


def make_scratch(slots: int, height: int, width: int) -> tuple[NDArray[Any], ...]:
    """Return the work space of `augment_batch`, per chunk; it serves every program of at most ``slots`` slots.

    It is: decisions, a line of floats, windows, two images, the same two as words, indices, histograms, tables. An
    image has two more pixels: one that takes what `move_pixels` spills, and one that stays black. Its words of four
    bytes lie three bytes apart, so that a pixel moves in one load and one store.
    """
    count = height * width
    image_bytes = 3 * (count + 2) + 1
    pixels = np.zeros((CHUNKS, 2, image_bytes), np.uint8)
    strides = (2 * image_bytes, image_bytes, 3)
    return (
        np.zeros((CHUNKS, slots), np.int32),
        np.zeros((CHUNKS, width * 3), np.float32),
        np.zeros((CHUNKS, 11), np.int32),
        pixels,
        np.ndarray((CHUNKS, 2, count + 2), np.uint32, pixels.data, strides=strides),
        np.zeros((CHUNKS, count), np.uint32),
        np.zeros((CHUNKS, 3, 256), np.int32),
        np.zeros((CHUNKS, 3, 256), np.uint8),
    )


def augment_batch(
    images: NDArray[np.uint8],
    rows: NDArray[np.int64],
    indices: NDArray[np.int64],
    program: Program,
    normal: tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]],
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
        indices: int64 (B,): the samples' numbers, which key their decisions.
        program: the operations, compiled for H x W.
        normal: (3, 256), the output value of each byte and channel, of ``out``'s type, and, where it is linear
            (`fastcifar.augment.augment.linear_form`), centres and scales, float32 (W * 3,), else both empty.
        out: (B, H, W, 3).
        scratch: from `make_scratch`; not shared between concurrent calls.
        seed: 0..2**64-1.
        epoch: 0..2**32-1.
    """
    low, high = split_seed(seed)
    key = (np.uint64(low), np.uint64(high), np.uint64(epoch))
    tables = (program.slots, program.table, program.table.view(np.float32))
    # The same results for any number of chunks: a sample's decisions are a hash of its number.
    chunks = min(CHUNKS, len(rows) // CHUNK_SAMPLES)
    if chunks > 1 and share_threads() > 1:
        _augment_parallel(images, rows, indices, key, tables, normal, out, scratch, chunks)
    else:
        first = tuple(part[0] for part in scratch)
        apply_chunk(images, rows, indices, key, tables, normal, out, first, (0, len(rows)))
