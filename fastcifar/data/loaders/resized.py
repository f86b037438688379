"""Progressive resizing: the resident set at several sizes, small images first.

Each size is made once, on the CPU, by Pillow's bilinear filter, which averages over the area of a pixel
("antialiasing"): every device trains on the same bytes. A phase begins with an epoch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastcifar.data.batch import Batch, Share
from fastcifar.data.loaders.base import Loader

WHOLE = ((0.0, 0),)
"""The phases of a run without resizing: one, of no size in particular."""


def phase_of(epoch: int, epochs: int, phases: Sequence[tuple[float, int]]) -> int:
    """Return which phase an epoch belongs to: the last one whose share of the run has passed when it begins."""
    return max(number for number, (start, _) in enumerate(phases) if start * epochs <= epoch)


def resize(images: Tensor, side_px: int) -> Tensor:
    """Return images, uint8 (N, H, W, 3), as uint8 (N, side, side, 3); bilinear with antialiasing, on the CPU."""
    side, filters = (side_px, side_px), Image.Resampling.BILINEAR
    # Not torch's interpolation: its vector code rounds its weights, and noise differs from Pillow by two levels.
    small = [np.asarray(Image.fromarray(image).resize(side, filters)) for image in images.cpu().numpy()]
    return torch.from_numpy(np.stack(small)) if small else images.new_zeros((0, *side, 3), device="cpu")


class ResizedLoader:
    """A resident loader whose images are of the size that the epoch's phase asks for.

    Args:
        loader: the resident loader; it stays open as long as this one.
        images: uint8 (N, H, W, 3), all of its images, where it reads them.
        phases: shares of the run at which a phase begins, the first 0, and the images' sides in pixels.
        epochs: length of the run.
    """

    augmented = False

    def __init__(self, loader: Loader, images: Tensor, phases: Sequence[tuple[float, int]], epochs: int):
        self.name, self._loader, self._phases, self._epochs = loader.name, loader, phases, epochs
        self.samples = loader.samples
        self.reason = f"{loader.reason}; " + ", ".join(f"{px} px from {start:.0%}" for start, px in phases)
        own = images.shape[1]
        sizes = {px for _, px in phases}
        self._sets = {px: images if px == own else resize(images, px).to(images.device) for px in sizes}

    def __len__(self) -> int:
        return len(self._loader)

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch; see `fastcifar.data.loaders.base.Loader`."""
        return self._loader.share(batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; ``images`` are those of its phase's size."""
        images = self._sets[self._phases[phase_of(epoch, self._epochs, self._phases)][1]]
        for batch in self._loader.epoch(epoch):
            yield batch._replace(images=images)

    def close(self) -> None:
        """Let go of the images of all sizes."""
        self._loader.close()
        self._sets = {px: images[:0].clone() for px, images in self._sets.items()}


def first_epochs(epochs: range, total: int, phases: Sequence[tuple[float, int]]) -> list[int]:
    """Return the first of these epochs, and the first one of each later phase: one for each size that they have."""
    seen: dict[int, int] = {}
    for epoch in epochs:
        seen.setdefault(phases[phase_of(epoch, total, phases)][1], epoch)
    return list(seen.values())
