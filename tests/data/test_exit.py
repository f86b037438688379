"""However a program ends, no loader leaves a message, a worker or a changed setting behind."""

import os
import signal
import subprocess
import sys

import pytest

from fastcifar.data import loaders

MODULES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
START = """
import signal, sys, threading, time
import torch
from fastcifar.data.loaders import build_loader
from fastcifar.data.store import resolve_store
from fastcifar.config.schema import DataConfig, LoaderConfig

# A parent that runs in the background may have handed down that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
threads = torch.get_num_threads()
loaders = [
    build_loader(
        LoaderConfig(name=name, workers=2), resolve_store(DataConfig(source="synthetic")), None,
        seed=0, batch_size=10, drop_last=False, device=torch.device("cpu"),
    )
    for name in {names}
]
if "ffcv" in {names}:  # which has started numba's threads: TBB's have hung at the end of a process
    import importlib.util, numba
    openmp = importlib.util.find_spec("numba.np.ufunc.omppool") is not None
    assert not openmp or numba.threading_layer() == "omp", numba.threading_layer()
"""
EXCEPTION = """
abandoned = []
for loader in loaders:
    for batch in loader.epoch(0):
        break
    abandoned.append(loader.epoch(1))
    next(abandoned[-1])
    assert torch.get_num_threads() == threads
    try:
        for batch in loader.epoch(2):
            raise ValueError("the training loop failed")
    except ValueError:
        if loader is loaders[-1]:
            raise
"""
FOREVER = """
def epochs():
    for epoch in range(10**6):
        for batch in loaders[0].epoch(epoch):
            yield batch
for step, batch in enumerate(epochs()):
    if step == 20:
        print("training", flush=True)
    time.sleep(0.002)
"""


def installed(name: str) -> bool:
    return name not in MODULES or loaders._installed(MODULES[name])


def start(names: list[str], script: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", START.format(names=names) + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def check(process: subprocess.Popen, last_line: str) -> None:
    """The program's own traceback is all that stands on stderr, and nobody of its session lives on."""
    _, errors = process.communicate(timeout=500)
    lines = errors.strip().splitlines()
    assert lines, "no traceback at all"
    assert lines[0] == "Traceback (most recent call last):", errors
    assert lines[-1] == last_line, errors
    assert sum(line.startswith("Traceback") for line in lines) == 1, errors
    assert not any(word in errors for word in ("Exception ignored", "Fatal", "terminate called", "leaked")), errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_abandoned_epochs_and_an_exception(cache):
    """All loaders in one process, because importing them takes longest."""
    names = [name for name in ("resident", "ffcv", "dali", "torchvision") if installed(name)]
    with start(names, EXCEPTION) as process:
        check(process, "ValueError: the training loop failed")
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["ffcv", "dali", "torchvision"])
def test_ctrl_c(cache, name):
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    with start([name], FOREVER) as process:
        assert process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group, workers included
        check(process, "KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
