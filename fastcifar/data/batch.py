"""What every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One batch on the training device, not copied before something needs it.

    A resident loader hands over the whole set with the rows of this batch, so that the augmentation kernel
    gathers while it crops; the other loaders hand over the batch itself with ``rows = arange(B)``.

    Attributes:
        images: uint8 (M, H, W, C), in 0..255.
        rows: int64 (B,): which rows of ``images`` make up the batch.
        labels: int64 (B,).
        indices: int64 (B,): each sample's index in the training set, the key of its random numbers.
    """

    images: Tensor
    rows: Tensor
    labels: Tensor
    indices: Tensor

    def gathered(self) -> Tensor:
        """Return the batch's images alone: uint8 (B, H, W, C), a copy."""
        return self.images.index_select(0, self.rows)  # copies whole rows; indexing would go element by element
