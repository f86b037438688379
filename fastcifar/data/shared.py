"""Images that all runs of a process read from one place: runs side by side have one resident set."""

from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.pixels import choose, on_device
from fastcifar.data.store import Store

_held: WeakValueDictionary[tuple[str, str, bytes, str], Tensor] = WeakValueDictionary()


def resident_images(store: Store, split: str, rows: np.ndarray, device: torch.device) -> Tensor:
    """Return these rows of a split on a device, uint8 (n, H, W, C), to be read only.

    As long as somebody in this process holds them, whoever asks for the same ones gets the same tensor.

    Args:
        store: the data.
        split: ``train`` or ``test``.
        rows: int64 (n,), ascending.
        device: where the images go.

    Raises:
        UserError: the files of the split are damaged. They are hashed here, where they are read.
    """
    key = (str(store.root.resolve()), split, rows.tobytes(), str(device))
    images = _held.get(key)
    if images is None:
        store.check_split(split)
        images = _held[key] = on_device(choose(store.split(split).images, rows), device)
    return images
