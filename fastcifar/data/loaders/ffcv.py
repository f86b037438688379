"""The ffcv loader: batches out of a ``.beton`` through ffcv's compiled reader threads, in our order.

What ffcv's own ``EpochIterator`` does beyond reading is done differently here: it reuses its buffers while a consumer
may still look at them, hangs or crashes the interpreter when abandoned, loses a reader's exception, and sets torch's
threads. The reading itself (memory map, address table, parallel copy) is ffcv's.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcifar.data.formats import ffcv as layout
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.loaders.read_ahead import BeforeBatch
from fastcifar.data.loaders.streaming import AHEAD_BATCHES, HostBatch, StreamingLoader, ahead
from fastcifar.data.store import Store


@contextmanager
def kept_threads() -> Iterator[None]:
    """Put torch's and numba's thread settings back: importing ffcv and making its loader change both."""
    import numba

    # Before numba starts its threads: this prefers OpenMP's. TBB's have kept a process from ending after an exception.
    import fastcifar.kernels.augment.cpu  # noqa: F401

    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


class _Buffers:
    """Memory for batches, used again once nobody refers to it: fresh pages would cost a tenth of the speed."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        # What the count is for an array that only a list holds depends on the version of Python.
        self._idle = _references([np.empty(0)])[0]

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return uint8 memory that no living tensor or array shares."""
        for k, count in enumerate(_references(self._arrays)):
            # A tensor's storage, which all its views share, holds the array for as long as one of them lives.
            if count == self._idle and self._arrays[k].shape == shape:
                return torch.from_numpy(self._arrays[k])
        array = np.empty(shape, np.uint8)
        if len(self._arrays) < AHEAD_BATCHES + 4:
            self._arrays.append(array)
        return torch.from_numpy(array)


class Reader:
    """ffcv's compiled reading of one ``.beton``; making it takes some seconds, most of them numba's."""

    def __init__(self, path: Path, workers: int):
        with kept_threads(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ffcv imports distutils and builds deprecated syntax trees
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
            from ffcv.loader import Loader, OrderOption

            self._loader = Loader(
                str(path),
                batch_size=1,
                num_workers=workers,
                order=OrderOption.SEQUENTIAL,
                os_cache=True,
                drop_last=False,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": None, "index": None},
            )
        node = self._loader.graph.nodes[0].id
        self._memory, self._shared = f"memory_{node}", f"shared_memory_{node}"
        (self._stage, _), *_ = self._loader.code[0]
        self.workers = workers
        metadata = self._loader.reader.metadata
        # Labels and indices lie in the table that ffcv has read already: a gather, without a compiled pipeline each.
        self.labels, self.indices = (np.ascontiguousarray(metadata[f"f{k}"], np.int64) for k in (1, 2))
        self.image_shape = (int(metadata["f0"]["height"][0]), int(metadata["f0"]["width"][0]), 3)
        with kept_threads(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numba's advice on ffcv's code
            self._compile()

    def batches(
        self, order: np.ndarray, batch_size: int, pinned: bool, before: BeforeBatch = lambda batch: None
    ) -> Iterator[HostBatch]:
        """Read the samples of ``order`` (int64 (N,)) batch by batch, each into memory of its own."""
        import numba

        numba.set_num_threads(self.workers)  # of the thread that runs this iterator only
        labels, indices = torch.from_numpy(self.labels[order]), torch.from_numpy(self.indices[order])
        context, buffers = self._loader.memory_manager.schedule_epoch([order]), _Buffers()
        with context:
            for number, first in enumerate(range(0, len(order), batch_size)):
                before(number)
                batch = slice(first, first + batch_size)
                shape = (len(order[batch]), *self.image_shape)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pinned else buffers.take(shape)
                self._read(order[batch], images.numpy(), context.state)
                yield HostBatch(images, labels[batch], indices[batch])

    @property
    def mapped(self) -> np.ndarray:
        """The memory map of the file that ffcv's readers copy from."""
        context = self._loader.memory_manager.schedule_epoch([np.zeros(1, np.int64)])
        with context:
            whole: np.ndarray = context.state[0]
            return whole

    def _compile(self) -> None:
        """Read one sample, for which numba compiles: here and not on the reading thread, whose warnings would show."""
        for _ in self.batches(np.zeros(1, np.int64), 1, pinned=False):
            pass

    def _read(self, rows: np.ndarray, into: np.ndarray, state: Any) -> None:
        memory = {self._memory: into, self._shared: None}
        self._stage(batch_indices=rows, metadata=self._loader.reader.metadata, storage_state=state, **memory)


@cache
def compiled_reader(path: Path, mtime_ns: int, workers: int) -> Reader:
    """Return the reader of a file, compiled once in a process.

    It is never let go of: a reader costs little beside the pages that it maps, and numba prints a KeyError when
    compiled functions that refer to each other are collected as garbage.
    """
    return Reader(path, workers)


class FfcvLoader(StreamingLoader):
    """Reads a ``.beton`` ahead of the training on ffcv's threads."""

    name = "ffcv"

    def __init__(self, store: Store, order: EpochOrder, device: torch.device, reason: str, workers: int):
        super().__init__(order, device, reason, store.split("train").images)
        import numba

        path = store.root / layout.file_name("train")
        # numba refuses more threads than it has made, one per core.
        threads = min(workers, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self._reader = compiled_reader(path, os.stat(path).st_mtime_ns, threads)

    def _batches(self, epoch: int) -> Iterator[HostBatch]:
        pinned, order = self._device.type == "cuda", self._epoch_order
        self.read_ahead.tell(self._reader.mapped)
        before = self.read_ahead.epoch(epoch)
        return ahead(self._reader.batches(order.rows_of(epoch), order.rank_batch, pinned, before))
