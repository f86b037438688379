"""What all loaders share: the contract, the order of an epoch, and the choice of rows."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numba as nb
import numpy as np
import torch
from torch import Tensor

from fastcifar.data.batch import Batch, Share
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, epoch_order, philox_scalar, split_seed


@runtime_checkable
class Loader(Protocol):
    """Moves bytes and nothing else: every backend yields the same batches in the same order.

    Several ranks divide each batch: rank by rank, their parts are the batch that one device would have.

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
        """Return the number of batches in an epoch, the same on every rank."""
        ...

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch of an epoch, counted from 0; None where it has all of it."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch (0, 1, ...). The iterator may be abandoned at any moment."""
        ...

    def close(self) -> None:
        """Let go of workers, memory and files. A closed loader yields nothing more."""
        ...


@nb.njit(cache=True)
def _keys(seed_low: Any, seed_high: Any, count: int, epoch: int, stream: int, draw: int) -> Any:
    keys = np.empty(count, np.int64)
    for index in range(count):
        word = philox_scalar(seed_low, seed_high, index, epoch, draw, stream)[0]
        keys[index] = np.int64((word >> np.uint64(1) << np.uint64(32)) | np.uint64(index))
    return keys


def _cpu_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return what `epoch_order` does, in one pass: its 150 small parallel operations crawl on a busy machine."""
    low, high = split_seed(seed)
    keys = _keys(np.uint64(low), np.uint64(high), count, epoch, int(Stream.ORDER), 0)
    return torch.from_numpy(np.argsort(keys))


BLOCK_BYTES = 1 << 20
WINDOW_BYTES = 128 << 20
BLOCK_DRAW = 2
"""The draw of `Stream.ORDER` that shuffles blocks; 0 shuffles samples, 1 is DALI's seed."""


@dataclass(frozen=True)
class Blocks:
    """How a quasi-random order is made, for sets that are read from a disk.

    Attributes:
        samples: consecutive samples of a block; the last block may have fewer.
        window: blocks whose samples are shuffled together.
    """

    samples: int
    window: int

    @classmethod
    def of(cls, image_shape: tuple[int, ...]) -> "Blocks":
        """Return those for images of a shape (H, W, C): the same for every format, backend and machine."""
        samples = max(1, BLOCK_BYTES // int(np.prod(image_shape)))
        return cls(samples, WINDOW_BYTES // BLOCK_BYTES)

    def sequence(self, count: int, seed: int, epoch: int) -> np.ndarray:
        """Return the numbers of the blocks of ``count`` samples in an epoch's order: int64 (blocks,)."""
        low, high = split_seed(seed)
        blocks = -(-count // self.samples)
        keys = _keys(np.uint64(low), np.uint64(high), blocks, epoch, int(Stream.ORDER), BLOCK_DRAW)
        return np.argsort(keys)

    def order(self, count: int, seed: int, epoch: int) -> Tensor:
        """Return the positions of ``count`` samples in an epoch's order: int64 (count,)."""
        low, high = split_seed(seed)
        sequence = self.sequence(count, seed, epoch)
        window = np.empty(len(sequence), np.int64)
        window[sequence] = np.arange(len(sequence)) // self.window
        keys = _keys(np.uint64(low), np.uint64(high), count, epoch, int(Stream.ORDER), 0)
        return torch.from_numpy(np.lexsort((keys, np.repeat(window, self.samples)[:count])))


@dataclass(frozen=True)
class EpochOrder:
    """Which samples an epoch visits, in which order, in which batches; the same for every backend.

    The order and the (global) batches do not depend on the number of ranks: each rank takes a slice of every batch, and
    the slices side by side are the batch. Where it does not divide, the first ranks have one sample more.

    Attributes:
        rows: int64 (N,), the rows of the training set that take part.
        seed: 0..2**64-1.
        batch_size: samples of a global batch, all ranks together.
        drop_last: leave out what does not fill a global batch.
        rank: 0..world-1.
        world: how many ranks share a batch.
        blocks: of a quasi-random order; None for a random one.

    Raises:
        UserError: a batch has fewer samples than there are ranks.
    """

    rows: np.ndarray
    seed: int
    batch_size: int
    drop_last: bool
    rank: int = 0
    world: int = 1
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        if self.world > 1:
            _require_a_sample_each(self.batch_size, self._rest, self.world)

    @property
    def _whole(self) -> int:
        """How many batches are full."""
        return len(self.rows) // self.batch_size

    @property
    def _rest(self) -> int:
        """How many samples the last, smaller batch has; 0 where there is none."""
        return 0 if self.drop_last else len(self.rows) % self.batch_size

    @property
    def batches(self) -> int:
        """How many batches an epoch has, on every rank."""
        return self._whole + (self._rest > 0)

    @property
    def rank_batch(self) -> int:
        """How many samples of a full batch this rank has."""
        return share_of(self.batch_size, self.rank, self.world)[1]

    @property
    def samples(self) -> int:
        """How many samples an epoch of this rank has."""
        return self._whole * self.rank_batch + share_of(self._rest, self.rank, self.world)[1]

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch of an epoch, counted from 0; None where it has all of it."""
        if self.world == 1:
            return None
        total = self.batch_size if batch < self._whole else self._rest
        return Share(share_of(total, self.rank, self.world)[0], total)

    def positions(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions within ``rows`` that this rank visits, in order: int64 (samples,)."""
        count = len(self.rows)
        if self.blocks is not None:
            order = self.blocks.order(count, self.seed, epoch).to(device)
        elif torch.device(device).type == "cpu":
            order = _cpu_order(count, self.seed, epoch)
        else:
            order = epoch_order(count, self.seed, epoch, device)
        return order[: self.samples] if self.world == 1 else self._own(order)

    def _own(self, order: Tensor) -> Tensor:
        """Return this rank's slice of every batch of an order (N,), one after the other."""
        size, end = self.batch_size, self._whole * self.batch_size
        first, count = share_of(size, self.rank, self.world)
        whole = order[:end].view(-1, size)[:, first : first + count].reshape(-1)
        first, count = share_of(self._rest, self.rank, self.world)
        return torch.cat([whole, order[end + first : end + first + count]])

    def fixed_part(self) -> np.ndarray:
        """Return the rows that this rank visits, in an order of its own, under a backend that shuffles by itself.

        Each rank has a fixed part of the rows, as large as its epoch, so that all ranks have the same number of
        batches; with ``drop_last`` the last rank also has the rows that are left over, to choose among.
        """
        ends = np.cumsum([replace(self, rank=rank).samples for rank in range(self.world)])
        last = self.rank == self.world - 1
        return self.rows[ends[self.rank] - self.samples : len(self.rows) if last else ends[self.rank]]

    def rows_of(self, epoch: int) -> np.ndarray:
        """Return the rows of the training set that this rank visits, in order: int64 (samples,)."""
        return self.rows[self.positions(epoch).numpy()]


def share_of(total: int, rank: int, world: int) -> tuple[int, int]:
    """Return the first sample of a rank in a batch of ``total`` samples, and how many it has: as equal as can be."""
    size, more = divmod(total, world)
    return rank * size + min(rank, more), size + (rank < more)


def _require_a_sample_each(batch_size: int, rest: int, world: int) -> None:
    """Refuse batches that leave a rank without a sample: it could neither normalize nor step along."""
    if batch_size < world:
        raise UserError(f"train.batch_size = {batch_size:,} is fewer samples than the {world} ranks that divide it")
    if 0 < rest < world:
        raise UserError(
            f"an epoch's last batch has {rest} samples for {world} ranks: set train.drop_last = true, or another "
            "train.batch_size"
        )


def with_shares(batches: Generator[Batch, None, None], order: EpochOrder) -> Generator[Batch, None, None]:
    """Yield a rank's batches, each with its place in the global batch."""
    with closing(batches):
        for number, batch in enumerate(batches):
            yield batch._replace(share=order.share(number))
