"""Small data sets in every published form, made by formulations of their own (records byte by byte)."""

import dataclasses
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data import releases, sources
from fastcifar.data.releases import RELEASES, Release

TRAIN, TEST = 30, 20
NAMES = {"cifar10": [f"class{k}" for k in range(10)], "cifar100": [f"fine{k}" for k in range(100)]}


def small(release: Release) -> Release:
    """The same release with few images a file and without official hashes."""
    count = {"train": TRAIN, "test": TEST}
    files = {
        split: tuple(dataclasses.replace(f, records=count[split], md5="0" * 32) for f in files)
        for split, files in release.files.items()
    }
    return dataclasses.replace(release, files=files)


def use_small_releases(patch: pytest.MonkeyPatch) -> dict[tuple[str, str], Release]:
    """Make the package expect small releases; return them by (kind, layout)."""
    smalls = tuple(small(r) for r in RELEASES)
    patch.setattr(sources, "RELEASES", smalls)
    patch.setattr(releases, "RELEASES", smalls)
    return {(r.kind, r.layout): r for r in smalls}


def write_release(folder: Path, release: Release, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a release with random images; return the true (images NHWC, labels) of each split."""
    random = np.random.default_rng(seed)
    folder = folder / release.folder
    folder.mkdir(parents=True)
    truth = {}
    for split, files in release.files.items():
        images, labels = [], []
        for file in files:
            image = random.integers(0, 256, (file.records, 32, 32, 3), np.uint8)
            label = random.integers(0, release.classes, file.records).tolist()
            (folder / file.name).write_bytes(_content(image, label, release))
            images.append(image)
            labels += label
        truth[split] = np.concatenate(images), np.array(labels)
    names = NAMES[release.kind]
    key = "label_names" if release.kind == "cifar10" else "fine_label_names"
    content = pickle.dumps({key: names}, 2) if release.layout == "python" else "\n".join([*names, ""]).encode()
    (folder / release.names_file).write_bytes(content)
    return truth


def _content(images: np.ndarray, labels: list[int], release: Release) -> bytes:
    planes = [[image[:, :, c].tobytes() for c in range(3)] for image in images]
    if release.layout == "binary":
        coarse = [7] if release.label_bytes == 2 else []
        return b"".join(bytes([*coarse, k]) + b"".join(p) for k, p in zip(labels, planes, strict=True))
    data = np.array([list(b"".join(p)) for p in planes], np.uint8)
    # Keys as bytes, as Python 2 wrote them, in one of the two data sets.
    key = b"labels" if release.kind == "cifar10" else "fine_labels"
    return pickle.dumps({key: labels, (b"data" if isinstance(key, bytes) else "data"): data}, 2)


def pack(folder: Path, release: Release) -> Path:
    """Make the release's archive beside its folder."""
    path = folder / release.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / release.folder, release.folder)
    return path


def evil_archive(path: Path, release: Release, member: str) -> None:
    """Make an archive with a member that wants to leave the folder."""
    with tarfile.open(path, "w:gz") as archive:
        for name in (f"{release.folder}/data_batch_1", member):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
