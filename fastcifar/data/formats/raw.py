"""The raw format: one ``.npy`` of pixels and one of labels per split, memory-mapped when read."""

import errno
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcifar.data.formats.target import HashedFile, Target
from fastcifar.data.manifest import CURE
from fastcifar.data.pixels import Images, chunks
from fastcifar.errors import UserError


@dataclass(frozen=True)
class Split:
    """The images of ``train`` or ``test``.

    Attributes:
        images: uint8 (N, H, W, C), in 0..255: an array, memory-mapped (then copy-on-write) or not, or what reads a
            file when rows are asked for.
        labels: int64 (N,), in 0..classes-1.
    """

    images: Images
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def reserve(file: HashedFile, size: int) -> None:
    """Take the space of a file that is about to be written, so that a full disk is known at once.

    Raises:
        OSError: there is not enough (``ENOSPC``).
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
            raise


def write(split: Split, target: Target, name: str, progress: Callable[[str, int, int], None]) -> None:
    """Write ``NAME_images.npy`` and ``NAME_labels.npy``."""
    count = len(split)
    header = {"descr": "|u1", "fortran_order": False, "shape": split.images.shape}
    # Not memory-mapped: on a full disk a page that cannot be written ends the process with SIGBUS, without a word.
    with target.file(f"{name}_images.npy") as file:
        np.lib.format.write_array_header_2_0(file, header)
        reserve(file, file.tell() + split.images.nbytes)
        for first, images in chunks(split.images):
            file.write(np.ascontiguousarray(images).data)
            progress(f"write {name} as raw", first + len(images), count)
    with target.file(f"{name}_labels.npy") as file:
        np.save(file, split.labels.astype(np.int64))


def kept_images(folder: Path, name: str, shape: tuple[int, ...], ends: Mapping[str, int]) -> list[np.ndarray]:
    """Map the images at the beginning of a split that is still being written.

    Args:
        folder: of the store.
        name: of the split.
        shape: of all its images, (N, H, W, C).
        ends: by a file's name, how many of its first bytes are right.

    Returns:
        uint8 (n, H, W, C) each, the rows 0, 1, ... one behind the other.
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file, start = f"{name}_images.npy", header.tell()
    count = min(max(ends.get(file, 0) - start, 0) // int(np.prod(shape[1:])), shape[0])
    return [np.memmap(folder / file, np.uint8, "r", start, (count, *shape[1:]))] if count else []


def read(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> Split:
    """Map the images and load the labels.

    Raises:
        UserError: a file that is no array of the expected shape and type.
    """
    # Copy-on-write, so that torch can wrap the pages without a copy and without a warning about read-only memory.
    images = _load(folder / f"{name}_images.npy", "c", np.uint8, (count, *image_shape))
    return Split(images, read_labels(folder, name, count, image_shape))


def read_labels(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Load the labels alone: int64 (N,)."""
    return _load(folder / f"{name}_labels.npy", None, np.int64, (count,))


def _load(path: Path, mode: str | None, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable array ({error}); {CURE}") from None
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{path}: {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}; {CURE}")
    return array
