"""The resident loader: the whole uint8 set on the device, a batch being a list of rows. Default and reference."""

from collections.abc import Generator, Iterator

import torch

from fastcifar.data.batch import Batch, Share
from fastcifar.data.loaders.base import EpochOrder, with_shares
from fastcifar.data.shared import resident_images
from fastcifar.data.store import Store


class ResidentLoader:
    """Keeps all images that take part on the device and hands over rows; nothing is copied per batch."""

    name = "resident"
    augmented = False

    def __init__(self, store: Store, order: EpochOrder, device: torch.device, reason: str):
        self._epoch_order, self._device = order, device
        self.reason, self.samples = reason, order.samples
        self.images = resident_images(store, "train", order.rows, device)
        self.labels = torch.from_numpy(store.split("train").labels[order.rows]).to(device)
        self._rows = torch.from_numpy(order.rows).to(device)

    def __len__(self) -> int:
        return self._epoch_order.batches

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch of an epoch, counted from 0; None where it has all of it."""
        return self._epoch_order.share(batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; ``images`` is the same tensor in all of them."""
        return with_shares(self._batches(epoch), self._epoch_order)

    def _batches(self, epoch: int) -> Generator[Batch, None, None]:
        positions = self._epoch_order.positions(epoch, self._device)
        # Gathered once an epoch, so that a batch costs three views and no launch.
        labels, indices = self.labels[positions], self._rows[positions]
        for first in range(0, len(positions), self._epoch_order.rank_batch):
            if not len(self.images):  # closed since: the rows would be those of images that are gone
                return
            batch = slice(first, first + self._epoch_order.rank_batch)
            yield Batch(self.images, positions[batch], labels[batch], indices[batch])

    def close(self) -> None:
        """Let go of the images; an epoch that has begun yields nothing more either."""
        self._epoch_order = EpochOrder(self._epoch_order.rows[:0], 0, self._epoch_order.batch_size, False)
        # Copies: a view of nothing would hold the whole memory.
        self.images, self.labels = self.images[:0].clone(), self.labels[:0].clone()
