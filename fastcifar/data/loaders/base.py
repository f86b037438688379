"""What all loaders share: the contract, the order of an epoch, and the choice of rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numba as nb
import numpy as np
import torch
from torch import Tensor

from fastcifar.data.batch import Batch
from fastcifar.kernels.philox import Stream, epoch_order, philox_scalar, split_seed


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


@nb.njit(cache=True)
def _keys(seed_low: Any, seed_high: Any, count: int, epoch: int, stream: int) -> Any:
    keys = np.empty(count, np.int64)
    for index in range(count):
        word = philox_scalar(seed_low, seed_high, index, epoch, 0, stream)[0]
        keys[index] = np.int64((word >> np.uint64(1) << np.uint64(32)) | np.uint64(index))
    return keys


def _cpu_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return what `epoch_order` does, in one pass: its 150 small parallel operations crawl on a busy machine."""
    low, high = split_seed(seed)
    keys = _keys(np.uint64(low), np.uint64(high), count, epoch, int(Stream.ORDER))
    return torch.from_numpy(np.argsort(keys))


@dataclass(frozen=True)
class EpochOrder:
    """Which samples an epoch visits, in which order, in which batches; the same for every backend.

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
        count = len(self.rows)
        on_cpu = torch.device(device).type == "cpu"
        order = _cpu_order(count, self.seed, epoch) if on_cpu else epoch_order(count, self.seed, epoch, device)
        return order[self.rank :: self.world][: self.samples]

    def rows_of(self, epoch: int) -> np.ndarray:
        """Return the rows of the training set that this rank visits, in order: int64 (samples,)."""
        return self.rows[self.positions(epoch).numpy()]
