"""The torchvision loader: torch's DataLoader with worker processes, as the published ladder's code uses it."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastcifar.config.schema import AugmentConfig
from fastcifar.data.formats import Split
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.loaders.streaming import HostBatch, StreamingLoader
from fastcifar.data.pixels import let_go
from fastcifar.data.store import Store
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox
from fastcifar.launch import place

SEED_BLOCK = 1 << 20  # far from the draws that the device augmentation makes on the same stream


class _Images(Dataset[HostBatch | str]):
    """Gathers whole batches; with transforms, augments each image as a PIL image.

    What a user is to be told travels as a text: torch would raise it again as an error without its one message.
    """

    def __init__(self, split: Split, transforms: Sequence[Callable[..., Any]] | None):
        self._split, self._transforms, self.lets_go = split, transforms, False

    def __getitem__(self, item: tuple[np.ndarray, np.ndarray, np.ndarray, bool]) -> HostBatch | str:
        try:
            return self._gather(*item)
        except UserError as error:
            return str(error)

    def _gather(self, rows: np.ndarray, seeds: np.ndarray, sides: np.ndarray, odd: bool) -> HostBatch:
        images = self._split.images[rows]
        if self.lets_go:
            let_go(self._split.images)
        if self._transforms is not None:
            from fastcifar.data.loaders.pil import augment_one

            samples = zip(images, seeds.tolist(), sides.tolist(), strict=True)
            images = np.stack([augment_one(image, self._transforms, seed, side, odd) for image, seed, side in samples])
        labels = torch.from_numpy(self._split.labels[rows])
        return HostBatch(torch.from_numpy(np.ascontiguousarray(images)), labels, torch.from_numpy(rows))


def _quiet_worker(worker: int) -> None:
    """Leave Ctrl-C and the end of a terminal to the main process, which ends its workers.

    SIGTERM is torch's: its handler in a worker ends with status 0 where the main process has sent the signal. Death by
    the signal itself would be an error to the handler that torch has in the main process.

    Where several ranks train, torchrun signals the process group of each, which a worker therefore leaves: its rank
    needs it until all have agreed on the last step. It ends with its rank, however that ends.
    """
    if place().world > 1:
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.excepthook = _forgive_a_lost_reader


def _forgive_a_lost_reader(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say nothing where the main process has stopped while it was fetching a batch; print everything else.

    A worker hands out its batches' shared memory in a thread of multiprocessing's, which calls ``sys.excepthook``. An
    error in loading travels to the main process in another way.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


class TorchvisionLoader(StreamingLoader):
    """Runs one DataLoader per epoch; worker processes end with it."""

    name = "torchvision"

    def __init__(
        self,
        store: Store,
        order: EpochOrder,
        device: torch.device,
        reason: str,
        workers: int,
        augment: AugmentConfig | None = None,
    ):
        split = store.split("train")
        super().__init__(order, device, reason, split.images)
        transforms = None
        if augment is not None:
            from fastcifar.data.loaders.pil import pil_transforms

            transforms = pil_transforms(augment.ops, *store.image_shape[:2])
        self._images, self._workers = _Images(split, transforms), workers
        self.augmented = augment is not None

    def _batches(self, epoch: int) -> Iterator[HostBatch]:
        from fastcifar.data.loaders.pil import sides

        rows, size = self._epoch_order.rows_of(epoch), self._epoch_order.rank_batch
        seeds, fixed = self._seeds(rows, epoch), sides(self._epoch_order.seed, rows)
        parts = [slice(k, k + size) for k in range(0, len(rows), size)]
        before, self._images.lets_go = self.read_ahead.epoch(epoch), self.read_ahead.lets_go

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
            for number, part in enumerate(parts):
                before(number)
                yield rows[part], seeds[part], fixed[part], epoch % 2 == 1

        with warnings.catch_warnings():
            # More workers than cores is what the recipe asked for.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                self._images,
                batch_size=None,
                sampler=batches(),
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),  # else it would draw from, and so disturb, torch's own
                # Python 3.14's default would hand each worker all pixels by pickle, in every epoch.
                multiprocessing_context="fork" if self._workers and "fork" in get_all_start_methods() else None,
            )
            # Workers are forked while other threads of ours only wait, and run nothing but numpy and PIL.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
            loaded = iter(loader)
            _ExplainsLostWorkers.install()
        return _closing(loaded)

    def _seeds(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Return each sample's seed, int64 (N,) in 0..2**63-1."""
        words = philox(self._epoch_order.seed, torch.from_numpy(rows), epoch, SEED_BLOCK, Stream.AUGMENT)
        return ((words[0] >> 1 << 32) | words[1]).numpy()


@contextmanager
def _lost_worker_explained() -> Iterator[None]:
    """Say what to lower where a worker process is gone.

    torch tells that in a `RuntimeError`; or it fails to fetch the memory of a batch from the worker that has made it.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if isinstance(error.__cause__, UserError):  # told by the signal's handler, with the cause of death
            raise error.__cause__ from None
        told = str(error).strip().rstrip(".")
        torch_says_so = told.startswith("DataLoader worker (pid")
        if not torch_says_so and (isinstance(error, RuntimeError) or told.startswith("Caught ")):
            raise  # an error that a worker lived to tell
        raise UserError(
            "a worker process of the torchvision loader is gone, mostly for want of memory or shared memory "
            f"({told if torch_says_so else type(error).__name__}): lower data.loader.workers, or free memory"
        ) from None


class _ExplainsLostWorkers:
    """A handler of SIGCHLD around torch's, which raises in the main thread, wherever that is, when a worker dies."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]):
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        with _lost_worker_explained():
            self._handler(number, frame)

    @classmethod
    def install(cls) -> None:
        """Put it around the present handler, once; torch sets its own from the main thread only."""
        if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and not isinstance(handler, cls):
            signal.signal(signal.SIGCHLD, cls(handler))


def _closing(batches: Iterator[HostBatch | str]) -> Iterator[HostBatch]:
    """Yield the batches of a DataLoader's iterator and end its workers, wherever the consumer stops."""
    try:
        while True:
            with _lost_worker_explained():
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, str):
                raise UserError(batch)
            yield HostBatch(*batch)
    finally:
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
