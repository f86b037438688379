"""The published releases of CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): their files, and how to read them safely."""

import errno
import gzip
import hashlib
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.data.formats.raw import Split
from fastcifar.errors import UserError
from fastcifar.regular_file import open_regular

IMAGE_PX, CHANNELS = 32, 3
# The largest release unpacks to 186 MB in nine files.
MAX_ARCHIVE_BYTES, MAX_MEMBERS = 400_000_000, 64
PIXELS = IMAGE_PX * IMAGE_PX * CHANNELS


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release: its name, how many images it holds, and its official MD5 where that is known."""

    name: str
    records: int
    md5: str | None


@dataclass(frozen=True)
class Release:
    """One published form of a data set.

    Attributes:
        kind: ``cifar10`` or ``cifar100``.
        layout: ``python`` (pickles) or ``binary`` (records of label bytes and pixel planes).
        folder: the name of its folder.
        archive: the name of its archive.
        classes: how many classes there are.
        files: the files of ``train`` and ``test``.
        names_file: the file that names the classes.
        label: the key of the labels in a pickle, or the position of the label byte in a record.
        label_bytes: how many label bytes a record begins with.
    """

    kind: str
    layout: str
    folder: str
    archive: str
    classes: int
    files: dict[str, tuple[ReleaseFile, ...]]
    names_file: str
    label: str | int
    label_bytes: int = 0

    @property
    def all_files(self) -> tuple[ReleaseFile, ...]:
        """The files of both splits."""
        return self.files["train"] + self.files["test"]


def _batches(pattern: str, hashes: list[str]) -> tuple[ReleaseFile, ...]:
    return tuple(ReleaseFile(pattern.format(k), 10_000, md5) for k, md5 in enumerate(hashes, 1))


RELEASES = (
    Release(
        kind="cifar10",
        layout="python",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        classes=10,
        files={
            "train": _batches(
                "data_batch_{}",
                [
                    "c99cafc152244af753f735de768cd75f",
                    "d4bba439e000b95fd0a9bffe97cbabec",
                    "54ebc095f3ab1f0389bbae665268c751",
                    "634d18415352ddfa80567beed471001a",
                    "482c414d41f54cd18b22e5b47cb7c3cb",
                ],
            ),
            "test": (ReleaseFile("test_batch", 10_000, "40351d587109b95175f43aff81a1287e"),),
        },
        names_file="batches.meta",
        label="labels",
    ),
    Release(
        kind="cifar10",
        layout="binary",
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        classes=10,
        files={
            "train": _batches(
                "data_batch_{}.bin",
                [
                    "5dd7e06a14cb22eb9f671a540d1b7c25",
                    "5ea93a67294ea407fff1d09f752e9692",
                    "942cd6a4bcdd0dd3c604fbe906cb4421",
                    "ae636b3ba5c66a11e91e8cb52e771fcb",
                    "53f37980c15c3d472c316c40844f3f0d",
                ],
            ),
            "test": (ReleaseFile("test_batch.bin", 10_000, None),),
        },
        names_file="batches.meta.txt",
        label=0,
        label_bytes=1,
    ),
    Release(
        kind="cifar100",
        layout="python",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        classes=100,
        files={
            "train": (ReleaseFile("train", 50_000, "16019d7e3df5f24257cddd939b257f8d"),),
            "test": (ReleaseFile("test", 10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        },
        names_file="meta",
        label="fine_labels",
    ),
    Release(
        kind="cifar100",
        layout="binary",
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        classes=100,
        files={
            "train": (ReleaseFile("train.bin", 50_000, None),),
            "test": (ReleaseFile("test.bin", 10_000, None),),
        },
        names_file="fine_label_names.txt",
        label=1,
        label_bytes=2,
    ),
)
NAMES_KEYS = {"cifar10": "label_names", "cifar100": "fine_label_names"}

# ------------------------------------------------------------------------------------------------------------ archives


def release_of_archive(path: Path) -> Release:
    """Return which release an archive holds, from the folder in it.

    Raises:
        UserError: not an archive, damaged, or of something else.
    """
    open_regular(path).close()
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a readable archive ({error})") from None
    top = first.name.split("/")[0] if first else ""
    for release in RELEASES:
        if release.folder == top:
            return release
    folders = ", ".join(r.folder for r in RELEASES)
    raise UserError(f'{path}: begins with "{top}", which is none of {folders}')


def extracted(path: Path, release: Release, into: Path) -> Path:
    """Extract an archive with Python's ``data`` filter, which refuses what leaves the folder, links and devices.

    Raises:
        UserError: a damaged or truncated archive, or one with a refused member; or there is no room for it.
    """
    try:
        _check_stream(path)
        with tarfile.open(path) as archive:
            _check_members(path, archive)
            archive.extractall(into, filter="data")
    except UserError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
        if full and str(error.filename) != str(path):
            raise UserError(f"{path}: cannot be extracted into {into}: {error.strerror}; set TMPDIR") from None
        raise UserError(f"{path}: damaged or unsafe archive ({error}); get it again") from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path}: damaged or unsafe archive ({error}); get it again") from None
    except Exception as error:
        # zlib.error, of a damaged compressed stream, is an Exception of its own and zlib may be missing.
        if type(error).__name__ != "error":
            raise
        raise UserError(f"{path}: damaged archive ({error}); get it again") from None
    return into / release.folder


def _check_stream(path: Path) -> None:
    """Read a compressed archive to its end, where its checksum is: extraction stops before that."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if compressed:
        left = MAX_ARCHIVE_BYTES
        with gzip.open(path) as stream:
            while count := len(stream.read(1 << 20)):
                left -= count
                if left < 0:
                    raise UserError(f"{path}: unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes; no release does")


def _check_members(path: Path, archive: tarfile.TarFile) -> None:
    """Refuse, from its headers alone, an archive of more than a release holds.

    Raises:
        UserError: too many members, or too many bytes.
    """
    total = 0
    for count, member in enumerate(archive, start=1):
        total += member.size
        if count > MAX_MEMBERS or total > MAX_ARCHIVE_BYTES:
            raise UserError(
                f"{path}: holds more than {MAX_MEMBERS} files or {MAX_ARCHIVE_BYTES:,} bytes; no release does"
            )


# --------------------------------------------------------------------------------------------------------------- files


def read_file(path: Path, file: ReleaseFile, release: Release) -> tuple[Split, dict[str, Any], str | None]:
    """Read and check one file of images.

    Returns:
        The images and labels, the file's entry in the manifest, and a note where the file is not known to be the
        official one.

    Raises:
        UserError: missing, truncated or damaged, or a label out of range.
    """
    content = _bytes_of(path)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    read = _read_pickle if release.layout == "python" else _read_records
    planes, labels = read(path, content, file, release)
    if len(labels) and not 0 <= labels.min() <= labels.max() < release.classes:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= release.classes))[0])
        raise UserError(f"{path}: image {wrong} has label {labels[wrong]}, not in 0..{release.classes - 1} (damaged?)")
    images = planes.reshape(-1, CHANNELS, IMAGE_PX, IMAGE_PX).transpose(0, 2, 3, 1)
    entry = {"name": file.name, "bytes": len(content), "md5": md5, "official": md5 == file.md5}
    return Split(np.ascontiguousarray(images), labels), entry, _note(file, md5)


def _note(file: ReleaseFile, md5: str) -> str | None:
    if file.md5 is None:
        return f"{file.name}: its official hash is not known here; length and labels are right (MD5 {md5})"
    if md5 != file.md5:
        return f"{file.name}: not the official file (MD5 {md5} instead of {file.md5}); changed or damaged"
    return None


def _bytes_of(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"{path}: this file of the release is missing")
    try:
        with open_regular(path) as file:
            content = file.read(MAX_ARCHIVE_BYTES + 1)
        if len(content) > MAX_ARCHIVE_BYTES:
            raise UserError(f"{path}: larger than {MAX_ARCHIVE_BYTES:,} bytes; no file of a release is")
        return content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_records(path: Path, content: bytes, file: ReleaseFile, release: Release) -> tuple[np.ndarray, np.ndarray]:
    """Split a binary file into pixel planes, uint8 (N, 3072), and labels, int64 (N,)."""
    record = release.label_bytes + PIXELS
    if len(content) != file.records * record:
        raise UserError(
            f"{path}: {len(content):,} bytes instead of {file.records * record:,} "
            f"({file.records:,} records of {record:,}); truncated or damaged, get it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(file.records, record)
    return records[:, release.label_bytes :], records[:, int(release.label)].astype(np.int64)


def _read_pickle(path: Path, content: bytes, file: ReleaseFile, release: Release) -> tuple[np.ndarray, np.ndarray]:
    """Unpickle a batch into pixel planes, uint8 (N, 3072), and labels, int64 (N,)."""
    batch = unpickle(path, content)
    planes, labels = batch.get("data"), batch.get(str(release.label))
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape != (file.records, PIXELS):
        shape = getattr(planes, "shape", type(planes).__name__)
        raise UserError(f"{path}: data is {shape} instead of uint8 ({file.records}, {PIXELS}); damaged, get it again")
    if not isinstance(labels, list) or len(labels) != file.records or not all(map(_is_label, labels)):
        raise UserError(f'{path}: "{release.label}" is not a list of {file.records} integers; damaged, get it again')
    return planes, np.array(labels, np.int64)


def _is_label(value: Any) -> bool:
    """Return whether a value is an integer that an array can hold."""
    return type(value) is int and abs(value) < 2**31


def read_names(folder: Path, release: Release) -> list[str]:
    """Return the names of the classes.

    Raises:
        UserError: the file that names them is missing or damaged.
    """
    path = folder / release.names_file
    content = _bytes_of(path)
    if release.layout == "python":
        names = unpickle(path, content).get(NAMES_KEYS[release.kind])
    else:
        names = content.decode("ascii", "replace").split()
    if not isinstance(names, list) or len(names) != release.classes or not all(isinstance(n, str) for n in names):
        raise UserError(f"{path}: does not name {release.classes} classes; damaged, get it again")
    return names


# ------------------------------------------------------------------------------------------------------------- pickles


class _Unpickler(pickle.Unpickler):
    """Knows arrays, dtypes and plain values; refuses everything else, so that no pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which CIFAR does not need")


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """Make the empty array whose contents the pickle then sets."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError("an array of a foreign class")
    return np.ndarray.__new__(np.ndarray, shape, dtype)


def _encode(text: str, encoding: str) -> bytes:
    """Turn text into bytes; the form in which old pickles hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


def unpickle(path: Path, content: bytes) -> dict[str, Any]:
    """Read a pickled dictionary, with text keys, that holds nothing but arrays and plain values.

    Raises:
        UserError: truncated, damaged, or with something else in it.
    """
    import io

    try:
        value = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path}: not a CIFAR pickle ({error or type(error).__name__}); get it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} instead of a dictionary; get it again")
    return {_text(key): [_text(v) for v in item] if isinstance(item, list) else item for key, item in value.items()}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
