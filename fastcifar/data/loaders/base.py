"""What all loaders share: the contract, the order of an epoch, and the choice of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.batch import Batch
from fastcifar.philox import epoch_order


@runtime_checkable
class Loader(Protocol):
    """Moves bytes and nothing else: every backend yields the same batches in the same order.

    Attributes:
        name: the backend: ``resident``, ``ffcv``, ``dali`` or ``torchvision``.
        samples: how many samples an epoch of this rank has (with ``drop_last``, those it really yields).
        reason: one line that says why this backend.
        augmented: True when the images come augmented (``augment.where = "loader"``) and are only to be normalized.
    """

    name: str
    samples: int
    reason: str
    augmented: bool

    def __len__(self) -> int:
        """Return the number of batches in an epoch of this rank."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch (0, 1, ...). The iterator may be abandoned at any moment."""
        ...

    def close(self) -> None:
        """Let go of workers, memory and files. A closed loader yields nothing more."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which samples an epoch visits, in which order, in what portions; the same for every backend.

    Attributes:
        rows: int64 (N,), the rows of the training set that take part.
        seed: 0..2**64-1.
        batch_size: samples per batch of a rank.
        drop_last: leave out what does not fill a batch on every rank.
        rank: 0..world-1.
        world: how many ranks share an epoch.
    """

    rows: np.ndarray
    seed: int
    batch_size: int
    drop_last: bool
    rank: int = 0
    world: int = 1

    @property
    def samples(self) -> int:
        """How many samples an epoch of this rank has."""
        if self.drop_last:
            return len(self.rows) // self.world // self.batch_size * self.batch_size
        return len(range(self.rank, len(self.rows), self.world))

    @property
    def batches(self) -> int:
        """How many batches an epoch of this rank has; with ``drop_last`` the same on every rank."""
        return -(-self.samples // self.batch_size)

    def positions(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions within ``rows`` that this rank visits, in order: int64 (samples,)."""
        return epoch_order(len(self.rows), self.seed, epoch, device)[self.rank :: self.world][: self.samples]

    def order(self, epoch: int) -> np.ndarray:
        """Return the rows of the training set that this rank visits, in order: int64 (samples,)."""
        return self.rows[self.positions(epoch).numpy()]
