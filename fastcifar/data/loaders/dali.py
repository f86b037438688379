"""The DALI loader: WebDataset shards through a DALI pipeline, in our order or in DALI's own.

In the run's own order (``plan``, ``random`` or ``block``) an external source reads each sample at its place in the
memory-mapped shards, and DALI prefetches and, with a GPU, copies to the device. With ``order = "native"`` DALI's
WebDataset reader reads and shuffles, each rank a fixed part of the set: every sample still comes once an epoch, and an
epoch's order still depends on (seed, epoch) alone, but it is another order: a shuffle through a buffer of
`SHUFFLE_SAMPLES` samples, uniform for sets up to that size, local beyond it (a larger buffer costs more than it reads:
0.3x the speed at 50,000).

A pipeline lives for one epoch, so that an abandoned epoch leaves no state behind.
"""

import importlib
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcifar.data.batch import Batch
from fastcifar.data.formats import dali as layout
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.loaders.streaming import HostBatch, StreamingLoader, as_batch
from fastcifar.data.store import Store
from fastcifar.kernels.philox import Stream, philox

SHUFFLE_SAMPLES = 4096
PREFETCH_BATCHES = 2
HELD_BATCHES = 4


class DaliLoader(StreamingLoader):
    """Runs one DALI pipeline per epoch."""

    name = "dali"

    def __init__(
        self, store: Store, epoch_order: EpochOrder, device: torch.device, reason: str, workers: int, order: str
    ):
        super().__init__(epoch_order, device, reason, store.split("train").images)
        # By row, in memory: labels are text in the shards, which DALI does not read as numbers.
        self._labels = torch.from_numpy(store.labels("train")).to(device)
        self._workers = workers
        self._native = NativeIndex(store, epoch_order) if order == "native" else None

    def _batches(self, epoch: int) -> Iterator[HostBatch]:
        pipeline = self._ordered_pipeline(epoch) if self._native is None else self._native_pipeline(epoch, self._native)
        left = self.samples if len(self._epoch_order.rows) else 0
        while left:
            images, indices = (torch.from_dlpack(o.as_tensor()) for o in pipeline.run())
            held = min(left, len(indices))
            left -= held
            rows = indices.view(-1)[:held]
            yield HostBatch(images[:held], self._labels[rows], rows)

    def _deliver(self, epoch: int) -> Generator[Batch, None, None]:
        """Batches come from DALI on the device already, through DLPack, without a copy."""
        for batch in self._batches(epoch) if self._device.type == "cpu" else self._held(epoch):
            yield as_batch(batch)

    def _held(self, epoch: int) -> Iterator[HostBatch]:
        """Keep each batch until the device has done with it.

        Torch knows nothing of the streams that use DALI's memory, so a batch is let go of only after the work that
        was queued while it was the current one. A few batches later that is hardly ever a wait.
        """
        held: deque[tuple[HostBatch, torch.cuda.Event]] = deque()
        for batch in self._batches(epoch):
            yield batch
            held.append((batch, torch.cuda.current_stream(self._device).record_event()))
            if len(held) > HELD_BATCHES:
                held.popleft()[1].synchronize()

    def _settings(self, seed: int) -> dict[str, Any]:
        return {
            "batch_size": self._epoch_order.rank_batch,
            "num_threads": self._workers,
            "device_id": (self._device.index or 0) if self._device.type == "cuda" else None,
            "prefetch_queue_depth": PREFETCH_BATCHES,
            "exec_dynamic": True,  # under which an output keeps its memory for as long as torch holds it
            "seed": seed,
        }

    def _delivered(self, *outputs: Any) -> tuple[Any, ...]:
        return tuple(o.gpu() for o in outputs) if self._device.type == "cuda" else outputs

    def _ordered_pipeline(self, epoch: int) -> Any:
        from nvidia.dali import fn, pipeline_def

        source = self._in_order(epoch)

        @pipeline_def(**self._settings(0))
        def pipeline() -> tuple[Any, ...]:
            read: Any = fn.external_source(source, num_outputs=2, batch=True, dtype=_kinds(), ndim=[3, 0])
            return self._delivered(*read)

        return pipeline()

    def _in_order(self, epoch: int) -> Callable[[], list[np.ndarray]]:
        """Return what DALI calls for each batch of an epoch: images uint8 (B, H, W, C) and indices int64 (B,)."""
        rows, size = self._epoch_order.rows_of(epoch), self._epoch_order.rank_batch
        before, numbers = self.read_ahead.epoch(epoch), iter(range(-(-len(rows) // size)))

        def read() -> list[np.ndarray]:
            number = next(numbers)
            before(number)
            batch = rows[number * size : (number + 1) * size]
            return [self.source[batch], batch]

        return read

    def _native_pipeline(self, epoch: int, index: "NativeIndex") -> Any:
        from nvidia.dali import fn, pipeline_def

        @pipeline_def(**self._settings(_epoch_seed(self._epoch_order.seed, epoch)))
        def pipeline() -> tuple[Any, ...]:
            read: Any = fn.readers.webdataset(
                paths=index.shards,
                index_paths=index.indexes,
                ext=["img", "idx"],
                dtypes=_kinds(),
                missing_component_behavior="error",
                random_shuffle=True,
                initial_fill=min(index.samples, SHUFFLE_SAMPLES),
                name="reader",
            )
            images, indices = read
            return self._delivered(fn.reshape(images, shape=list(index.image_shape)), indices)

        return pipeline()


def _kinds() -> list[Any]:
    """Return DALI's types of images and indices."""
    types: Any = importlib.import_module("nvidia.dali.types")
    return [types.UINT8, types.INT64]


def _epoch_seed(seed: int, epoch: int) -> int:
    """Return DALI's seed of an epoch: 0..2**31-1."""
    return int(philox(seed, torch.tensor([0]), epoch, 1, Stream.ORDER)[0]) >> 1


class NativeIndex:
    """The shards and index files that DALI's reader is given: those of the store, or ones of the chosen rows only."""

    def __init__(self, store: Store, epoch_order: EpochOrder):
        names = layout.shard_names("train", store.count("train"))
        self.image_shape = store.image_shape
        self.shards = [str(store.root / name) for name in names]
        self.indexes = [str(store.root / layout.index_name(name)) for name in names]
        rows = epoch_order.fixed_part()  # rather than DALI's own shards, whose sizes would not fit the batches
        self.samples = len(rows)
        if len(rows) < store.count("train"):
            folder = Path(tempfile.mkdtemp(prefix="fastcifar-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._write_chosen(rows, folder)

    def _write_chosen(self, rows: np.ndarray, folder: Path) -> None:
        image_bytes = int(np.prod(self.image_shape))
        chosen = [(k, rows[rows // layout.SHARD_SAMPLES == k]) for k in range(len(self.shards))]
        chosen = [(k, mine) for k, mine in chosen if len(mine)]
        self.shards = [self.shards[k] for k, _ in chosen]
        self.indexes = [str(folder / f"{k}.idx") for k, _ in chosen]
        for path, (_, mine) in zip(self.indexes, chosen, strict=True):
            Path(path).write_text(layout.index_text(mine, mine % layout.SHARD_SAMPLES, image_bytes))
