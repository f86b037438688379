"""DALI's own order: its WebDataset reader, which reads and shuffles, through one pipeline for all epochs.

DALI picks each sample of an epoch from a buffer of up to `SHUFFLE_SAMPLES` that is filled from front to back; the last
batch is padded, so that an epoch begins with a batch and draws from its own samples alone. Its order therefore depends
on nothing but the state of the reader's random numbers when it begins. That state is computed here, from the seed and
the number of the epoch: the pipeline goes on where it has arrived at that state, and is built anew, from a checkpoint
with that state, where it has not: in a resumed run, or after an epoch that was left half-way.
"""

import importlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import torch

from fastcifar.data.formats import dali as layout
from fastcifar.data.loaders.base import EpochOrder
from fastcifar.data.store import Store
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox

SHUFFLE_SAMPLES = 4096
READER = "reader"
READERS_ENTRY = re.compile(rb"\n.\n\x06reader\x12.\n.\n.(\d{1,10})\x10[\x80-\xff]*.\x18([\x80-\xff]*.)", re.DOTALL)
"""The reader's part of a pipeline's checkpoint, a protobuf: its random numbers' state in decimal digits, the number of
the epoch, and how many samples of it have been delivered."""


class NativeReader:
    """Delivers batches in DALI's own order.

    Args:
        store: in the dali format.
        order: which rows, of which rank, in what batches.
        settings: of DALI's pipeline.
    """

    def __init__(self, store: Store, order: EpochOrder, settings: dict[str, Any]):
        self._index = NativeIndex(store, order)
        seed = int(philox(order.seed, torch.tensor([0]), 0, 1, Stream.ORDER)[0]) >> 1  # DALI's: 0..2**31-1
        self._settings = {**settings, "seed": seed, "enable_checkpointing": True}
        self._runs = -(-self._index.samples // order.rank_batch)
        self._pipeline: Any = None
        self._first: bytes | None = None
        self._known: tuple[int, int] | None = None

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Yield a pipeline's outputs for each batch of an epoch; the last batch is padded to the size of the others."""
        if self._first is None:
            self._pipeline = self._built(None)
            self._first = self._pipeline.checkpoint()
        state = self._state_of(epoch, self._first)
        if state_of(self._pipeline.checkpoint()) != (state, 0):
            self._pipeline = None  # before another one takes its memory
            self._pipeline = self._built(with_state(self._first, state))
        for _ in range(self._runs):
            yield self._pipeline.run()

    def _state_of(self, epoch: int, first: bytes) -> int:
        """Return the state of the reader's random numbers at the beginning of an epoch."""
        done, state = 0, state_of(first)[0]
        if self._known is not None and self._known[0] <= epoch:
            done, state = self._known
        count = self._index.samples
        state = int(_state_after(state, count, min(count, SHUFFLE_SAMPLES), epoch - done))
        self._known = epoch, state
        return state

    def _built(self, checkpoint: bytes | None) -> Any:
        from nvidia.dali import fn, pipeline_def

        index, settings = self._index, self._settings

        @pipeline_def(**settings, checkpoint=checkpoint)
        def pipeline() -> tuple[Any, ...]:
            read: Any = fn.readers.webdataset(
                paths=index.shards,
                index_paths=index.indexes,
                ext=["img", "idx"],
                dtypes=kinds(),
                missing_component_behavior="error",
                random_shuffle=True,
                initial_fill=min(index.samples, SHUFFLE_SAMPLES),
                pad_last_batch=True,
                name=READER,
            )
            images, indices = read
            return delivered(settings, fn.reshape(images, shape=list(index.image_shape)), indices)

        built = pipeline()
        built.build()
        return built


def delivered(settings: dict[str, Any], *outputs: Any) -> tuple[Any, ...]:
    """Return a pipeline's outputs on the device of its settings."""
    return outputs if settings["device_id"] is None else tuple(o.gpu() for o in outputs)


def kinds() -> list[Any]:
    """Return DALI's types of images and indices."""
    types: Any = importlib.import_module("nvidia.dali.types")
    return [types.UINT8, types.INT64]


# --------------------------------------------------------------------------------------------------- the reader's state


def state_of(checkpoint: bytes) -> tuple[int, int]:
    """Return the state of the reader's random numbers, and how many samples of its epoch it has delivered.

    Raises:
        UserError: a version of DALI that keeps another state.
    """
    entry = _entry(checkpoint)
    delivered = 0
    for place, byte in enumerate(entry[2]):
        delivered |= (byte & 127) << 7 * place
    return int(entry[1]), delivered


def with_state(checkpoint: bytes, state: int) -> bytes:
    """Return a checkpoint whose reader is at the beginning of an epoch, its random numbers in the given state."""
    entry = _entry(checkpoint)
    loader = _field(1, b"%d" % state) + b"\x10\x00\x18\x00"
    written = _field(1, _field(1, READER.encode()) + _field(2, _field(1, loader)))
    return checkpoint[: entry.start()] + written + checkpoint[entry.end() :]


def _entry(checkpoint: bytes) -> re.Match[bytes]:
    found = READERS_ENTRY.search(checkpoint)
    if found is None:
        version = importlib.import_module("nvidia.dali").__version__
        raise UserError(
            f'data.loader.order = "native": DALI {version} writes checkpoints that are not known here; '
            'use order = "plan", or DALI 2.4'
        )
    return found


def _field(number: int, content: bytes) -> bytes:
    """Return a protobuf field of fewer than 128 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


@nb.njit(cache=True)
def _state_after(state: int, samples: int, buffered: int, epochs: int) -> int:
    """Return what epochs make of the reader's random numbers: one of C++'s uniform_int_distribution for each sample.

    DALI draws with std::default_random_engine, which is std::minstd_rand0 (Park and Miller, 1988): 16807 s modulo
    2**31 - 1. A number that would favor some of the samples is drawn again.
    """
    for _ in range(epochs):
        for sample in range(samples):
            among = min(buffered, samples - sample)
            past = 2147483645 // among * among
            state = state * 16807 % 2147483647
            while state - 1 >= past:
                state = state * 16807 % 2147483647
    return state


# ------------------------------------------------------------------------------------------------------------ its index


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
