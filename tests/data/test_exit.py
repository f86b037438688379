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
loader = build_loader(
    LoaderConfig(name="{name}", workers=2), resolve_store(DataConfig(source="synthetic")), None,
    seed=0, batch_size=10, drop_last=False, device=torch.device("cpu"),
)
"""
EXCEPTION = """
for batch in loader.epoch(0):
    break
abandoned = loader.epoch(1)
next(abandoned)
assert torch.get_num_threads() == threads
print("broken off", flush=True)
for batch in loader.epoch(2):
    raise ValueError("the training loop failed")
"""
FOREVER = """
def epochs():
    for epoch in range(10**6):
        for batch in loader.epoch(epoch):
            yield batch
for step, batch in enumerate(epochs()):
    if step == 20:
        print("training", flush=True)
    time.sleep(0.002)
"""


def start(name: str, script: str) -> subprocess.Popen:
    if name in MODULES and not loaders._installed(MODULES[name]):
        pytest.skip(f"{name} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", START.format(name=name) + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def check(process: subprocess.Popen, last_line: str) -> None:
    """The program's own traceback is all that stands on stderr, and nobody of its session lives on."""
    _, errors = process.communicate(timeout=300)
    lines = errors.strip().splitlines()
    assert lines, "no traceback at all"
    assert lines[0] == "Traceback (most recent call last):", errors
    assert lines[-1] == last_line, errors
    assert sum(line.startswith("Traceback") for line in lines) == 1, errors
    assert not any(word in errors for word in ("Exception ignored", "Fatal", "terminate called", "leaked")), errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("name", ["resident", "ffcv", "dali", "torchvision"])
def test_abandoned_epochs_and_an_exception(cache, name):
    with start(name, EXCEPTION) as process:
        check(process, "ValueError: the training loop failed")
    assert process.returncode == 1


@pytest.mark.parametrize("name", ["ffcv", "dali", "torchvision"])
def test_ctrl_c(cache, name):
    with start(name, FOREVER) as process:
        assert process.stdout.readline() == "training\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group, workers included
        check(process, "KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
