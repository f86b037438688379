"""The formats of a store, one module each: how a split is written and read back."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastcifar.data.formats import dali, ffcv, raw
from fastcifar.data.formats.raw import Split

__all__ = ["LABEL_READERS", "READERS", "WRITERS", "Split"]

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
