"""Corruptions of test images in five levels, after CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019), made on the fly.

The levels are those of the paper's CIFAR-10 files. Left out are the corruptions that need a drawing (frost), a
simulation (fog, snow, spatter) or ImageMagick (motion blur), and the two that move pixels about (glass blur, elastic).
Random numbers and rounding differ from the published files: compare results with others of this program, not with a
table of CIFAR-10-C.

Pure functions of images, float64 (N, H, W, C) in 0..1; `corrupt` wraps them for uint8.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np

from fastcifar.data import pixels
from fastcifar.errors import UserError, nearest

LEVELS = (1, 2, 3, 4, 5)
CHUNK = 1000
Images = np.ndarray
Corruption = Callable[[Images, int, np.random.Generator], Images]


# ---------------------------------------------------------------------------------------------------------------- noise


def gaussian_noise(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Add normal noise: x + N(0, s)."""
    return x + rng.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[level - 1], size=x.shape)


def shot_noise(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Count photons: Poisson(c * x) / c."""
    c = (500, 250, 100, 75, 50)[level - 1]
    return rng.poisson(x * c) / c


def impulse_noise(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Set a share of the values to 0 or 1, each with probability one half ("salt and pepper")."""
    hit = rng.random(x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[level - 1]
    return np.where(hit, rng.integers(2, size=x.shape), x)


def speckle_noise(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Add noise in proportion to the value: x + x * N(0, s)."""
    return x + x * rng.normal(scale=(0.06, 0.10, 0.12, 0.16, 0.20)[level - 1], size=x.shape)


# ----------------------------------------------------------------------------------------------------------------- blur


def gaussian_blur(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Convolve with a Gaussian of this many pixels' deviation."""
    from scipy.ndimage import gaussian_filter

    sigma_px = (0.4, 0.6, 0.7, 0.8, 1.0)[level - 1]
    return gaussian_filter(x, (0, sigma_px, sigma_px, 0), mode="nearest")


def defocus_blur(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Convolve with a disk of a radius in pixels, its rim smoothed by a 3 x 3 Gaussian."""
    from scipy.ndimage import correlate

    radius_px, rim_px = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level - 1]
    return correlate(x, disk(radius_px, rim_px)[None, :, :, None], mode="mirror")


def disk(radius_px: float, rim_px: float) -> np.ndarray:
    """Return the kernel of `defocus_blur`, float64 (S, S), S odd, its sum 1."""
    reach = math.ceil(radius_px) + 1
    place = np.arange(-reach, reach + 1)
    inside = (place[:, None] ** 2 + place[None, :] ** 2 <= radius_px**2).astype(np.float64)
    side = math.exp(-1 / (2 * rim_px**2))
    rim = np.array([side, 1, side]) / (1 + 2 * side)
    smooth = [np.convolve(row, rim, mode="same") for row in inside]
    kernel = np.array([np.convolve(column, rim, mode="same") for column in np.array(smooth).T]).T
    return kernel / kernel.sum()


def zoom_blur(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Average the image with itself enlarged by 1.00, 1.01, ... times."""
    # By numpy.arange, as the paper's files were made: rounding lets 1.06 and 1.11 in where they end, not the others.
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level - 1], 0.01)
    return (x + sum(zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def zoomed(x: Images, factor: float) -> Images:
    """Return the middle of images enlarged ``factor`` times by linear interpolation, of their own size."""
    rows, columns = (_zoom_matrix(side, factor) for side in x.shape[1:3])
    return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)


def _zoom_matrix(side: int, factor: float) -> np.ndarray:
    """Return the linear map of one axis: cut out the middle, stretch it so that its ends stay, cut off what is over."""
    middle = math.ceil(side / factor)
    out = round(middle * factor)
    start, over = (side - middle) // 2, (out - side) // 2
    place = (np.arange(side) + over) * (middle - 1) / (out - 1)
    below = np.minimum(place.astype(np.int64), middle - 2)
    matrix = np.zeros((side, side))
    matrix[np.arange(side), start + below] = 1 - (place - below)
    matrix[np.arange(side), start + below + 1] += place - below
    return matrix


# -------------------------------------------------------------------------------------------------------------- digital


def contrast(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Shrink each channel towards the image's own mean of it."""
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level - 1] + mean


def brightness(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Add to the value of hue, saturation and value: all channels grow in proportion."""
    value = x.max(-1, keepdims=True)
    brighter = np.clip(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level - 1], 0, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def saturate(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Change the saturation s of hue, saturation and value to a * s + b; grey, which has no hue, counts as red."""
    a, b = ((0.3, 0.0), (0.1, 0.0), (1.5, 0.0), (2.0, 0.1), (2.5, 0.2))[level - 1]
    value = x.max(-1, keepdims=True)
    chroma = value - x.min(-1, keepdims=True)
    old = chroma / np.where(value > 0, value, 1)
    new = np.clip(a * old + b, 0, 1)
    # What a channel lacks to the largest one is in proportion to the saturation; pure red lacks all of green and blue.
    lack = np.where(chroma > 0, (value - x) / np.where(chroma > 0, chroma, 1), np.array([0.0, 1.0, 1.0]))
    return value * (1 - lack * new)


def pixelate(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Reduce the image by averaging over boxes, and enlarge it again."""
    from PIL import Image

    share, (height, width) = (0.95, 0.9, 0.85, 0.75, 0.65)[level - 1], x.shape[1:3]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return _each(x, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(x: Images, level: int, rng: np.random.Generator) -> Images:
    """Save as JPEG and read again."""
    from PIL import Image

    quality = (80, 65, 58, 50, 40)[level - 1]

    def through(image: "Image.Image") -> "Image.Image":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _each(x, through)


def _each(x: Images, change: Callable) -> Images:
    """Change images one by one through PIL; its 8 bits are what such a file has anyway."""
    from PIL import Image

    return np.stack([np.asarray(change(Image.fromarray(image))) for image in to_uint8(x)]) / 255


# --------------------------------------------------------------------------------------------------------------- all


CORRUPTIONS: dict[str, Corruption] = {
    made.__name__: made
    for made in (
        gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, zoom_blur, contrast,
        brightness, saturate, pixelate, jpeg_compression,
    )
}  # fmt: skip


def to_uint8(x: Images) -> np.ndarray:
    """Return pixels, uint8, of values in 0..1; what lies outside is cut off, the fraction too, as CIFAR-10-C does."""
    # A millionth of a value of tolerance keeps what was whole before the division by 255 whole.
    return (np.clip(x, 0, 1) * 255 + 2**-20).astype(np.uint8)


def corrupt(images: pixels.Images, name: str, level: int, seed: int = 0) -> np.ndarray:
    """Return corrupted images, uint8 (N, H, W, 3).

    The same images, corruption, level and seed give the same noise; among other images an image's noise may be another.

    Args:
        images: uint8 (N, H, W, 3).
        name: one of `CORRUPTIONS`.
        level: 1 (weak) to 5 (strong).
        seed: of the noise.

    Raises:
        UserError: an unknown name or level, or images without three channels.
    """
    return np.concatenate(list(corrupted(images, name, level, seed)))


def corrupted(images: pixels.Images, name: str, level: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield what `corrupt` returns, `CHUNK` images at a time, so that their floats stay small.

    Raises:
        UserError: as `corrupt`.
    """
    if name not in CORRUPTIONS:
        raise UserError(f'"{name}" is no corruption{nearest(name, CORRUPTIONS)}; known: {", ".join(CORRUPTIONS)}')
    if level not in LEVELS:
        raise UserError(f"{level} is no level of a corruption; levels are 1 to 5")
    if images.shape[-1] != 3:
        raise UserError(f"corruptions are of images with three channels, not {images.shape[-1]}")
    number = list(CORRUPTIONS).index(name)
    for start in range(0, len(images), CHUNK):
        rng = np.random.default_rng([seed, number, level, start])
        part = np.asarray(images[start : start + CHUNK])
        yield to_uint8(CORRUPTIONS[name](part / 255, level, rng))
