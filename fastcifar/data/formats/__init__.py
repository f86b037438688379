"""The formats of a store, one module each: how a split is written and read back."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fastcifar.data.formats import dali, ffcv, raw
from fastcifar.data.formats.raw import Split

__all__ = ["KEPT_IMAGES", "LABEL_READERS", "READERS", "WRITERS", "Split"]

WRITERS: dict[str, Callable[..., None]] = {"raw": raw.write, "ffcv": ffcv.write, "dali": dali.write}
READERS: dict[str, Callable[[Path, str, int, tuple[int, int, int]], Split]] = {
    "raw": raw.read,
    "ffcv": ffcv.read,
    "dali": dali.read,
}
LABEL_READERS: dict[str, Callable[[Path, str, int, tuple[int, int, int]], np.ndarray]] = {
    "raw": raw.read_labels,
    "ffcv": ffcv.read_labels,
    "dali": dali.read_labels,
}
KEPT_IMAGES: dict[str, Callable[[Path, str, tuple[int, ...], Mapping[str, int]], list[np.ndarray]]] = {
    "raw": raw.kept_images,
    "ffcv": ffcv.kept_images,
    "dali": dali.kept_images,
}
"""The images that a killed conversion has written already."""
