"""Image files from anywhere: decoded to 8-bit RGB, within limits, by decoders that start no other program."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastcifar.errors import UserError, plain
from fastcifar.regular_file import open_regular

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")
"""What is decoded, whatever a file is called. PIL knows many more; EPS, for one, would start Ghostscript."""
MAX_PIXELS = 64_000_000


def read_rgb(path: Path, upright: bool = False) -> "Image.Image":
    """Return an image file as a PIL image in mode RGB; 16-bit grey values are scaled to 8 bits.

    Args:
        path: the file; its content decides its format, not its name.
        upright: turn it as its EXIF data says.

    Raises:
        UserError: missing, not a regular file, not an image of a format in `FORMATS`, damaged, or too large.
    """
    from PIL import Image, ImageOps

    with open_regular(path) as content:
        try:
            with Image.open(content, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise UserError(f"{path}: {file.width}x{file.height} pixels; at most {MAX_PIXELS:,} are read")
                picture = ImageOps.exif_transpose(file) if upright else file
                return _to_rgb(picture)
        except UserError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise UserError(f"{path}: more pixels than the {MAX_PIXELS:,} that are read") from None
        except Exception as error:  # a decoder on damaged bytes may raise anything
            known = ", ".join(FORMATS)
            reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({plain(str(error), 200)})"
            raise UserError(f"{path}: cannot be read as an image{reason}; known formats: {known}") from None


def _to_rgb(picture: "Image.Image") -> "Image.Image":
    """Convert to RGB. PIL would clip 16-bit values to 255, which makes nearly all of them white."""
    from PIL import Image

    if picture.mode.startswith("I"):
        deep = np.clip(np.asarray(picture).astype(np.int64), 0, 65_535)
        picture = Image.fromarray(((deep * 255 + 32_767) // 65_535).astype(np.uint8))
    return picture.convert("RGB")
