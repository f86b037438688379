"""Seconds from the command to the last summary of several seeds of LeNet-5, by three ways to train them.

One after the other, a process each; side by side, a process each, which divide the cores; and in one process, taking
turns (``fastcifar run --seeds``). The start of Python, imports, reading the data and evaluation count. Once for a short
run and once for a longer one, because what one process saves are starts. Without CIFAR-10 (``FASTCIFAR_DATA`` or
``./data``) the synthetic images are used.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Row, alternate, main, result
from fastcifar.config.schema import DataConfig
from fastcifar.data.store import resolve_store
from fastcifar.errors import UserError

FIRST = 42
APART, ABREAST, TOGETHER = "one after the other, a process each", "side by side, a process each", "in one process"


def run(quick: bool) -> list[Row]:
    seeds, rounds, epochs = (2, 1, (1,)) if quick else (3, 3, (1, 3))
    started([words_of(1, quick=True)])  # compiles what all of them find in the cache
    return [row for number in epochs for row in compared(seeds, number, rounds, quick)]


def compared(seeds: int, epochs: int, rounds: int, quick: bool) -> list[Row]:
    """Return the rows of a length of training: each way's seconds, and how much faster one process is."""
    words = words_of(epochs, quick)
    sides = {APART: lambda: apart(words, seeds), ABREAST: lambda: abreast(words, seeds),
             TOGETHER: lambda: together(words, seeds)}  # fmt: skip
    measures = alternate(sides, rounds, warmup=0)
    what = f"{seeds} seeds, {epochs} epoch{'s' * (epochs > 1)}"
    rows = [result(f"{what}, {name}", measures[name], "s", higher_is_better=False) for name in (APART, ABREAST)]
    ours = f"{what}, {TOGETHER}"
    return rows + [
        result(ours, measures[TOGETHER], "s", other, measures[other], higher_is_better=False)
        for other in (APART, ABREAST)
    ]


def words_of(epochs: int, quick: bool) -> list[str]:
    """Return the command that all ways share."""
    recipe = "smoke/lenet5" if quick else "lenet5"
    settings = [f"data.source={source_of(quick)}", f"train.epochs={epochs}"]
    return ["run", recipe, "--quiet", *(word for setting in settings for word in ("--set", setting))]


def source_of(quick: bool) -> str:
    """Return where images come from: CIFAR-10 where it is, else the synthetic ones."""
    if quick:
        return "synthetic"
    try:
        resolve_store(DataConfig(source="cifar10"))
    except UserError:
        return "synthetic"
    return "cifar10"


def apart(words: list[str], seeds: int) -> float:
    """Train the seeds one after the other and return the seconds."""
    return sum(started([[*words, "--set", f"seed={FIRST + number}"]]) for number in range(seeds))


def abreast(words: list[str], seeds: int) -> float:
    """Train the seeds at once in processes that divide the cores and return the seconds."""
    return started([[*words, "--set", f"seed={FIRST + number}"] for number in range(seeds)])


def together(words: list[str], seeds: int) -> float:
    """Train the seeds in one process and return the seconds."""
    return started([[*words, "--set", f"seed={FIRST}", "--seeds", str(seeds)]])


def started(commands: list[list[str]]) -> float:
    """Start commands at once, in a folder that is thrown away, and return the seconds until the last has ended.

    Raises:
        subprocess.CalledProcessError: one of them failed.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(commands)))
    environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "fastcifar", *words, "--out", str(Path(folder) / str(number))], env=environment
            )
            for number, words in enumerate(commands)
        ]
        for process in processes:
            if status := process.wait():
                raise subprocess.CalledProcessError(status, "fastcifar run")
        return time.perf_counter() - begin


if __name__ == "__main__":
    main("seeds", run)
