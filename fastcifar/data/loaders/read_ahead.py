"""What the kernel is told of the reading to come, so that a set on a disk is read in long runs, and before its time.

In block order each block is asked for a window before its samples are: the disk reads it in one piece while the batches
of the window before are in use. Where the set is larger than the memory, the blocks of a window that is done are let
go of: the kernel would rather keep pages that have been used than those that were asked for and are still unused. In
random order a set that fits into memory is read from front to back before the first epoch; of one that does not fit,
each access reads no more than what it is after (``MADV_RANDOM``).
"""

from collections.abc import Callable

import numpy as np

from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.pixels import Images, advise, forget, let_go, will_need

STEP_ROWS = 1024
BeforeBatch = Callable[[int], None]
"""Called with the number of a batch, counted from 0, before it is read."""


class ReadAhead:
    """Gives the kernel advice on the files that a split's images lie in.

    Args:
        images: memory-mapped; where they are not, nothing happens.
        order: of the epochs.
        larger: the set is larger than the memory that this process may use.

    Attributes:
        lets_go: what was read is not kept for the next epoch: a process that maps the images takes its pages out after
            each batch.
    """

    def __init__(self, images: Images, order: EpochOrder, larger: bool):
        self._images, self._order, self._larger, self._mapped = images, order, larger, images
        self.lets_go = larger and order.blocks is not None
        self._read = larger or 2 * len(order.rows) < len(images)  # not worth it for a few of the images
        self.tell(images)

    def tell(self, images: Images) -> None:
        """Say of a memory map of the same images that what is read beside an image is of no use.

        In block order too: a page that the kernel has given up again would be read with what is around it (often 128
        KiB, sometimes 8 MiB), which takes the place of blocks that were asked for.
        """
        self._mapped = images
        if self._larger or self._order.blocks is not None:
            advise(images, "RANDOM")

    def epoch(self, epoch: int) -> BeforeBatch:
        """Return what is to be called before each batch of an epoch."""
        order = self._order
        if order.blocks is not None and len(order.rows):
            return self._block_by_block(epoch)
        if not self._read and order.blocks is None:
            self._read = True
            for first in range(0, len(self._images), STEP_ROWS):  # in steps, so that Ctrl-C is heard
                will_need(self._images, first, min(first + STEP_ROWS, len(self._images)))
        return lambda batch: None

    def _block_by_block(self, epoch: int) -> BeforeBatch:
        """Ask for the blocks of an epoch in turn, so that a batch finds those of its window and half of the next's."""
        order = self._order
        assert order.blocks is not None
        samples, window = order.blocks.samples, order.blocks.window
        sequence = order.blocks.sequence(len(order.rows), order.seed, epoch)
        asked = done = 0
        if self.lets_go:  # what checks of the files, and the epoch before, have left
            self._let_go()
            forget(self._images, 0, len(self._images))

        def before(batch: int) -> None:
            nonlocal asked, done
            block = batch * order.batch_size // samples
            until = min(len(sequence), block + window + window // 2)
            self._tell_of(sequence[asked:until], will_need)
            asked = max(asked, until)
            # A little later than the window ends: batches are asked for before others have been read.
            over = max(block - window // 4, 0) // window * window
            if self.lets_go and over > done:
                self._let_go()
                self._tell_of(sequence[done:over], forget)
                done = over

        return before

    def _let_go(self) -> None:
        for images in (self._images, self._mapped):
            let_go(images)

    def _tell_of(self, blocks: np.ndarray, advice: Callable[[Images, int, int], None]) -> None:
        """Give the kernel advice on blocks, int64 (n,)."""
        assert self._order.blocks is not None
        samples, rows = self._order.blocks.samples, self._order.rows
        for block in blocks.tolist():
            mine = rows[block * samples : (block + 1) * samples]
            advice(self._images, int(mine[0]), int(mine[-1]) + 1)
