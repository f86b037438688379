"""What every loader yields."""

from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """Which part of the global batch a rank has, in samples: ``first`` to ``first + len(batch.rows)`` of ``total``."""

    first: int
    total: int


class Batch(NamedTuple):
    """One batch on the training device, not copied before something needs it.

    A resident loader hands over the whole set with the rows of this batch, so that the augmentation kernel
    gathers while it crops; the other loaders hand over the batch itself with ``rows = arange(B)``.

    Attributes:
        images: uint8 (M, H, W, C), in 0..255.
        rows: int64 (B,): which rows of ``images`` make up the batch.
        labels: int64 (B,).
        indices: int64 (B,): each sample's index in the training set, the key of its random numbers.
        share: where in the global batch these samples are, when several ranks divide it; None: they are all of it.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor
    indices: Tensor
    share: Share | None = None

    @property
    def total(self) -> int:
        """How many samples the global batch has: those of all ranks."""
        return len(self.rows) if self.share is None else self.share.total

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return images, rows, labels and indices."""
        return self[:4]

    @property
    def resident(self) -> bool:
        """Whether the images are a whole set, to be read in place."""
        return len(self.images) != len(self.rows)

    def first(self, count: int, share: Share | None = None) -> "Batch":
        """Return the first ``count`` samples as a batch."""
        images = self.images if self.resident else self.images[:count]
        return Batch(images, self.rows[:count], self.labels[:count], self.indices[:count], share)

    def gathered(self) -> Tensor:
        """Return the batch's images alone: uint8 (B, H, W, C), a copy."""
        if self.images.device.type == "cpu":
            # On one thread: copying is limited by memory, and on a busy machine several threads wait for each other at
            # the end of every batch, which costs more than they bring.
            return torch.from_numpy(self.images.numpy().take(self.rows.numpy(), axis=0))
        return self.images.index_select(0, self.rows)  # copies whole rows; indexing would go element by element
