"""Images per second of each loader, against stock ffcv, stock DALI and a plain DataLoader on the same images.

The plain one is our reimplementation of the DataLoader in github.com/windopper/cifar, commit 70ec89d.

The first epoch (making the loader, compiling) and the peak memory are measured in a process of their own for each
loader; the steady state alternates between all of them in one process. No augmentation anywhere.

Without CIFAR-10 (``FASTCIFAR_DATA`` or ``./data``) synthetic images are read, which says little about speed; so does
``--quick``, which leaves the first epochs and the memory out too.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from common import THEIR_LOADER, Row, alternate, device, main, result

BATCH_SIZE, WORKERS, PUBLISHED_WORKERS = 128, 2, 4
OURS = ("resident", "ffcv", "dali", "dali native", "torchvision")
BASELINES = {"ffcv": "stock ffcv", "dali": "stock dali", "dali native": "stock dali"}


def find_store(quick: bool = False) -> Any:
    from fastcifar.config.schema import DataConfig
    from fastcifar.data.store import resolve_store
    from fastcifar.errors import UserError

    try:
        return resolve_store(DataConfig(source="synthetic" if quick else "cifar10"))
    except UserError:
        return resolve_store(DataConfig(source="synthetic"))


def ours(name: str, store: Any) -> Callable[[], Iterable[Any]]:
    """Return what starts the next epoch of one of our loaders."""
    from fastcifar.config.schema import LoaderConfig
    from fastcifar.data.loaders import build_loader

    backend, *order = name.split()
    config = LoaderConfig(name=backend, workers=WORKERS, order=order[0] if order else "plan")
    loader = build_loader(config, store, None, seed=0, batch_size=BATCH_SIZE, drop_last=False, device=device())
    epochs = iter(range(10**9))
    if backend != "resident":
        return lambda: loader.epoch(next(epochs))
    # The resident loader hands over rows; to be compared with the others its images are gathered here.
    return lambda: (batch.gathered() for batch in loader.epoch(next(epochs)))


def stock_ffcv(store: Any) -> Callable[[], Iterable[Any]]:
    """Stock ffcv as its documentation shows it, in random order, to torch tensors."""
    from fastcifar.data.loaders.ffcv import kept_threads
    from fastcifar.data.store import store_as

    with kept_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ffcv.loader import Loader, OrderOption

        path = store_as(store, "ffcv").root / "train.beton"
        settings = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": False}
        loader = Loader(str(path), batch_size=BATCH_SIZE, num_workers=WORKERS, seed=0, **settings)
    return lambda: iter(loader)


def stock_dali(store: Any) -> Callable[[], Iterable[Any]]:
    """DALI's WebDataset reader with its torch iterator, shuffling in a buffer of 4,096 samples."""
    import torch
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    from fastcifar.data.store import store_as

    root = store_as(store, "dali").root
    shards = sorted(str(p) for p in root.glob("train-*.tar"))
    on_gpu = torch.cuda.is_available()

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=WORKERS, device_id=0 if on_gpu else None, seed=0)
    def pipeline() -> Any:
        images, labels, indices = fn.readers.webdataset(
            paths=shards,
            index_paths=[p.removesuffix(".tar") + ".idx" for p in shards],
            ext=["img", "cls", "idx"],
            dtypes=[types.UINT8, types.UINT8, types.INT64],  # labels are text
            random_shuffle=True,
            initial_fill=4096,
            pad_last_batch=True,
            name="reader",
        )
        outputs = fn.reshape(images, shape=[32, 32, 3]), labels, indices
        return tuple(o.gpu() for o in outputs) if on_gpu else outputs

    names, policy = ["images", "labels", "indices"], LastBatchPolicy.PARTIAL
    iterator = DALIGenericIterator(pipeline(), names, reader_name="reader", last_batch_policy=policy, auto_reset=True)
    return lambda: iterator


def published(store: Any) -> Callable[[], Iterable[Any]]:
    """The CIFAR10 data set of torchvision to normalized tensors, in a DataLoader with four workers."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Images(Dataset):
        """What torchvision.datasets.CIFAR10 does per image."""

        def __init__(self) -> None:
            split = store.split("train")
            self.data, self.targets = split.images, split.labels.tolist()
            normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
            self.transform = transforms.Compose([transforms.ToTensor(), normalize])

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> Any:
            return self.transform(Image.fromarray(self.data[index])), self.targets[index]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pinned = torch.cuda.is_available()
        loader = DataLoader(
            Images(), batch_size=BATCH_SIZE, shuffle=True, num_workers=PUBLISHED_WORKERS, pin_memory=pinned
        )
    return lambda: loader


def starter(name: str, store: Any) -> Callable[[], Iterable[Any]]:
    """Return what starts an epoch of the named side."""
    others = {"stock ffcv": stock_ffcv, "stock dali": stock_dali, THEIR_LOADER: published}
    return others[name](store) if name in others else ours(name, store)


def sides() -> list[str]:
    """Return the names of the loaders that can run here."""
    from fastcifar.data.loaders import PACKAGES, _installed

    missing = {name for name, (module, _) in PACKAGES.items() if not _installed(module)}
    every = [*OURS, "stock ffcv", "stock dali", THEIR_LOADER]
    return [side for side in every if not missing & set(side.split())]


def images_per_s(start: Callable[[], Iterable[Any]], count: int) -> float:
    """Time one whole epoch."""
    import torch

    from fastcifar.data.loaders.ffcv import kept_threads

    # Stock ffcv leaves torch with another number of threads, which would be the next side's.
    with kept_threads(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba's and the DataLoader's advice
        begin = time.perf_counter()
        for _ in start():
            pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return count / (time.perf_counter() - begin)


def probe(name: str, what: str) -> None:
    """Print the seconds of one loader's first epoch, or the peak of its memory; the process is its alone."""
    import torch  # noqa: F401  (its import is not part of a loader's first epoch)

    store = find_store()
    with peak_memory() if what == "memory" else nullcontext([0.0]) as peak:
        begin = time.perf_counter()
        if name != "nothing":
            images_per_s(starter(name, store), store.count("train"))
        seconds = time.perf_counter() - begin
    print(json.dumps(peak[0] if what == "memory" else seconds))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Watch this process and its workers; element 0 becomes the largest sum of their proportional shares, in MiB.

    Proportional shares (PSS), because forked workers share most of their pages, and ``ru_maxrss`` would begin with
    what the parent process once held.
    """
    peak, done = [shares_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], shares_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def shares_mib() -> float:
    """Return the proportional share of memory of this process and its children, in MiB."""
    total = 0
    for process in [os.getpid(), *(p.pid for p in multiprocessing.active_children())]:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def probed(name: str, what: str, n: int) -> list[float]:
    """Return n measures of `probe`, each from a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--probe", name, what]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(n)]
    return [float(json.loads(output.splitlines()[-1])) for output in outputs]


def first_epochs(names: list[str]) -> list[Row]:
    """Return rows of the first epoch's seconds and the peak memory of each loader."""
    seconds = [result(f"{name}: first epoch, made and compiled", probed(name, "seconds", 3), "s") for name in names]
    memory = [result(f"{name}: peak memory with workers", probed(name, "memory", 2), "MiB") for name in names]
    return [*seconds, result("torch alone: memory", probed("nothing", "memory", 2), "MiB"), *memory]


def run(quick: bool) -> list[Row]:
    """Measure the steady state of all sides in turn, then, unless quick, first epochs and memory."""
    store, names = find_store(quick), sides()
    count, kind = store.count("train"), store.manifest.source.kind
    starts = {name: starter(name, store) for name in names}
    measures = alternate({name: lambda s=s: images_per_s(s, count) for name, s in starts.items()}, 1 if quick else 5)
    rows = []
    for name in names:
        baseline = BASELINES.get(name, None if name == THEIR_LOADER else THEIR_LOADER)
        told = f"{name}: epochs of {count:,} {kind} images"
        rows.append(result(told, measures[name], "images/s", baseline, measures.get(baseline)))
    return rows if quick else rows + first_epochs(names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--probe"]:
        probe(sys.argv[2], sys.argv[3])
    else:
        main("loaders", run)
