"""What the loaders that stream batches share: work ahead on a thread, the way to the device, and a clean end."""

import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcifar.data.batch import Batch, Share
from fastcifar.data.loaders.base import EpochOrder, with_shares
from fastcifar.data.loaders.read_ahead import ReadAhead
from fastcifar.data.pixels import Images

AHEAD_BATCHES = 3
POLL_S = 0.05


class HostBatch(NamedTuple):
    """A batch in host memory: images uint8 (B, H, W, C), labels int64 (B,), indices int64 (B,)."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class StreamingLoader(ABC):
    """The frame of a loader that reads batches one after the other.

    Starting an epoch ends the one before, wherever that one was; closing ends the running one.

    Args:
        order: of the epochs.
        device: where images go.
        reason: why this backend.
        source: the split's images, memory-mapped.

    Attributes:
        read_ahead: what the kernel is told of the reading to come.
    """

    name: str
    augmented = False

    def __init__(self, order: EpochOrder, device: torch.device, reason: str, source: Images):
        self._epoch_order, self._device, self.source = order, device, source
        self.reason, self.samples = reason, order.samples
        self.read_ahead = ReadAhead(source, order, larger=False)
        self._running: Generator[Batch, None, None] | None = None

    def __len__(self) -> int:
        return self._epoch_order.batches

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch of an epoch, counted from 0; None where it has all of it."""
        return self._epoch_order.share(batch)

    @abstractmethod
    def _batches(self, epoch: int) -> Iterator[HostBatch]:
        """Yield the batches of an epoch; leave nothing behind when closed half-way."""

    def _deliver(self, epoch: int) -> Generator[Batch, None, None]:
        return to_device(self._batches(epoch), self._device)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device; each batch has memory of its own."""
        self._end()
        self._running = with_shares(self._deliver(epoch), self._epoch_order)
        return self._running

    def _end(self) -> None:
        # Two epochs at once would share buffers and worker threads.
        if self._running is not None:
            self._running.close()
            self._running = None

    def close(self) -> None:
        """End the running epoch, its workers and threads; what is iterated later yields nothing."""
        self._end()
        self._epoch_order = EpochOrder(self._epoch_order.rows[:0], 0, self._epoch_order.batch_size, False)


# ------------------------------------------------------------------------------------------------------- to the device


def to_device(batches: Iterator[HostBatch], device: torch.device) -> Generator[Batch, None, None]:
    """Hand batches over on the device; on a GPU each is copied while the one before is in use.

    Args:
        batches: host batches, each with memory of its own; closed when this generator is.
        device: where they go.
    """
    send = _send_cuda if device.type == "cuda" else _send_host
    try:
        yield from send(batches, device)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _send_host(batches: Iterator[HostBatch], device: torch.device) -> Iterator[Batch]:
    rows = torch.arange(0)
    for batch in batches:
        if len(rows) != len(batch.labels):
            rows = torch.arange(len(batch.labels))
        yield Batch(batch.images, rows, batch.labels, batch.indices)


def as_batch(batch: HostBatch) -> Batch:
    """Return a batch that is its own set: ``rows`` are 0..B-1."""
    rows = torch.arange(len(batch.labels), device=batch.labels.device)
    return Batch(batch.images, rows, batch.labels, batch.indices)


def _send_cuda(batches: Iterator[HostBatch], device: torch.device) -> Iterator[Batch]:
    """Copy on a side stream, one batch ahead, out of page-locked memory."""
    side = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        sent = _copy(batch, device, side)
        if ahead is not None:
            yield _receive(*ahead, device)
        ahead = sent
    if ahead is not None:
        yield _receive(*ahead, device)


def _copy(batch: HostBatch, device: torch.device, side: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    """Start the copy of a batch.

    The page-locked memory comes from torch's caching host allocator, which gives it out again only after the copies
    that read it have ended, so that nothing here has to wait.
    """
    pinned = [t if t.is_pinned() else t.pin_memory() for t in batch]
    with torch.cuda.stream(side):
        copied = as_batch(HostBatch(*(t.to(device, non_blocking=True) for t in pinned)))
        return copied, side.record_event()


def _receive(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Make the consumer's stream wait for the copy, and keep the memory until that stream has done with it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch.tensors():
        # The allocator would otherwise hand this memory to the side stream while the step still reads it.
        tensor.record_stream(stream)
    return batch


# ------------------------------------------------------------------------------------------------------- on a thread


class _End(NamedTuple):
    error: BaseException | None


class _Worker(threading.Thread):
    """Runs an iterator into a bounded queue until it ends, fails or is told to stop.

    A daemon, because a thread that waits for room in the queue must not keep a program from ending; it is stopped
    before the interpreter takes its modules down (see `ahead`).
    """

    def __init__(self, source: Iterator[HostBatch], depth: int):
        super().__init__(daemon=True, name="fastcifar-reader")
        self.items: queue.Queue[HostBatch | _End] = queue.Queue(depth)
        self._source, self._stopping = source, threading.Event()

    def run(self) -> None:
        """Fill the queue; an exception is handed to the consumer."""
        error = None
        try:
            for item in self._source:
                if not self._offer(item):
                    return
        except BaseException as caught:
            error = caught
        self._offer(_End(error))

    def _offer(self, item: HostBatch | _End) -> bool:
        while not self._stopping.is_set():
            try:
                self.items.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def stop(self) -> None:
        """Tell the thread to end and wait until it has."""
        self._stopping.set()
        if self.is_alive():
            self.join()


def ahead(source: Iterator[HostBatch], depth: int = AHEAD_BATCHES) -> Generator[HostBatch, None, None]:
    """Run an iterator on a thread, at most ``depth`` items ahead of the consumer."""
    worker = _Worker(source, depth)
    # Covers the end of the program while this generator is still alive (a traceback holds it, say).
    stop = weakref.finalize(worker.items, worker.stop)
    worker.start()
    try:
        while not isinstance(item := worker.items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.detach()
        worker.stop()
