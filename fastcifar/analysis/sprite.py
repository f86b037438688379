"""All pictures of a page as one image: a sheet of tiles, each picture once."""

import base64
import io
import math
from collections.abc import Iterable

import numpy as np

from fastcifar.data.pixels import Images

LARGEST_TILE_PX = 64
COLUMNS = 64
LARGEST_BYTES = 3_200_000
"""As base64 this is 4.3 MB, so that the page with its numbers stays under 5 MB."""
QUALITIES = (90, 80, 65, 50, 30, 10)


class Sprite:
    """A sheet that is filled tile by tile.

    Attributes:
        tile_px: the side of a tile; larger images are reduced to `LARGEST_TILE_PX`.
    """

    def __init__(self, image_px: int) -> None:
        self.tile_px = min(image_px, LARGEST_TILE_PX)
        self._tiles: dict[bytes, int] = {}

    def add(self, image: np.ndarray) -> int:
        """Return the number of an image's tile; an image that is there already keeps its own.

        Args:
            image: uint8 (H, W, C) with 1 or 3 channels.
        """
        return self._tiles.setdefault(self._tile(image).tobytes(), len(self._tiles))

    def add_rows(self, images: Images | None, rows: Iterable[int]) -> list[int | None]:
        """Return a tile number for each row of ``images``, uint8 (N, H, W, C); None for each where there are none."""
        return [None if images is None else self.add(images[row]) for row in rows]

    def _tile(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        pixels = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image
        if pixels.shape[:2] != (self.tile_px, self.tile_px):
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            pixels = np.asarray(picture.resize((self.tile_px, self.tile_px), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(pixels)

    def __len__(self) -> int:
        return len(self._tiles)

    def sheet(self) -> np.ndarray:
        """Return all tiles as one image, uint8 (rows * tile, 64 * tile, 3), in reading order."""
        side, rows = self.tile_px, max(1, math.ceil(len(self) / COLUMNS))
        grid = np.zeros((rows, COLUMNS, side, side, 3), np.uint8)
        for tile, number in self._tiles.items():
            grid[number // COLUMNS, number % COLUMNS] = np.frombuffer(tile, np.uint8).reshape(side, side, 3)
        return grid.transpose(0, 2, 1, 3, 4).reshape(rows * side, COLUMNS * side, 3)

    def address(self) -> str:
        """Return the sheet as a ``data:`` address, WebP as good as `LARGEST_BYTES` allows; empty without tiles."""
        if not self._tiles:
            return ""
        from PIL import Image

        picture = Image.fromarray(self.sheet())
        for quality in QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, format="WEBP", quality=quality, method=3)
            if buffer.tell() <= LARGEST_BYTES:
                break
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
