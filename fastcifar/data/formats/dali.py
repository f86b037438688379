"""The dali format: WebDataset tar shards with DALI's index files.

Each sample is three members of a ustar archive: ``IIIIIIIII.img`` (raw pixels, uint8 H*W*C), ``IIIIIIIII.cls`` (the
label, as text) and ``IIIIIIIII.idx`` (the row, little-endian int64). All members have one size, so that a sample's
place is arithmetic; stock ``fn.readers.webdataset`` and any WebDataset reader read the shards, and ``.decode()`` of the
webdataset package makes an int of the label. Labels of stores that were written before were little-endian int64 too;
they are still read.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from fastcifar.data.formats.raw import Split
from fastcifar.data.formats.target import Target
from fastcifar.data.manifest import CURE
from fastcifar.data.pixels import Pieces, chunk_rows, let_go
from fastcifar.errors import UserError

BLOCK = 512
SHARD_SAMPLES = 8192
EXTENSIONS = ("img", "cls", "idx")
INDEX_VERSION = "v1.2"
LABEL_DIGITS = 8
"""Zero-padded, so that the member has one size: the size of the int64 that it was before."""


def sample_bytes(image_bytes: int) -> int:
    """Return how many bytes of a shard one sample takes, headers included."""
    return sum(BLOCK + _padded(size) for size in _sizes(image_bytes))


def offsets(image_bytes: int) -> list[int]:
    """Return where the contents of ``img``, ``cls`` and ``idx`` begin within a sample."""
    starts, position = [], 0
    for size in _sizes(image_bytes):
        starts.append(position + BLOCK)
        position += BLOCK + _padded(size)
    return starts


def _sizes(image_bytes: int) -> tuple[int, int, int]:
    return image_bytes, LABEL_DIGITS, 8


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def shard_names(split: str, count: int) -> list[str]:
    """Return the file names of a split's shards."""
    return [f"{split}-{k:05d}.tar" for k in range(-(-count // SHARD_SAMPLES))]


def index_name(shard: str) -> str:
    """Return the name of a shard's index file."""
    return shard.removesuffix(".tar") + ".idx"


def write(split: Split, target: Target, name: str, progress: Callable[[str, int, int], None]) -> None:
    """Write ``NAME-00000.tar``, ``NAME-00000.idx`` and so on."""
    count, image_bytes = len(split), int(np.prod(split.images.shape[1:]))
    for k, shard in enumerate(shard_names(name, count)):
        rows = np.arange(k * SHARD_SAMPLES, min((k + 1) * SHARD_SAMPLES, count))
        with target.file(shard) as file:
            for part in np.split(rows, range(chunk_rows(split.images), len(rows), chunk_rows(split.images))):
                file.write(_records(split.images[int(part[0]) : int(part[-1]) + 1], split.labels[part], part).data)
                let_go(split.images)
                progress(f"write {name} as dali", int(part[-1]) + 1, count)
            file.write(bytes(2 * BLOCK))  # the end of an archive
        with target.file(index_name(shard)) as file:
            file.write(index_text(rows, np.arange(len(rows)), image_bytes).encode())


def _records(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the samples as they lie in a shard: uint8 (N, sample_bytes)."""
    count, image_bytes = len(rows), int(np.prod(images.shape[1:]))
    contents = (
        images.reshape(count, image_bytes),
        _bytes_of([f"{label:0{LABEL_DIGITS}d}" for label in labels.tolist()]),
        rows.astype("<i8").reshape(-1, 1).view(np.uint8),
    )
    records = np.zeros((count, sample_bytes(image_bytes)), np.uint8)
    for extension, content, start in zip(EXTENSIONS, contents, offsets(image_bytes), strict=True):
        records[:, start - BLOCK : start] = _headers(rows, extension, content.shape[1])
        records[:, start : start + content.shape[1]] = content
    return records


def _headers(rows: np.ndarray, extension: str, size: int) -> np.ndarray:
    """Return one ustar header per row: uint8 (N, 512)."""
    header = np.zeros(BLOCK, np.uint8)
    for start, text in (
        (100, "0000644\0"),
        (108, "0000000\0"),
        (116, "0000000\0"),
        (124, f"{size:011o}\0"),
        (136, "00000000000\0"),
        (148, " " * 8),
        (156, "0"),
        (257, "ustar\00000"),
    ):
        header[start : start + len(text)] = np.frombuffer(text.encode(), np.uint8)
    headers = np.repeat(header[None], len(rows), axis=0)
    names = _bytes_of([f"{row:09d}.{extension}" for row in rows])
    headers[:, : names.shape[1]] = names
    sums = headers.sum(axis=1, dtype=np.int64)
    headers[:, 148:156] = _bytes_of([f"{total:06o}\0 " for total in sums])
    return headers


def _bytes_of(texts: list[str]) -> np.ndarray:
    """Return texts of one length as uint8 (N, length)."""
    return np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), -1)


def index_text(rows: np.ndarray, slots: np.ndarray, image_bytes: int) -> str:
    """Return a DALI index of the samples at the given slots of a shard, in that order.

    Args:
        rows: int64 (N,), which name the members.
        slots: int64 (N,), the samples' positions in the shard.
        image_bytes: H * W * C.
    """
    stride, starts, sizes = sample_bytes(image_bytes), offsets(image_bytes), _sizes(image_bytes)
    parts = list(zip(EXTENSIONS, starts, sizes, strict=True))
    lines = [
        " ".join(f"{e} {slot * stride + start} {size} {row:09d}.{e}" for e, start, size in parts)
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True)
    ]
    return "\n".join([f"{INDEX_VERSION} {len(lines)}", *lines]) + "\n"


def kept_images(folder: Path, name: str, shape: tuple[int, ...], ends: Mapping[str, int]) -> list[np.ndarray]:
    """Map the images at the beginning of a split that is still being written, as `raw.kept_images` does."""
    count, image_bytes = shape[0], int(np.prod(shape[1:]))
    stride, start, shards = sample_bytes(image_bytes), offsets(image_bytes)[0], []
    for k, shard in enumerate(shard_names(name, count)):
        held = min(SHARD_SAMPLES, count - k * SHARD_SAMPLES)
        right = min(held, ends.get(shard, 0) // stride)
        if right:
            samples = np.memmap(folder / shard, np.uint8, "r", shape=(right, stride))
            shards.append(samples[:, start : start + image_bytes].reshape(-1, *shape[1:]))
        if right < held:
            break
    return shards


def views(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Return each shard's samples, memory-mapped: uint8 (samples, sample_bytes).

    Raises:
        UserError: a shard of another size than its samples take.
    """
    stride, shards = sample_bytes(int(np.prod(image_shape))), []
    for k, shard in enumerate(shard_names(name, count)):
        held = min(SHARD_SAMPLES, count - k * SHARD_SAMPLES)
        data = np.memmap(folder / shard, np.uint8, mode="c")  # copy-on-write, as in the raw format
        if len(data) != held * stride + 2 * BLOCK:
            raise UserError(f"{folder / shard}: not a shard of {held} samples of {image_shape} pixels; {CURE}")
        shards.append(data[: held * stride].reshape(held, stride))
    return shards


def read(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> Split:
    """Map the images of a split's shards and read the labels, without DALI.

    Raises:
        UserError: a shard of the wrong size.
    """
    image_bytes = int(np.prod(image_shape))
    start = offsets(image_bytes)[0]
    shards = views(folder, name, count, image_shape)
    images = [shard[:, start : start + image_bytes].reshape(-1, *image_shape) for shard in shards]
    return Split(Pieces(images, (count, *image_shape)), read_labels(folder, name, count, image_shape))


def read_labels(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Read the labels alone: int64 (N,), in a store of either kind (see the head of this file).

    Raises:
        UserError: a shard of the wrong size, or a label that is neither text nor a number.
    """
    looks = tuple((found.st_mtime_ns, found.st_ino) for shard in shard_names(name, count)
                  for found in [(folder / shard).stat()])  # fmt: skip
    return _read_labels(folder, name, count, image_shape, looks).copy()


@lru_cache(8)
def _read_labels(folder: Path, name: str, count: int, image_shape: tuple[int, int, int], looks: object) -> np.ndarray:
    """Read them once in a process: labels lie between images, so that a pass over them reads the whole file."""
    start = offsets(int(np.prod(image_shape)))[1]
    shards = views(folder, name, count, image_shape)
    return np.concatenate([labels_of(shard[:, start : start + LABEL_DIGITS]) for shard in shards])


def labels_of(members: np.ndarray) -> np.ndarray:
    """Return the labels that ``.cls`` members hold: int64 (N,).

    Args:
        members: uint8 (N, 8): digits, or a little-endian int64. The two cannot be confused: a number of eight bytes
            that all are digits would be above 3 * 10**18, and there are at most a million classes.
    """
    members = np.ascontiguousarray(members)
    digits = members.astype(np.int64) - ord("0")
    text = ((digits >= 0) & (digits <= 9)).all(axis=1)
    powers = 10 ** np.arange(LABEL_DIGITS - 1, -1, -1, dtype=np.int64)
    return np.where(text, digits @ powers, members.view("<i8")[:, 0])
