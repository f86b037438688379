"""Data that outgrow memory: conversion, and epochs from a disk, beside stock ffcv's writer.

A set of noise images is drawn into a raw store, 20,000 of 64x64 pixels (``--quick``: 1,000), or as many as
``FASTCIFAR_LARGE_IMAGES`` says, in a temporary folder (``TMPDIR``); 300,000 take 20 GB of disk. A cold epoch begins
with the files' pages dropped from the kernel's cache; one that takes long is timed over its first 10 seconds. Epochs in
random order are also read without a word to the kernel, which then reads ahead of every access. Training is a whole
cold epoch of a net that costs next to nothing (large_training.py). From 100,000 images on each side runs once.

For numbers of a machine whose memory is short, run this in a control group with such a limit; the rows then say so.
With control groups of version 2: ``systemd-run --scope -p MemoryMax=2G fastcifar bench large-data``.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import Row, alternate, device, main, result

SIDE_PX, CLASSES, BATCH_SIZE, WORKERS, TEST_IMAGES = 64, 10, 128, 2, 100
FORMATS = {"raw": "torchvision", "ffcv": "ffcv", "dali": "dali"}
STOCK_WRITER = "stock ffcv's DatasetWriter"
PATIENCE_S = 10.0
ONCE = 100_000
"""From so many images on each side runs once."""


def count_of(quick: bool) -> int:
    return int(os.environ.get("FASTCIFAR_LARGE_IMAGES", 1_000 if quick else 20_000))


def drawn_store(folder: Path, count: int) -> Any:
    """Write a raw store of noise images that are never in memory as a whole."""
    from fastcifar.data.formats import Split
    from fastcifar.data.pixels import StoredImages
    from fastcifar.data.sources import DataSet
    from fastcifar.data.store import _write, no_progress

    class Noise(StoredImages):
        def _gather(self, rows: np.ndarray) -> np.ndarray:
            random = np.random.default_rng(int(rows[0]))
            return random.integers(0, 256, (len(rows), *self.shape[1:]), np.uint8)

    splits = {
        name: Split(Noise((n, SIDE_PX, SIDE_PX, 3)), np.arange(n) % CLASSES)
        for name, n in (("train", count), ("test", TEST_IMAGES))
    }
    data = DataSet(splits, [str(k) for k in range(CLASSES)], {"kind": "folder"}, ["noise"])
    return _write(data, "raw", folder / "drawn", no_progress)


# ---------------------------------------------------------------------------------------------------------- conversion


def converted(store: Any, to: str, folder: Path) -> float:
    """Convert into a new store, replacing an older one, and return the images per second, synchronized."""
    import shutil

    from fastcifar.data.store import convert

    shutil.rmtree(folder / to, ignore_errors=True)
    begin = time.perf_counter()
    convert(store, to, folder / to)
    return store.count("train") / (time.perf_counter() - begin)


def stock_converted(store: Any, folder: Path) -> float:
    """Write the training images with stock ffcv's DatasetWriter on all cores, and synchronize the file."""
    from fastcifar.data.loaders.ffcv import kept_threads

    class Indexed:
        def __init__(self) -> None:
            self.split = store.split("train")

        def __len__(self) -> int:
            return len(self.split)

        def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
            return np.asarray(self.split.images[row]), int(self.split.labels[row])

    with kept_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        path = folder / "stock.beton"
        begin = time.perf_counter()
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=os.cpu_count() or 1).from_indexed_dataset(Indexed())
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begin
    path.unlink()
    return store.count("train") / seconds


def conversions(store: Any, folder: Path, formats: Iterable[str], n: int) -> list[Row]:
    """Return the rows of each format's conversion, beside stock ffcv's writer where there is one."""
    sides: dict[str, Callable[[], float]] = {to: lambda to=to: converted(store, to, folder) for to in formats}
    if "ffcv" in sides:
        sides[STOCK_WRITER] = lambda: stock_converted(store, folder)
    measures = alternate(sides, n, warmup=0)
    theirs, told = measures.pop(STOCK_WRITER, None), told_of(store)
    rows = [result(f"convert to {to}: {told}", values, "images/s", theirs and STOCK_WRITER, theirs)
            for to, values in measures.items()]  # fmt: skip
    return rows + ([result(f"{STOCK_WRITER}: {told}", theirs, "images/s")] if theirs else [])


# ------------------------------------------------------------------------------------------------------------- epochs


def drop_cached(folder: Path) -> None:
    """Drop the pages of a store's files from the kernel's cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def epoch_rate(batches: Iterable[Any], cap_s: float = PATIENCE_S) -> float:
    """Return the images per second of an epoch, or of as much of it as there is time for."""
    begin, images = time.perf_counter(), 0
    iterator = iter(batches)
    for batch in iterator:
        images += len(batch.labels) if hasattr(batch, "labels") else len(batch[0]["labels"])
        if time.perf_counter() - begin > cap_s:
            break
    if hasattr(iterator, "close"):
        iterator.close()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


@contextmanager
def silence() -> Iterator[None]:
    """Tell the kernel nothing of the reading to come."""
    from fastcifar.data.loaders import read_ahead

    told = read_ahead.advise, read_ahead.will_need
    read_ahead.advise = read_ahead.will_need = lambda *words: None
    try:
        yield
    finally:
        read_ahead.advise, read_ahead.will_need = told


def reader(store: Any, backend: str, order: str, cold: bool, advice: bool = True) -> Callable[[], float]:
    """Return what times the next epoch of a loader of its own."""
    from fastcifar.config.schema import LoaderConfig
    from fastcifar.data.loaders import build_loader

    config, epochs = LoaderConfig(name=backend, workers=WORKERS, order=order), iter(range(10**9))

    def run() -> float:
        if cold:
            drop_cached(store.root)
        with nullcontext() if advice else silence():
            loader = build_loader(config, store, None, seed=0, batch_size=BATCH_SIZE, drop_last=False, device=device())
            try:
                return epoch_rate(loader.epoch(next(epochs)))
            finally:
                loader.close()

    return run


def epochs(folder: Path, formats: Iterable[str], n: int) -> list[Row]:
    """Return the rows of cold and warm epochs, each in block order beside random order, with advice and without."""
    from fastcifar.data.store import open_store

    rows = []
    for to in formats:
        store, backend = open_store(folder / to), FORMATS[to]
        for heat in ("cold", "warm"):
            sides = {order: reader(store, backend, order, heat == "cold") for order in ("random", "block")}
            if heat == "cold":
                sides["silent"] = reader(store, backend, "random", cold=True, advice=False)
            measures = alternate(sides, n, warmup=int(heat == "warm" and store.count("train") < ONCE))
            told = f"{heat} epoch of {told_of(store)} from {to} ({backend})"
            rows.append(result(f"{told}, random", measures["random"], "images/s"))
            rows.append(result(f"{told}, block", measures["block"], "images/s", "random order", measures["random"]))
            if heat == "cold":
                silent = "random order without advice to the kernel"
                rows.append(result(f"{told}, block", measures["block"], "images/s", silent, measures["silent"]))
    return rows


def told_of(store: Any) -> str:
    """Say how many images a store has, and under what limit of memory they are read, where there is one."""
    from fastcifar.host_memory import group_memory

    limits = [group.limit for group in group_memory()]
    under = f" under {min(limits) / 2**30:.1f} GiB" if limits else ""
    return f"{store.count('train'):,} images of {SIDE_PX}x{SIDE_PX}{under}"


# ------------------------------------------------------------------------------------------------------------- training


def trained(store: Any, backend: str, order: str) -> dict[str, Any]:
    """Train a whole cold epoch in a process of its own.

    Raises:
        CalledProcessError: it did not end normally.
    """
    drop_cached(store.root)
    script = Path(__file__).with_name("large_training.py")
    command = [sys.executable, str(script), str(store.root), backend, order]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=script.parent)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["images"] == store.count("train")
    return report


def trainings(folder: Path, formats: Iterable[str], n: int) -> list[Row]:
    """Return the rows of a whole training epoch from each format, in the order that is planned for it."""
    from fastcifar.data.store import open_store

    rows = []
    for to in formats:
        store = open_store(folder / to)
        orders = ("plan", "native") if to == "dali" else ("plan",)
        for order in orders:
            reports = [trained(store, FORMATS[to], order) for _ in range(n)]
            told = f"training, a cold epoch of {told_of(store)} from {to} ({FORMATS[to]}, {order})"
            rows.append(result(told, [report["images_per_s"] for report in reports], "images/s"))
            memory = [report["bytes"] / 2**20 for report in reports]
            rows.append(result(f"{told}: memory of its processes at most", memory, "MiB"))
    return rows


# ------------------------------------------------------------------------------------------------- beside busy loops


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep this many other processes computing meanwhile."""
    loops = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def gathering(store: Any, threads: int, gather: Callable[[Any], Any]) -> Callable[[], float]:
    """Return what times an epoch of the resident loader whose images are gathered batch by batch."""
    from fastcifar.config.schema import LoaderConfig
    from fastcifar.data.loaders import build_loader

    settings = {"seed": 0, "batch_size": BATCH_SIZE, "drop_last": False, "device": torch.device("cpu")}
    rows = np.arange(min(store.count("train"), 20_000))
    loader, epochs = build_loader(LoaderConfig(name="resident"), store, rows, **settings), iter(range(10**9))

    def run() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            begin = time.perf_counter()
            for batch in loader.epoch(next(epochs)):
                gather(batch)
                if time.perf_counter() - begin > PATIENCE_S:
                    break
            return float(len(rows) / (time.perf_counter() - begin))
        finally:
            torch.set_num_threads(before)

    return run


def beside_busy_loops(store: Any, n: int) -> list[Row]:
    """Return the rows of the resident loader's gather beside two busy loops, against one thread and against torch's."""
    torchs = f"torch's index_select, {os.cpu_count()} threads"
    sides = {
        "ours": gathering(store, os.cpu_count() or 1, lambda batch: batch.gathered()),
        "one thread": gathering(store, 1, lambda batch: batch.gathered()),
        torchs: gathering(store, os.cpu_count() or 1, lambda batch: batch.images.index_select(0, batch.rows)),
    }
    told, rows = "resident, gathered", []
    for where, loops in (("alone", 0), ("beside two busy loops", 2)):
        with busy_loops(loops):
            measures = alternate(sides, n)
        for baseline in ("one thread", torchs):
            name = f"{told} {where}"
            rows.append(result(name, measures["ours"], "images/s", f"{baseline}, {where}", measures[baseline]))
    return rows


def run(quick: bool) -> list[Row]:
    """Measure conversions, epochs, training, and the gather on a busy machine."""
    from fastcifar.data.loaders import PACKAGES, _installed

    formats = [to for to in FORMATS if to not in PACKAGES or _installed(PACKAGES[to][0])]
    n = 1 if quick or count_of(quick) >= ONCE else 3
    with tempfile.TemporaryDirectory(prefix="fastcifar-large-") as name:
        folder = Path(name)
        store = drawn_store(folder, count_of(quick))
        rows = conversions(store, folder, formats, n)
        rows += epochs(folder, formats, n) + trainings(folder, formats, n)
        return rows + beside_busy_loops(store, n)


if __name__ == "__main__":
    main("large-data", run)
