"""The DALI loader: WebDataset shards through a DALI pipeline, in our order or in DALI's own.

In the run's own order (``plan``, ``random`` or ``block``) an external source reads each sample at its place in the
memory-mapped shards, and DALI prefetches and, with a GPU, copies to the device; such a pipeline is quickly made and
lives for one epoch, so that an abandoned epoch leaves no state behind. With ``order = "native"`` DALI's WebDataset
reader reads and shuffles, each rank a fixed part of the set: every sample still comes once an epoch, and an epoch's
order still depends on (seed, epoch) alone, but it is another order: a shuffle through a buffer of 4,096 samples,
uniform for sets up to that size, local beyond it (a larger buffer costs more than it reads: 0.3x the speed at 50,000).
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from fastcifar.data.batch import Batch
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.loaders.native import NativeReader, delivered, kinds
from fastcifar.data.loaders.streaming import HostBatch, StreamingLoader, as_batch
from fastcifar.data.store import Store

PREFETCH_BATCHES = 2
HELD_BATCHES = 4


class DaliLoader(StreamingLoader):
    """Runs DALI's pipelines: one per epoch, or one for all of them in DALI's own order."""

    name = "dali"

    def __init__(
        self, store: Store, epoch_order: EpochOrder, device: torch.device, reason: str, workers: int, order: str
    ):
        super().__init__(epoch_order, device, reason, store.split("train").images)
        # By row, in memory: labels are text in the shards, which DALI does not read as numbers.
        self._labels = torch.from_numpy(store.labels("train")).to(device)
        self._workers = workers
        native = order == "native" and len(epoch_order.rows)
        self._native = NativeReader(store, epoch_order, self._settings()) if native else None

    def _batches(self, epoch: int) -> Iterator[HostBatch]:
        left = self.samples if len(self._epoch_order.rows) else 0
        if not left:
            return
        for outputs in self._in_order(epoch) if self._native is None else self._native.epoch(epoch):
            images, indices = (torch.from_dlpack(o.as_tensor()) for o in outputs)
            held = min(left, len(indices))
            left -= held
            rows = indices.view(-1)[:held]
            if held:  # with drop_last, DALI's own order has batches of which nothing is left
                yield HostBatch(images[:held], self._labels[rows], rows)

    def close(self) -> None:
        """End the running epoch, and DALI's threads."""
        super().close()
        self._native = None

    def _deliver(self, epoch: int) -> Generator[Batch, None, None]:
        """Batches come from DALI on the device already, through DLPack, without a copy."""
        for batch in self._batches(epoch) if self._device.type == "cpu" else self._held(epoch):
            yield as_batch(batch)

    def _held(self, epoch: int) -> Iterator[HostBatch]:
        """Keep each batch until the device has done with it.

        Torch knows nothing of the streams that use DALI's memory, so a batch is let go of only after the work that
        was queued while it was the current one. A few batches later that is hardly ever a wait; at the end it is one
        for the last steps, since a pipeline that lives on may have use for the memory at once.
        """
        held: deque[tuple[HostBatch, torch.cuda.Event]] = deque()
        try:
            for batch in self._batches(epoch):
                try:
                    yield batch
                finally:  # where the epoch is left in the middle too
                    held.append((batch, torch.cuda.current_stream(self._device).record_event()))
                if len(held) > HELD_BATCHES:
                    held.popleft()[1].synchronize()
        finally:
            for _, event in held:
                event.synchronize()

    def _settings(self) -> dict[str, Any]:
        return {
            "batch_size": self._epoch_order.rank_batch,
            "num_threads": self._workers,
            "device_id": (self._device.index or 0) if self._device.type == "cuda" else None,
            "prefetch_queue_depth": PREFETCH_BATCHES,
            "exec_dynamic": True,  # under which an output keeps its memory for as long as torch holds it
        }

    def _in_order(self, epoch: int) -> Iterator[Any]:
        """Yield a pipeline's outputs for each batch of an epoch, in the run's own order."""
        from nvidia.dali import fn, pipeline_def

        source, settings = self._source(epoch), self._settings()

        @pipeline_def(**settings, seed=0)
        def pipeline() -> tuple[Any, ...]:
            read: Any = fn.external_source(source, num_outputs=2, batch=True, dtype=kinds(), ndim=[3, 0])
            return delivered(settings, *read)

        running = pipeline()
        for _ in range(len(self)):
            yield running.run()

    def _source(self, epoch: int) -> Callable[[], list[np.ndarray]]:
        """Return what DALI calls for each batch of an epoch: images uint8 (B, H, W, C) and indices int64 (B,)."""
        rows, size = self._epoch_order.rows_of(epoch), self._epoch_order.rank_batch
        before, numbers = self.read_ahead.epoch(epoch), iter(range(-(-len(rows) // size)))

        def read() -> list[np.ndarray]:
            number = next(numbers)
            before(number)
            batch = rows[number * size : (number + 1) * size]
            return [self.source[batch], batch]

        return read
