"""What the kernel is told of the reading to come, so that a set on a disk is read in long runs, and before its time.

In block order each block is asked for a window before its samples are: the disk reads it in one piece while the batches
of the window before are in use. In random order a set that fits into memory is read from front to back before the first
epoch; of one that does not fit, each access reads no more than what it is after (``MADV_RANDOM``).
"""

from collections.abc import Callable

from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.pixels import Images, advise, will_need

STEP_ROWS = 1024
BeforeBatch = Callable[[int], None]
"""Called with the number of a batch, counted from 0, before it is read."""


class ReadAhead:
    """Gives the kernel advice on the files that a split's images lie in.

    Args:
        images: memory-mapped; where they are not, nothing happens.
        order: of the epochs.
        larger: the set is larger than the memory that this process may use.
    """

    def __init__(self, images: Images, order: EpochOrder, larger: bool):
        self._images, self._order, self._larger = images, order, larger
        self._read = larger or 2 * len(order.rows) < len(images)  # not worth it for a few of the images
        self.tell(images)

    def tell(self, images: Images) -> None:
        """Say of a memory map of the same images whether it will be read in random order."""
        if self._larger and self._order.blocks is None:
            advise(images, "RANDOM")

    def epoch(self, epoch: int) -> BeforeBatch:
        """Return what is to be called before each batch of an epoch."""
        order = self._order
        if order.blocks is not None and len(order.rows):
            return _block_by_block(self._images, order, epoch)
        if not self._read and order.blocks is None:
            self._read = True
            for first in range(0, len(self._images), STEP_ROWS):  # in steps, so that Ctrl-C is heard
                will_need(self._images, first, min(first + STEP_ROWS, len(self._images)))
        return lambda batch: None


def _block_by_block(images: Images, order: EpochOrder, epoch: int) -> BeforeBatch:
    """Ask for the blocks of an epoch in turn, so that a batch finds those of its window and half of the next's."""
    assert order.blocks is not None
    samples, window, rows = order.blocks.samples, order.blocks.window, order.rows
    sequence = order.blocks.sequence(len(rows), order.seed, epoch)
    asked = 0

    def before(batch: int) -> None:
        nonlocal asked
        until = min(len(sequence), batch * order.batch_size // samples + window + window // 2)
        for block in sequence[asked:until].tolist():
            mine = rows[block * samples : (block + 1) * samples]
            will_need(images, int(mine[0]), int(mine[-1]) + 1)
        asked = max(asked, until)

    return before
