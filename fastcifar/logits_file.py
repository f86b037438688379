"""``logits.npz``: arrays by name, checked by their headers before any is read, and never unpickled."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.errors import UserError

LABELS = re.compile(r"(test|holdout|train)/(labels|indices)")
LOGITS = re.compile(r"(test|holdout|train)/(last|best|selected)/(raw|ema)(/tta)?")


class Damaged(Exception):
    """Why the file cannot be used, in a few words."""


def write_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Return the file's content; arrays are stored, not compressed."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_arrays(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """Return the arrays by name: float32 (N, classes) logits, int64 (N,) labels and indices.

    Args:
        data: the file's content.
        path: the file, for messages.

    Raises:
        UserError: a name, kind, shape, size or value is not what a run writes.
    """
    try:
        arrays = _read(data)
        _check_values(arrays)
    except (Damaged, OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: is damaged ({error}); train the run again") from None
    return arrays


def _read(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if not entries:
            raise Damaged("there is nothing in it")
        # Stored members take no more memory than the file; a compressed one may be a thousand times larger.
        for name, entry in entries.items():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size > len(data):
                raise Damaged(f"{name[:80]} is compressed or encrypted, which a run never writes")
        return {name: _array(name, archive.read(entry)) for name, entry in entries.items()}


def _array(name: str, data: bytes) -> np.ndarray:
    """Return one member, its header checked against what its name says."""
    stream: Any = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if LABELS.fullmatch(name):
        good = dtype.kind in "iu" and len(shape) == 1
    elif LOGITS.fullmatch(name):
        good = dtype.kind == "f" and len(shape) == 2 and shape[0] > 0 and 0 < shape[1] <= 1 << 20
    else:
        raise Damaged(f"{name[:80]!r} is no array of a run")
    if not good or fortran or dtype.hasobject or dtype.itemsize not in (1, 2, 4, 8):
        raise Damaged(f"{name} is {dtype} {shape}")
    if any(n < 0 for n in shape) or len(data) - stream.tell() != _bytes(shape, dtype):
        raise Damaged(f"{name} has not the size that its header says")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape).copy()


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the size of an array in Python's integers, which do not overflow."""
    size = dtype.itemsize
    for n in shape:
        size *= int(n)
    return size


def _check_values(arrays: dict[str, np.ndarray]) -> None:
    """Check that there are as many logits as labels, labels within the classes, and no negative indices."""
    for name, array in arrays.items():
        split, _, rest = name.partition("/")
        if rest == "indices" and array.min(initial=0) < 0:
            raise Damaged(f"{name} has negative rows")
        if rest not in ("labels", "indices"):
            _check_logits(name, array, arrays.get(f"{split}/labels"))


def _check_logits(name: str, logits: np.ndarray, labels: np.ndarray | None) -> None:
    if labels is not None and len(labels) != len(logits):
        raise Damaged(f"{name} has {len(logits)} rows for {len(labels)} labels")
    if labels is not None and (labels.min(initial=0) < 0 or labels.max(initial=0) >= logits.shape[1]):
        raise Damaged(f"labels beyond the {logits.shape[1]} classes of {name}")
