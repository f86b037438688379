"""Images of a split where they lie: in memory, in a memory-mapped store, or in files that are still to be decoded.

Whoever walks over a split takes `chunks` of it, and whoever needs a part takes that part: a split may be larger than
memory, and is never gathered as a whole.
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20


class Images(Protocol):
    """The images of a split, uint8 (N, H, W, C) in 0..255: an array, or what is indexed like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, H, W, C)."""

    @property
    def nbytes(self) -> int:
        """Return how many bytes all pixels have."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class StoredImages(ABC):
    """What is indexed like an array by rows (a number, a slice, int64 (n,), or bool (N,)) and reads them then."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """How many bytes all pixels have."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            return self._between(first, max(first, last)) if step == 1 else self._gather(np.arange(first, last, step))
        chosen = np.asarray(rows)
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        wanted = np.atleast_1d(chosen).astype(np.int64, copy=False)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"a row of {chosen} is not in 0..{len(self) - 1}")
        read = self._gather(wanted)
        return read if chosen.ndim else read[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=bool(copy))

    def _between(self, first: int, last: int) -> np.ndarray:
        """Return rows ``first`` to ``last``."""
        return self._gather(np.arange(first, last))

    @abstractmethod
    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows, int64 (n,) in 0..N-1."""


class Pieces(StoredImages):
    """Images in several arrays, one behind the other: the shards or pages of a file.

    Args:
        arrays: uint8 (n, H, W, C) each, possibly memory-mapped.
        shape: of the whole, (N, H, W, C).
    """

    def __init__(self, arrays: Sequence[np.ndarray], shape: tuple[int, ...]):
        super().__init__(shape)
        self.arrays = list(arrays)
        self._starts = np.cumsum([0, *(len(array) for array in arrays)])

    def arrays_between(self, first: int, last: int) -> Iterator[np.memmap]:
        """Yield the memory-mapped arrays that the rows ``first`` to ``last`` lie in, cut to these rows."""
        for start, array in zip(self._starts[:-1], self.arrays, strict=True):
            cut = array[max(first - start, 0) : max(last - start, 0)]
            if isinstance(cut, np.memmap) and len(cut):
                yield cut

    def _between(self, first: int, last: int) -> np.ndarray:
        inside = int(np.searchsorted(self._starts, first, "right")) - 1
        if first < last <= self._starts[inside + 1]:
            start = self._starts[inside]
            return self.arrays[inside][first - start : last - start]
        return super()._between(first, last)

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        owner = np.searchsorted(self._starts, rows, "right") - 1
        for piece in np.unique(owner):
            mine = np.flatnonzero(owner == piece)
            images[mine] = self.arrays[piece][rows[mine] - self._starts[piece]]
        return images


class Chosen(StoredImages):
    """Some rows of other images, int64 (n,), read when they are asked for."""

    def __init__(self, images: Images, rows: np.ndarray):
        super().__init__((len(rows), *images.shape[1:]))
        self.images, self._rows = images, rows

    def _between(self, first: int, last: int) -> np.ndarray:
        rows = self._rows[first:last]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return np.asarray(self.images[int(rows[0]) : int(rows[-1]) + 1])
        return np.asarray(self.images[rows])

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.images[self._rows[rows]])


class Continued(StoredImages):
    """Images of which the first are read elsewhere: in a store that is half written."""

    def __init__(self, first: Pieces, images: Images):
        super().__init__(images.shape)
        self.first, self.images = first, images

    def _between(self, first: int, last: int) -> np.ndarray:
        there = len(self.first)
        if last <= there:
            return self.first[first:last]
        rest = np.asarray(self.images[max(first, there) : last])
        return rest if first >= there else np.concatenate([self.first[first:there], rest])

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows.tolist()):
            images[place] = self._between(row, row + 1)[0]
        return images


class Passing(StoredImages):
    """Images that are read once from front to back, each part of them being shown to somebody on the way."""

    def __init__(self, images: Images, show: Callable[[np.ndarray], None]):
        super().__init__(images.shape)
        self.images, self._show, self._done = images, show, 0

    def _between(self, first: int, last: int) -> np.ndarray:
        assert first == self._done, f"row {first} was asked for, {self._done} comes next"
        self._done = last
        part = np.asarray(self.images[first:last])
        self._show(part)
        return part

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        raise IndexError("images that pass by are read from front to back, not row by row")


def choose(images: Images, rows: np.ndarray) -> Images:
    """Return the chosen rows, int64 (n,), of some images: the images themselves where that is all of them in order."""
    whole = len(rows) == len(images) and bool((rows == np.arange(len(images))).all())
    return images if whole else Chosen(images, rows)


def chunk_rows(images: Images) -> int:
    """Return how many images make a chunk of about `CHUNK_BYTES`."""
    return max(1, CHUNK_BYTES // int(np.prod(images.shape[1:])))


def chunks(images: Images) -> Iterator[tuple[int, np.ndarray]]:
    """Yield all images in order, a few MiB at a time: the first row, and uint8 (n, H, W, C).

    Pages of a memory map are let go of behind the reader.
    """
    size = chunk_rows(images)
    for first in range(0, len(images), size):
        yield first, np.asarray(images[first : first + size])
        let_go(images)


def as_tensor(images: Tensor | np.ndarray) -> Tensor:
    """Return images as a tensor, without a copy where that is possible."""
    return images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))


def on_device(images: Images, device: torch.device) -> Tensor:
    """Return all images on a device, uint8 (N, H, W, C), copied a few MiB at a time; on the host an array is itself."""
    if device.type == "cpu" and isinstance(images, np.ndarray):
        return as_tensor(images)
    copied = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for first, part in chunks(images):
        copied[first : first + len(part)] = as_tensor(part)
    return copied


def let_go(images: Images) -> None:
    """Take the pages of a memory map out of this process's memory; reading them again brings them back."""
    advise(images, "DONTNEED")


def advise(images: Images, advice: str) -> None:
    """Tell the kernel how memory-mapped images will be read; nothing happens where there is no map or no advice.

    Args:
        images: memory-mapped or not.
        advice: ``RANDOM``, ``SEQUENTIAL``, ``NORMAL``, ``WILLNEED`` or ``DONTNEED``, of madvise(2).
    """
    number: int | None = getattr(mmap, f"MADV_{advice}", None)
    if number is not None:
        for mapped in _maps(images):
            mapped.madvise(number)


def will_need(images: Images, first: int, last: int) -> None:
    """Ask the kernel to read the rows ``first`` to ``last`` of memory-mapped images from the disk, in one piece."""
    _advise_of_file(images, first, last, "WILLNEED")


def forget(images: Images, first: int, last: int) -> None:
    """Let the kernel drop the rows ``first`` to ``last`` from its cache, but for what a process has still mapped."""
    _advise_of_file(images, first, last, "DONTNEED")


def _advise_of_file(images: Images, first: int, last: int, advice: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    number: int = getattr(os, f"POSIX_FADV_{advice}")
    for array in _arrays_between(images, first, last):
        base = np.frombuffer(array._mmap, np.uint8).ctypes.data  # type: ignore[attr-defined]
        descriptor = os.open(str(array.filename), os.O_RDONLY)
        try:
            # Maps begin at the beginning of their files. Unlike madvise of the module mmap, this lets others run.
            size = (len(array) - 1) * array.strides[0] + array[0].nbytes
            os.posix_fadvise(descriptor, array.ctypes.data - base, size, number)
        finally:
            os.close(descriptor)


def _arrays_between(images: Images, first: int, last: int) -> Iterator[np.memmap]:
    """Yield the memory-mapped arrays that the rows ``first`` to ``last`` lie in, cut to these rows."""
    if isinstance(images, np.memmap):
        yield from Pieces([images], images.shape).arrays_between(first, last)
    elif isinstance(images, Pieces):
        yield from images.arrays_between(first, last)


def _maps(images: Any) -> list[mmap.mmap]:
    """Return the memory maps that some images lie in."""
    if isinstance(images, Chosen | Passing):
        return _maps(images.images)
    if isinstance(images, Continued):
        return [*_maps(images.first), *_maps(images.images)]
    arrays = images.arrays if isinstance(images, Pieces) else [images]
    found = {id(mapped): mapped for array in arrays if (mapped := getattr(array, "_mmap", None)) is not None}
    return list(found.values())
