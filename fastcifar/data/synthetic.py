"""Ten synthetic classes: what smoke recipes and tests train on, made in a moment, without a download.

Every image is one shape in a random place, size and colour on a background of another colour with a gradient and
noise. The numbers come from `fastcifar.kernels.philox`, so the images are the same on every machine.
"""

from collections.abc import Callable

import numpy as np
import torch

from fastcifar.data.formats.raw import Split
from fastcifar.kernels.philox import Stream, philox

SEED = 20240601
SIZE_PX = 32
TEST_FIRST = 1_000_000  # test images are numbered from here, so that a larger training set shares none of them
NOISE = 0.12

Field = np.ndarray
"""float64 (N, 32, 32)"""


def _bars(position: Field, radius: Field) -> Field:
    return np.abs(np.mod(position / radius * 1.5, 1.0) - 0.5) < 0.25


SHAPES: dict[str, Callable[[Field, Field, Field], Field]] = {
    "disk": lambda x, y, r: x**2 + y**2 < r**2,
    "ring": lambda x, y, r: np.abs(np.sqrt(x**2 + y**2) - 0.8 * r) < 0.22 * r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) < 0.85 * r,
    "frame": lambda x, y, r: np.abs(np.maximum(abs(x), abs(y)) - 0.75 * r) < 0.2 * r,
    "triangle": lambda x, y, r: (y < 0.7 * r) & (y > 2 * abs(x) - r),
    "plus": lambda x, y, r: (np.minimum(abs(x), abs(y)) < 0.25 * r) & (np.maximum(abs(x), abs(y)) < r),
    "cross": lambda x, y, r: (abs(abs(x) - abs(y)) < 0.35 * r) & (np.maximum(abs(x), abs(y)) < 0.9 * r),
    "rows": lambda x, y, r: _bars(y, r) & (np.maximum(abs(x), abs(y)) < r),
    "columns": lambda x, y, r: _bars(x, r) & (np.maximum(abs(x), abs(y)) < r),
    "checks": lambda x, y, r: (_bars(x, r) ^ _bars(y, r)) & (np.maximum(abs(x), abs(y)) < r),
}


def draw(counts: dict[str, int]) -> tuple[dict[str, Split], list[str]]:
    """Draw ``train`` and ``test``.

    Args:
        counts: how many images of each; the classes take turns.

    Returns:
        The splits (images uint8 (N, 32, 32, 3)) and the names of the ten classes.
    """
    first = {"train": 0, "test": TEST_FIRST}
    return {name: _draw(first[name], count) for name, count in counts.items()}, list(SHAPES)


def _draw(first: int, count: int) -> Split:
    labels = np.arange(count, dtype=np.int64) % len(SHAPES)
    rows = np.arange(first, first + count)
    decision = _uniform(rows, 16)[:, :, None, None]
    radius = 6 + 5 * decision[:, 0]
    x = np.arange(SIZE_PX) - (radius + (SIZE_PX - 1 - 2 * radius) * decision[:, 1])
    y = np.arange(SIZE_PX)[:, None] - (radius + (SIZE_PX - 1 - 2 * radius) * decision[:, 2])
    x, y = np.broadcast_arrays(x, y)
    inside = np.empty((count, SIZE_PX, SIZE_PX), bool)
    for label, shape in enumerate(SHAPES.values()):
        mine = labels == label
        inside[mine] = shape(x[mine], y[mine], radius[mine])
    return Split(_paint(inside, decision, rows), labels)


def _paint(inside: np.ndarray, decision: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Colour the shapes: uint8 (N, 32, 32, 3)."""
    count = len(rows)
    ground = decision[:, 3:6].reshape(count, 1, 1, 3)
    # The ink differs from the ground by 0.3 to 0.6 of the range in every channel, to either side.
    offset = 0.3 + 0.3 * decision[:, 6:9].reshape(count, 1, 1, 3)
    side = np.where(ground > 0.5, -1.0, 1.0)
    slope = (decision[:, 9:11] - 0.5) * 0.3
    ramp = np.arange(SIZE_PX) / SIZE_PX - 0.5
    shade = slope[:, 0] * ramp[None, None, :] + slope[:, 1] * ramp[None, :, None]
    noise = _uniform(rows + 2 * TEST_FIRST, SIZE_PX * SIZE_PX).reshape(count, SIZE_PX, SIZE_PX) - 0.5
    image = ground + inside[..., None] * offset * side + (shade + 2 * NOISE * noise)[..., None]
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _uniform(rows: np.ndarray, draws: int) -> np.ndarray:
    """Return uniform numbers in [0, 1): float64 (N, draws), a function of row and draw number alone."""
    index, block = torch.as_tensor(rows)[:, None], torch.arange(-(-draws // 4))[None]
    words = torch.stack(philox(SEED, index, 0, block, Stream.SYNTHETIC), dim=-1)
    return (words.flatten(1)[:, :draws].double() / 2**32).numpy()
