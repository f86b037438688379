"""Places for runs side by side on one machine: which CPU threads and which GPU each of them gets.

A run is a process of its own, so its share is a set of environment variables. They are read when numba, OpenMP and
CUDA start, before any line of training, and need nothing from the recipe: the same recipe runs alone or beside others.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

# OpenMP's number is torch's too; numba's bounds the workers of the ffcv loader; Inductor starts compilers of its own.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
NVIDIA_SMI_S = 60.0


class Places:
    """A fixed number of places; a run takes one and gives it back.

    Args:
        jobs: how many; the only place of 1 leaves the environment as it is.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for share in shares(jobs):
            self._free.put(share)

    @contextmanager
    def place(self) -> Iterator[dict[str, str]]:
        """Wait for a free place and return the environment variables to add for the run in it."""
        share = self._free.get()
        try:
            yield share
        finally:
            self._free.put(share)


def shares(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of each of so many places: threads divided, GPUs in turn.

    A number of threads that the user has set stays; one GPU is shared by all places.
    """
    if jobs == 1:
        return [{}]
    threads = str(max(1, usable_cores() // jobs))
    divided = {name: threads for name in THREAD_VARIABLES if name not in os.environ}
    found = gpus()
    turns = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in found] if len(found) > 1 else [{}]
    return [divided | turns[i % len(turns)] for i in range(jobs)]


def usable_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES may tell the GPUs here apart.

    Its own entries where it is set, else what the driver lists: torch, which could say it too, takes seconds to import
    and would hold memory on a GPU for nothing. Empty where there is no driver.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
