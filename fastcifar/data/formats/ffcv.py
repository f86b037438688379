"""The ffcv format: one ``.beton`` per split with fields ``image`` (raw RGB), ``label`` and ``index``.

The file is laid out here, byte by byte, instead of through ffcv's writer: that one forks a process per core around
a spinning lock and gives another file each time, while this needs no ffcv, is limited by the disk, and always
gives the same bytes. Stock ffcv reads it with its default decoders, under both of its memory managers.

Layout (Leclerc et al., 2023, format version 2): header, field descriptions, one metadata record per sample, pages
of ``PAGE_BYTES`` in which no image crosses a border, then the table of where each image lies.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastcifar.data.formats.raw import Split
from fastcifar.data.formats.target import Target
from fastcifar.data.manifest import CURE
from fastcifar.data.pixels import Pieces, let_go
from fastcifar.errors import UserError

VERSION = 2
PAGE_BYTES = 1 << 23
TYPE_INT, TYPE_RGB = 1, 2
MODE_RAW = 1
FIELDS = (("image", TYPE_RGB), ("label", TYPE_INT), ("index", TYPE_INT))

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("samples", "<u8"), ("table", "<u8")], align=True
)
FIELD = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
PLACE = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("bytes", "<u8")])


def file_name(split: str) -> str:
    """Return the name of a split's file within the store."""
    return f"{split}.beton"


def write(split: Split, target: Target, name: str, progress: Callable[[str, int, int], None]) -> None:
    """Write ``NAME.beton``.

    Raises:
        UserError: images that are not RGB.
    """
    count, height, width, channels = split.images.shape
    if channels != 3:
        raise UserError(f"the ffcv format holds RGB images, these have {channels} channels; convert --to raw")
    page_bytes, per_page, start = _pages(count, height * width * channels)
    pointers = _pointers(count, height * width * channels, page_bytes, per_page, start)
    pages = -(-count // per_page)
    with target.file(file_name(name)) as file:
        file.write(_head(split, pointers, page_bytes, table=start + pages * page_bytes))
        for page in range(pages):
            rows = slice(page * per_page, min((page + 1) * per_page, count))
            file.skip_to(start + page * page_bytes)
            file.write(np.ascontiguousarray(split.images[rows]).data)
            let_go(split.images)
            progress(f"write {name} as ffcv", rows.stop, count)
        file.skip_to(start + pages * page_bytes)
        file.write(_table(pointers, height * width * channels).tobytes())


def _pages(count: int, image_bytes: int) -> tuple[int, int, int]:
    """Return the bytes of a page, the images in it, and where the first page begins."""
    page_bytes = max(PAGE_BYTES, 1 << (image_bytes - 1).bit_length())
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * SAMPLE.itemsize
    return page_bytes, page_bytes // image_bytes, -(-head // page_bytes) * page_bytes


def _pointers(count: int, image_bytes: int, page_bytes: int, per_page: int, start: int) -> np.ndarray:
    """Return where each image begins in the file: uint64 (count,)."""
    page, slot = np.divmod(np.arange(count, dtype=np.uint64), np.uint64(per_page))
    return np.uint64(start) + page * np.uint64(page_bytes) + slot * np.uint64(image_bytes)


def _head(split: Split, pointers: np.ndarray, page_bytes: int, table: int) -> bytes:
    """Return everything before the first page."""
    count, height, width, _ = split.images.shape
    header = np.array([(VERSION, len(FIELDS), page_bytes, count, table)], HEADER)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, kind) in zip(fields, FIELDS, strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    samples = np.zeros(count, SAMPLE)
    image = samples["image"]
    image["mode"], image["width"], image["height"], image["pointer"] = MODE_RAW, width, height, pointers
    samples["label"], samples["index"] = split.labels, np.arange(count)
    return header.tobytes() + fields.tobytes() + samples.tobytes()


def _table(pointers: np.ndarray, image_bytes: int) -> np.ndarray:
    table = np.zeros(len(pointers), PLACE)
    table["sample"], table["pointer"], table["bytes"] = np.arange(len(pointers)), pointers, image_bytes
    return table


def kept_images(folder: Path, name: str, shape: tuple[int, ...], ends: Mapping[str, int]) -> list[np.ndarray]:
    """Map the images at the beginning of a split that is still being written, as `raw.kept_images` does."""
    count, image_bytes = shape[0], int(np.prod(shape[1:]))
    page_bytes, per_page, start = _pages(count, image_bytes)
    end, pages = ends.get(file_name(name), 0), list[np.ndarray]()
    if end <= start:
        return pages
    data = np.memmap(folder / file_name(name), np.uint8, "r", shape=(end,))
    for first in range(0, count, per_page):
        place, size = start + first // per_page * page_bytes, min(per_page, count - first) * image_bytes
        if place + size > end:
            break
        pages.append(data[place : place + size].reshape(-1, *shape[1:]))
    return pages


def read(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> Split:
    """Map the images and read the labels of ``NAME.beton``, without ffcv.

    Raises:
        UserError: a file that is not of the layout above, or truncated.
    """
    path = folder / file_name(name)
    data = np.memmap(path, np.uint8, mode="c")  # copy-on-write, as in the raw format
    samples = _samples(path, data, count, image_shape)
    image_bytes = int(np.prod(image_shape))
    pointers = samples["image"]["pointer"].astype(np.int64)
    pages = [
        data[pointers[first] : pointers[first] + (last - first) * image_bytes].reshape(-1, *image_shape)
        for first, last in _runs(pointers, image_bytes)
    ]
    return Split(Pieces(pages, (count, *image_shape)), samples["label"].astype(np.int64))


def read_labels(folder: Path, name: str, count: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Read the labels alone: int64 (N,)."""
    path = folder / file_name(name)
    return _samples(path, np.memmap(path, np.uint8, mode="r"), count, image_shape)["label"].astype(np.int64)


def _samples(path: Path, data: np.ndarray, count: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Return the metadata records after checking the header and the fields."""
    start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    if len(data) < start + count * SAMPLE.itemsize:
        raise UserError(f"{path}: truncated; {CURE}")
    header = data[: HEADER.itemsize].view(HEADER)[0]
    kinds = data[HEADER.itemsize : start].view(FIELD)["type"].tolist()
    if header["version"] != VERSION or header["samples"] != count or kinds != [kind for _, kind in FIELDS]:
        raise UserError(f"{path}: not a .beton with {count} samples of image, label and index; {CURE}")
    samples = data[start : start + count * SAMPLE.itemsize].view(SAMPLE)
    image = samples["image"]
    height, width, _ = image_shape
    if not ((image["mode"] == MODE_RAW) & (image["width"] == width) & (image["height"] == height)).all():
        raise UserError(f"{path}: holds other images than raw ones of {height}x{width} pixels; {CURE}")
    # ffcv's compiled readers go wherever a pointer leads.
    image_bytes = int(np.prod(image_shape))
    if count and (len(data) < image_bytes or int(image["pointer"].max()) > len(data) - image_bytes):
        raise UserError(f"{path}: an image lies beyond the end of the file; {CURE}")
    return samples


def _runs(pointers: np.ndarray, image_bytes: int) -> list[tuple[int, int]]:
    """Return the ranges of rows whose images lie one behind the other."""
    breaks = np.flatnonzero(np.diff(pointers) != image_bytes) + 1
    edges = [0, *breaks.tolist(), len(pointers)]
    return [pair for pair in pairwise(edges) if pair[0] < pair[1]]
