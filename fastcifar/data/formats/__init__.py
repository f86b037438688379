"""The formats of a store, one module each: how a split is written and read back."""

from collections.abc import Callable
from pathlib import Path

from fastcifar.data.formats import dali, ffcv, raw
from fastcifar.data.formats.raw import Split

__all__ = ["READERS", "WRITERS", "Split"]

WRITERS: dict[str, Callable[..., None]] = {"raw": raw.write, "ffcv": ffcv.write, "dali": dali.write}
READERS: dict[str, Callable[[Path, str, int, tuple[int, int, int]], Split]] = {
    "raw": raw.read,
    "ffcv": ffcv.read,
    "dali": dali.read,
}
