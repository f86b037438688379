"""One training epoch over a store, in a process of its own: the part of large_data.py that a kernel may end.

``python benchmarks/large_training.py STORE LOADER ORDER`` prints a JSON object: the images per second of the epoch,
the memory that the process and its workers had at most, in bytes, and the order and why. Memory is what nobody can take
back: pages of mapped files are not counted, since the kernel drops them where others need the room.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

BATCH_SIZE, WORKERS = 256, 2


class Strided(nn.Module):
    """A net that costs next to nothing, so that the loader is what takes the time: every pixel once, then a line."""

    def __init__(self, num_classes: int, image_px: int):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16 * (image_px // 8) ** 2, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, S, S) to logits (B, num_classes)."""
        return self.head(torch.relu(self.conv(images)).flatten(1))


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Watch the anonymous memory of this process and its children; element 0 becomes the largest sum, in bytes.

    Proportional shares, because forked workers share most of it.
    """
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            processes = [os.getpid(), *(p.pid for p in multiprocessing.active_children() if p.pid)]
            peak[0] = max(peak[0], sum(anonymous_bytes(process) for process in processes))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous_bytes(process: int) -> int:
    """Return the memory of a process that lies in no file, in bytes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def epoch(store: Path, backend: str, order: str) -> dict[str, float | str]:
    """Train an epoch and return what is printed."""
    from fastcifar import load_recipe, train

    changes = {
        "data.source": "folder", "data.subset": 0, "data.test_subset": 0,
        "data.loader": {"name": backend, "workers": WORKERS, "order": order}, "augment": [],
        "model": {"name": "large_training:Strided"}, "train.epochs": 1, "train.batch_size": BATCH_SIZE,
        "engine.precision": "fp32", "engine.mode": "eager",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, own_memory() as peak:
        run = train(load_recipe("smoke", changes), data=store, out=Path(folder) / "run", quiet=True)
        summary = run.summary
    return {"images_per_s": summary["images_per_s"], "images": summary["images"], "bytes": peak[0]}


if __name__ == "__main__":
    print(json.dumps(epoch(Path(sys.argv[1]), *sys.argv[2:])))
