"""The data set on disk: a folder of one format with a manifest that knows every byte of it.

A store is made once, from a source (`fastcifar.data.sources`) or from another store, and appears whole or not at
all: it is written under a temporary name, synchronized and renamed.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar import __version__
from fastcifar.cache import cache_folder
from fastcifar.config.schema import DataConfig
from fastcifar.console import say
from fastcifar.data import formats, manifest
from fastcifar.data.formats import Split
from fastcifar.data.formats.journal import Journal
from fastcifar.data.formats.target import Hashing, Target
from fastcifar.data.manifest import CURE, FileEntry, Manifest, Origin, SplitEntry, read_manifest
from fastcifar.data.part_folder import whole_or_nothing
from fastcifar.data.pixels import Continued, Images, Passing, Pieces, chunks
from fastcifar.data.sources import DataSet, Source, find_source, known_place, read_source, readable
from fastcifar.errors import UserError

__all__ = ["FORMATS", "Split", "Store", "convert", "open_store", "resolve_store", "store_as", "verify"]

FORMATS = ("raw", "ffcv", "dali")
MANIFEST = manifest.NAME
Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` while a store is written or checked."""


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Store:
    """An opened store.

    Attributes:
        root: its folder.
        manifest: what it holds.
        made_from: what somebody named, of which the cache holds this store; empty for one that was named itself.
    """

    root: Path
    manifest: Manifest
    made_from: str = ""

    @property
    def name(self) -> str:
        """What messages call it: a path that the reader has given, not one in the cache."""
        return self.made_from or str(self.root)

    @property
    def format(self) -> str:
        """``raw``, ``ffcv`` or ``dali``."""
        return self.manifest.format

    @property
    def classes(self) -> list[str]:
        """The names of the classes; a label is a position in this list."""
        return list(self.manifest.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image, in pixels."""
        height, width, channels = self.manifest.image_shape
        return height, width, channels

    @property
    def notes(self) -> list[str]:
        """What a reader of results should know about this data (a file that is not the official one, say)."""
        return list(self.manifest.notes)

    def count(self, split: str) -> int:
        """Return the number of images in ``train`` or ``test``."""
        return self.manifest.splits[split].count

    def split(self, split: str) -> Split:
        """Return the images and labels of ``train`` or ``test``; the images are memory-mapped, in every format.

        Raises:
            UserError: a file that does not hold what the manifest says, or a label that is no class.
        """
        read: Split = self._read(formats.READERS, split)
        self._check_labels(split, read.labels)
        return read

    def labels(self, split: str) -> np.ndarray:
        """Return the labels of ``train`` or ``test`` alone, without reading images: int64 (N,).

        Raises:
            UserError: as `split`.
        """
        labels: np.ndarray = self._read(formats.LABEL_READERS, split)
        self._check_labels(split, labels)
        return labels

    def check_split(self, split: str) -> None:
        """Hash the files of a split, for whoever reads all of it anyway.

        Raises:
            UserError: a damaged file, named.
        """
        for name, file in self.manifest.files.items():
            if name.startswith(split):
                _check_hash(self.root / name, file.sha256)

    def _read(self, readers: Mapping[str, Callable[..., Any]], split: str) -> Any:
        try:
            return readers[self.format](self.root, split, self.count(split), self.image_shape)
        except (OSError, ValueError, OverflowError, MemoryError, IndexError) as error:
            raise UserError(f"{self.root}: {split} cannot be read ({error}); {CURE}") from None

    def _check_labels(self, split: str, labels: np.ndarray) -> None:
        """Refuse labels that are no position in the list of classes: an index beyond it, or one that losses ignore."""
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classes)))
        if len(wrong):
            raise UserError(
                f"{self.root}: image {wrong[0]} of {split} has label {labels[wrong[0]]}, "
                f"not in 0..{len(self.classes) - 1}; {CURE}"
            )


# ------------------------------------------------------------------------------------------------------------ opening


def open_store(root: Path) -> Store:
    """Open a store and check that all its files are there and unchanged.

    Hashing reads every byte, so it is done once for each file as it lies there and remembered in the cache, with the
    file's size, times and inode; `verify` hashes always.

    Raises:
        UserError: no store, a manifest that is damaged or of another version, a missing or damaged file.
    """
    store = Store(root, read_manifest(root / MANIFEST))
    known = _Remembered(store)
    try:
        for name, file in store.manifest.files.items():
            _check_size(root / name, file)
            if not known.look(name):
                _check_hash(root / name, file.sha256)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read: {error.strerror}") from None
    known.save()
    return store


def _check_size(path: Path, file: FileEntry) -> None:
    if not path.is_file():
        raise UserError(f"{path}: this file of the store is missing; {CURE}")
    size = path.stat().st_size
    if size != file.bytes:
        raise UserError(f"{path}: {size:,} bytes instead of {file.bytes:,} (truncated?); {CURE}")


# A file system's clock may move in ticks of up to 10 ms: what is written twice within one of them looks the same after.
TICK_NS = 20_000_000


class _Remembered:
    """Which files of a store were found to have the right hash, and what they looked like before they were hashed."""

    def __init__(self, store: Store):
        key = hashlib.sha256(f"{store.root.resolve()} {store.manifest.digest}".encode()).hexdigest()
        self._store, self._path = store, cache_folder() / "verified" / f"{key}.json"
        self._began, self._seen = time.time_ns(), dict[str, list[int]]()
        try:
            self._known = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            self._known = None

    def look(self, name: str) -> bool:
        """Look at a file, before it is hashed, and return whether it looks as it did when its hash was right."""
        look = self._seen[name] = _looks(self._store.root / name)
        return isinstance(self._known, dict) and self._known.get(name) == look

    def save(self) -> None:
        """Remember that all files that were looked at are right, but for those that were changed only just now.

        A cache that cannot be written costs only time.
        """
        looks = {name: look for name, look in self._seen.items() if look[2] < self._began - TICK_NS}
        if looks == self._known:
            return
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(looks))
            part.replace(self._path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _looks(path: Path) -> list[int]:
    """Return a file's size, times and inode: the time of the inode cannot be set back by a program."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def is_store(path: Path) -> bool:
    """Return whether a folder looks like a store."""
    return (path / MANIFEST).is_file()


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the hash of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    if hash_file(path) != expected:
        raise UserError(f"{path}: damaged (its SHA-256 differs from the manifest's); {CURE}")


def verify(root: Path, progress: Progress = no_progress) -> Store:
    """Check every byte of a store against its manifest, what the manifest says of it, and that it holds nothing else.

    Raises:
        UserError: the first damaged, missing or foreign file, named.
    """
    store = Store(root, read_manifest(root / MANIFEST))
    files, known = store.manifest.files, _Remembered(store)
    for done, (name, file) in enumerate(files.items()):
        progress(f"verify {name}", done, len(files))
        _check_size(root / name, file)
        known.look(name)
        _check_hash(root / name, file.sha256)
    progress("verify", len(files), len(files))
    foreign = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} - files.keys() - {MANIFEST}
    if foreign:
        raise UserError(f"{root / min(foreign)}: this file does not belong to the store; remove it")
    splits = {name: store.split(name) for name in ("train", "test")}
    if content_hash(DataSet(splits, store.classes, {}, [])) != store.manifest.content:
        raise UserError(f"{root / MANIFEST}: classes, labels or pixels are not those that it names; {CURE}")
    known.save()
    return store


# ------------------------------------------------------------------------------------------------------------ writing


class _Content:
    """A hash of classes, shapes, labels and pixels: equal data sets are equal in every format.

    Splits come in the order of their names, and each split's images from front to back.
    """

    def __init__(self, classes: list[str]):
        self._hashing = Hashing()
        self._hashing.update(json.dumps(classes).encode())

    def begin(self, name: str, split: Split) -> None:
        """Begin a split."""
        self._hashing.update(f"{name} {split.images.shape}".encode())
        self._hashing.update(np.ascontiguousarray(split.labels, dtype="<i8").data)

    def images(self, images: np.ndarray) -> None:
        """Take the next images of the split."""
        self._hashing.update(np.ascontiguousarray(images).data)

    def hexdigest(self) -> str:
        """Return the hash, after the last split."""
        return self._hashing.hexdigest()

    def close(self) -> None:
        """End the hashing thread."""
        self._hashing.close()


def content_hash(data: DataSet, progress: Progress = no_progress) -> str:
    """Return the hash of a data set's classes, shapes, labels and pixels, reading it once."""
    with closing(_Content(data.classes)) as content:
        for name, split in sorted(data.splits.items()):
            content.begin(name, split)
            for first, images in chunks(split.images):
                content.images(images)
                progress(f"check {name}", first + len(images), len(split))
        return content.hexdigest()


def convert(source: Source | Store, to: str, out: Path, progress: Progress = no_progress) -> tuple[Store, bool]:
    """Write a data set as a store, a few MiB at a time, however large it is.

    Args:
        source: what to read.
        to: ``raw``, ``ffcv`` or ``dali``.
        out: the folder to make.
        progress: told of each step.

    Returns:
        The store, and whether it had to be written (False: it was there already, with the same content).

    Raises:
        UserError: a damaged source, or ``out`` holds something else.
    """
    if is_store(out):
        same = _same_source(out, source, to)
        if same is not None:
            return same, False
    else:
        _check_place(out)
    data = _as_data_set(source, progress)
    if is_store(out):
        there = open_store(out)
        if there.format == to and there.manifest.content == content_hash(data, progress):
            return there, False
        raise _other_content(out)
    named = source.manifest.content if isinstance(source, Store) else source.fingerprint
    return _write(data, to, out, progress, f"{to} {manifest.VERSION} {__version__} {named}")


def _check_place(out: Path) -> None:
    """Refuse a place that cannot become a store, before anything is read."""
    try:
        if not out.exists():
            return
        if not out.is_dir() or any(out.iterdir()):
            raise _other_content(out)
        what = "mount point" if os.path.ismount(out.resolve()) else "working directory"
        if what == "mount point" or out.samefile(Path.cwd()):
            raise UserError(f"{out}: a store cannot take the place of a {what}; name a new folder in it with --out")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder with --out") from None


def _other_content(out: Path) -> UserError:
    return UserError(f"{out}: already there, with other content; remove it or choose another folder with --out")


def _same_source(out: Path, source: Source | Store, to: str) -> Store | None:
    """Return the store at ``out`` when its manifest says that it was made from this source, unchanged since."""
    store = open_store(out)
    same = (
        store.manifest.content == source.manifest.content
        if isinstance(source, Store)
        else store.manifest.source.fingerprint == source.fingerprint
    )
    return store if same and store.format == to else None


def _as_data_set(source: Source | Store, progress: Progress) -> DataSet:
    if isinstance(source, Source):
        return read_source(source, progress)
    splits = {name: source.split(name) for name in source.manifest.splits}
    return DataSet(splits, source.classes, source.manifest.source.model_dump(), source.notes)


def _write(data: DataSet, to: str, out: Path, progress: Progress, key: str = "") -> tuple[Store, bool]:
    """Write a data set; its content and its files are hashed while they are written, and not read again.

    Args:
        data: what to write.
        to: the format.
        out: the folder to make.
        progress: told of each step.
        key: names data and format: what a killed conversion of the same key left is gone on with. Empty: from the
            beginning.

    Returns:
        The store, and whether it is this one: False where another process made an equal one there meanwhile.

    Raises:
        UserError: it cannot be written, or another process put something else there meanwhile.
    """
    with (
        whole_or_nothing(out, key) as folder,
        closing(_Content(data.classes)) as content,
        closing(Journal(folder, key, progress)) as journal,
    ):
        target = Target(folder, journal)
        ends = {name: kept.end for name, kept in journal.kept.items()}
        for name, split in sorted(data.splits.items()):
            progress(f"write {name} as {to}", 0, len(split.labels))
            content.begin(name, split)
            images: Images = split.images
            if there := formats.KEPT_IMAGES[to](folder, name, images.shape, ends):
                images = Continued(Pieces(there, (sum(map(len, there)), *images.shape[1:])), images)
            formats.WRITERS[to](Split(Passing(images, content.images), split.labels), target, name, progress)
        written = Manifest(
            format=to,  # type: ignore[arg-type]
            source=Origin(**data.source),
            content=content.hexdigest(),
            classes=data.classes,
            image_shape=[int(side) for side in data.splits["train"].images.shape[1:]],
            splits={name: SplitEntry(count=len(split)) for name, split in data.splits.items()},
            notes=data.notes,
            files={name: _describe(folder / name, digest) for name, digest in sorted(target.hashes.items())},
        )
        journal.remove()
        written.write(folder)
    store = Store(out, read_manifest(out / MANIFEST))
    if store.manifest != written:  # another process made it meanwhile
        if (store.format, store.manifest.content) != (to, written.content):
            raise _other_content(out)
        return open_store(out), False
    known = _Remembered(store)
    for name in written.files:
        known.look(name)
    known.save()
    return store, True


def _describe(path: Path, sha256: str) -> FileEntry:
    found = path.stat()
    return FileEntry(bytes=found.st_size, sha256=sha256, mtime_ns=found.st_mtime_ns)


# ---------------------------------------------------------------------------------------------------------- resolving


def store_as(source: Source | Store, to: str, progress: Progress = no_progress) -> Store:
    """Return a data set as a store of the given format, converted once into the cache where it is not one yet."""
    if isinstance(source, Store):
        if source.format == to:
            return source
        name, key, given = source.manifest.source.kind, source.manifest.content, source.name
    else:
        name, key, given = source.kind, source.fingerprint, source.name
    place = _cached(name, to, key)
    try:
        store = convert(source, to, place, progress)[0]
    except UserError:
        if not _remove_damaged(place):
            raise
        store = convert(source, to, place, progress)[0]
    return replace(store, made_from=given)


def _remove_damaged(place: Path) -> bool:
    """Remove a store from the cache, and say so, where it is damaged or of another version.

    Returns:
        Whether to convert again: nothing damaged is left there.

    Raises:
        UserError: it cannot be removed.
    """
    if not place.is_dir():
        return False
    with _alone(place.parent):
        try:
            open_store(place)
            return False
        except UserError as error:
            reason = str(error).removesuffix(f"; {CURE}")
        if place.exists():  # else another process removed it while this one waited
            say((f"note: {reason}; this store in the cache is removed and made again", "yellow"))
            try:
                shutil.rmtree(place)
            except OSError as error:
                raise UserError(f"{place}: damaged, and cannot be removed ({error}); remove it") from None
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, waiting for it: a store that another process has just made again is not damaged."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def converted(source: Source) -> Store | None:
    """Return a source as the store that an earlier run made of it in the cache, or None.

    One that is damaged is none: the next run makes it again.
    """
    for to in FORMATS:
        folder = _cached(source.kind, to, source.fingerprint)
        with suppress(UserError):
            if is_store(folder):
                return open_store(folder)
    return None


def _cached(name: str, to: str, key: str) -> Path:
    return cache_folder() / f"{name}-{to}-v{manifest.VERSION}-{key[:16]}"


def resolve_store(
    config: DataConfig,
    data: Path | None = None,
    *,
    need: tuple[str, ...] = FORMATS,
    progress: Progress = no_progress,
) -> Store:
    """Find the data of a recipe: ``--data``, else ``FASTCIFAR_DATA``, else ``./data``; synthetic data is made.

    A place may be a store, a release (folder or archive), an image folder, or a folder that holds one of them. What
    is not a store is converted once to ``need[0]`` in the cache. Nothing is downloaded here.

    Args:
        config: the recipe's data section; ``source`` says what is looked for.
        data: the value of ``--data``.
        need: the formats that will do.
        progress: told of a conversion's steps.

    Raises:
        UserError: no such data anywhere (the message says how to get it), or it is damaged.
    """
    kind = kind_of(config.source, data)
    if kind == "synthetic":
        if data is not None:
            raise UserError(
                f'--data {data}: the recipe draws its images (data.source = "synthetic"); leave --data away, or name '
                "what is there: --set data.source=cifar10"
            )
        return store_as(Source.synthetic(), need[0], progress)
    found = locate(kind, data)
    if isinstance(found, Store) and found.format in need:
        return found
    return store_as(found, need[0], progress)


def kind_of(source: str, data: Path | None = None) -> str:
    """Return what ``data.source`` means here: itself, and for ``cifar10-or-synthetic`` one of the two.

    Only where there is no place to look at all is it synthetic; a named place without CIFAR-10 stays an error.
    """
    if source != "cifar10-or-synthetic":
        return source
    place = data or os.environ.get("FASTCIFAR_DATA") or Path("data").exists()
    return "cifar10" if place else "synthetic"


def locate(kind: str, data: Path | None = None) -> Source | Store:
    """Return the store or the source of the given kind at the first place of the documented order that is set.

    Raises:
        UserError: nothing there, or it is damaged.
    """
    place, why = known_place(data)
    with readable(place, why):
        stores = [place, *(place / f"{kind}-{to}" for to in FORMATS)]
        found = next((folder for folder in stores if is_store(folder)), None)
    if found == place:
        store = open_store(place)
        found_kind = store.manifest.source.kind
        if kind != found_kind:
            raise UserError(f'{place} ({why}): a store of "{found_kind}"; the recipe wants data.source = "{kind}"')
        return store
    return find_source(place, kind, why) if found is None else open_store(found)
