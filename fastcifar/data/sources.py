"""Where images come from: CIFAR-10 and CIFAR-100 releases, image folders, and synthetic images."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.data.formats.raw import Split
from fastcifar.data.images import SUFFIXES, read_rgb
from fastcifar.data.pixels import StoredImages
from fastcifar.data.releases import RELEASES, Release, extracted, read_file, read_names, release_of_archive
from fastcifar.data.synthetic import draw
from fastcifar.errors import UserError

Progress = Callable[[str, int, int], None]
SYNTHETIC_VERSION = "2"
FOLDER_VERSION = 2
"""Of an image folder's fingerprint, and so of what the cache holds of it; the first one missed what links changed."""
SYNTHETIC_COUNTS = {"train": 2000, "test": 1000}


@dataclass(frozen=True)
class DataSet:
    """A whole data set as a source gives it.

    Attributes:
        splits: ``train`` and ``test``.
        classes: the names of the classes, in the order of the labels.
        source: what the manifest says about the origin.
        notes: warnings that belong to the data.
    """

    splits: dict[str, Split]
    classes: list[str]
    source: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True)
class Source:
    """Something to read a data set from.

    Attributes:
        kind: ``cifar10``, ``cifar100``, ``folder`` or ``synthetic``.
        path: the folder or the archive; empty for synthetic.
        release: which release, for CIFAR.
        fingerprint: a hash of the files' paths, sizes and times: a changed file makes another source.
    """

    kind: str
    path: Path
    release: Release | None
    fingerprint: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.kind if self.kind == "synthetic" else str(self.path)

    @classmethod
    def synthetic(cls) -> "Source":
        """Return the source of synthetic images."""
        return cls("synthetic", Path(), None, hashlib.sha256(f"synthetic {SYNTHETIC_VERSION}".encode()).hexdigest())


def known_place(data: Path | None) -> tuple[Path, str]:
    """Return the place to look for data and what named it: ``--data``, ``FASTCIFAR_DATA`` or ``./data``.

    Raises:
        UserError: a place was named that does not exist or cannot be looked at.
    """
    variable = os.environ.get("FASTCIFAR_DATA")
    if data is not None:
        place, why = data, "--data"
    elif variable:
        place, why = _without_tilde(Path(variable)), "FASTCIFAR_DATA"
    else:
        return Path("data"), "./data"
    with readable(place, why):
        if not place.exists():
            raise UserError(f"{place} ({why}): no such file or folder")
    return place, why


def _without_tilde(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path} (FASTCIFAR_DATA): cannot be read: there is no home of {path.parts[0]}") from None


@contextmanager
def readable(place: Path, why: str) -> Iterator[None]:
    """Look for data at a place that somebody named, which the file system may refuse: it may be another user's.

    Raises:
        UserError: it refused.
    """
    try:
        yield
    except OSError as error:
        cure = "make it readable, or name another place"
        raise UserError(f"{place} ({why}): cannot be read: {error.strerror}; {cure}") from None


# ------------------------------------------------------------------------------------------------------------- finding


def find_source(place: Path, kind: str, why: str = "--data") -> Source:
    """Return the source of the given kind at a place: itself, or within it under the release's own name.

    Raises:
        UserError: nothing of the kind there; the message says how to get it.
    """
    with readable(place, why):
        for release, path in _candidates(place, kind):
            return Source(kind, path, release, _fingerprint(path, release))
    missing = f"no {kind} there" if kind != "folder" else f"is not a folder with a {place / 'train'} in it"
    raise UserError(f"{place} ({why}): {missing}; {_cure(kind)}")


def _candidates(place: Path, kind: str) -> Iterator[tuple[Release | None, Path]]:
    if kind == "folder":
        if (place / "train").is_dir():
            yield None, place
        return
    releases = [r for r in RELEASES if r.kind == kind]
    if place.is_file():
        release = release_of_archive(place)
        if release.kind == kind:
            yield release, place
        return
    for release in releases:
        if (place / release.folder).is_dir():
            yield release, place / release.folder
        elif any((place / file.name).is_file() for file in release.all_files):
            yield release, place
    for release in releases:
        if (place / release.archive).is_file():
            yield release, place / release.archive


def _cure(kind: str) -> str:
    if kind == "folder":
        return "an image folder is train/<class>/*.png (or .jpg) and test/<class>/*; name it with --data"
    expected = ", ".join(f"{r.folder}/ or {r.archive}" for r in RELEASES if r.kind == kind)
    return (
        f"expected {expected}, or a store. Download it with `fastcifar data fetch {kind}`, "
        "or name the place with --data or FASTCIFAR_DATA"
    )


def _fingerprint(path: Path, release: Release | None) -> str:
    """Hash the paths, sizes and times of the files that are read: quick, and changed by whatever changes one of them.

    Raises:
        UserError: one of them cannot be looked at.
    """
    files = _files_read(path.resolve(), release) if release else _files_of_folder(path.resolve())
    lines = [f"image folder {FOLDER_VERSION}"] if release is None else []
    try:
        for told, file in files:
            found = os.stat(file)
            lines.append(f"{told} {found.st_size} {found.st_mtime_ns}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _files_read(path: Path, release: Release) -> Iterator[tuple[str, str]]:
    """Yield the files of a release, not others that lie beside them, such as runs; each as told and as it is opened."""
    if path.is_file():
        yield str(path), str(path)
        return
    names = sorted({file.name for file in release.all_files} | {release.names_file})
    for file in (str((path / name).resolve()) for name in names if (path / name).is_file()):
        yield file, file


def _files_of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the files of an image folder, as in `_files_read`.

    What is told of a file is its place in the folder, which decides its label and its row, and where links lead from
    there, which decides its pixels.
    """
    for split in ("test", "train"):
        if (folder / split).is_dir():
            for place, file in _files_under(str(folder / split), os.path.realpath(folder / split), classes=True):
                yield f"{place}\0{file}\0", file


def _files_under(folder: str, real: str, classes: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the files in a folder and below it, by name: the path of each, and the same with links resolved.

    Args:
        folder: where to look.
        real: the same folder, resolved.
        classes: the folders in it are those of classes: images are read from them where they are links, too. Other
            links to folders are not followed.
    """
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        inside = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
        if entry.is_dir(follow_symlinks=classes and not entry.name.startswith(".")):
            yield from _files_under(entry.path, inside)
        elif entry.is_file():
            yield entry.path, inside


# ------------------------------------------------------------------------------------------------------------- reading


def read_source(source: Source, progress: Progress) -> DataSet:
    """Read and check a whole source.

    Raises:
        UserError: a damaged, truncated or missing file, named.
    """
    about = {"kind": source.kind, "path": source.path.name, "fingerprint": source.fingerprint}
    if source.kind == "synthetic":
        splits, classes = draw(SYNTHETIC_COUNTS)
        return DataSet(splits, classes, {**about, "version": SYNTHETIC_VERSION}, ["synthetic images, not photographs"])
    if source.release is None:
        return _read_folder(source.path, about, progress)
    with _release_folder(source.path, source.release, progress) as folder:
        return _read_release(folder, source.release, about, progress)


@contextmanager
def _release_folder(path: Path, release: Release, progress: Progress) -> Iterator[Path]:
    """Yield the folder of a release, extracted into a temporary place where it is an archive."""
    if path.is_dir():
        yield path
        return
    progress(f"extract {path.name}", 0, 1)
    try:
        temporary = tempfile.TemporaryDirectory(prefix="fastcifar-")
    except OSError as error:
        raise UserError(f"{path}: there is no folder to extract it into ({error}); set TMPDIR") from None
    with temporary as folder:
        try:
            yield extracted(path, release, Path(folder))
        except UserError as error:
            # The user knows the archive, not the place where it was extracted.
            raise UserError(str(error).replace(f"{folder}/", f"{path}: ")) from None


def _read_release(folder: Path, release: Release, about: dict[str, Any], progress: Progress) -> DataSet:
    splits: dict[str, Split] = {}
    described: list[dict[str, Any]] = []
    notes: list[str] = []
    classes = read_names(folder, release)
    for split, files in release.files.items():
        parts = []
        for file in files:
            progress(f"read {file.name}", len(described), len(release.all_files))
            part, entry, note = read_file(folder / file.name, file, release)
            parts.append(part)
            described.append(entry)
            notes += [note] if note else []
        splits[split] = Split(np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts]))
    return DataSet(splits, classes, {**about, "release": release.layout, "files": described}, notes)


def _read_folder(folder: Path, about: dict[str, Any], progress: Progress) -> DataSet:
    """Look through ``train/<class>/*`` and ``test/<class>/*``; images are decoded when they are asked for."""
    classes = _class_names(folder / "train")
    test_classes = _class_names(folder / "test")
    unknown = sorted(set(test_classes) - set(classes))
    if unknown:
        raise UserError(f"{folder / 'test' / unknown[0]}: a class that train/ does not have")
    splits = {}
    for k, name in enumerate(("train", "test")):
        progress(f"look through {name}", k, 2)
        splits[name] = _find_images(folder / name, classes)
    shapes = {split.images.shape[1:] for split in splits.values()}
    if len(shapes) > 1:
        raise UserError(f"{folder}: train and test images differ in size: {' and '.join(map(str, shapes))}")
    return DataSet(splits, classes, about, _folder_notes(folder, classes))


def _hidden(path: Path) -> bool:
    """Return whether a file or folder is one that programs put there for themselves."""
    return path.name.startswith(".")


def _folder_notes(folder: Path, classes: list[str]) -> list[str]:
    """Say what of an image folder was left out.

    Raises:
        UserError: a class without training images: nothing could be learnt of it.
    """
    notes = []
    for split in ("train", "test"):
        inside = sorted((folder / split).iterdir())
        notes += [f"{split}/{p.name}: hidden, left out" for p in inside if p.is_dir() and _hidden(p)]
        for name in classes:
            path = folder / split / name
            if not _images_in(path):
                if split == "train":
                    raise UserError(f"{path}: a class folder without images; remove it, or put images there")
                notes.append(f"{split}/{name}: no images of this class")
            others = len([p for p in path.iterdir() if p.suffix.lower() not in SUFFIXES]) if path.is_dir() else 0
            if others:
                notes.append(f"{split}/{name}: {others} files that are not {', '.join(SUFFIXES)}, left out")
    return notes


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UserError(f"{folder}: this folder is missing; an image folder is train/<class>/* and test/<class>/*")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(p))
    if not names:
        raise UserError(f"{folder}: no class folders in it")
    return names


def _find_images(folder: Path, classes: list[str]) -> Split:
    """Return the images of a split, not decoded yet, and their labels."""
    names = [_images_in(folder / name) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(inside) for inside in names])
    if not len(labels):
        raise UserError(f"{folder}: no images in its class folders ({', '.join(SUFFIXES)})")
    return Split(ImageFiles(folder, classes, list(chain.from_iterable(names)), labels), labels)


class ImageFiles(StoredImages):
    """The images of a split as files; they are decoded when they are asked for, on as many threads as there are cores.

    PIL decodes outside Python's lock.

    Args:
        folder: of the split.
        classes: the names of the folders in it.
        names: of the files, without their folders.
        labels: which folder each is in, int64 (N,).
    """

    def __init__(self, folder: Path, classes: list[str], names: list[str], labels: np.ndarray):
        self._folder, self._classes, self._names, self._labels = folder, classes, names, labels
        super().__init__((len(names), *np.asarray(read_rgb(self._path(0))).shape))

    def _path(self, row: int) -> Path:
        return self._folder / self._classes[self._labels[row]] / self._names[row]

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        from concurrent.futures import ThreadPoolExecutor

        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        parts = np.array_split(np.arange(len(rows)), min(len(rows), 4 * (os.cpu_count() or 1)) or 1)
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda part: self._decode(rows[part], images, part), parts):
                pass
        return images

    def _decode(self, rows: np.ndarray, into: np.ndarray, places: np.ndarray) -> None:
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            image = np.asarray(read_rgb(self._path(row)))
            if image.shape != self.shape[1:]:
                raise UserError(
                    f"{self._path(row)}: {image.shape[1]}x{image.shape[0]} pixels, "
                    f"{self._path(0).name} has {self.shape[2]}x{self.shape[1]}; all images must have one size"
                )
            into[place] = image


def _images_in(folder: Path) -> list[str]:
    """Return the names of a folder's images, sorted."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if _is_image(name))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
