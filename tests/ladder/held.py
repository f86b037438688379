"""A model of somebody else's that a test can hold in the middle of an epoch, in whichever process it trains."""

import os
import time
from pathlib import Path

import torch

from fastcifar import interrupt
from fastcifar.models.lenet import LeNet5

HOLD = "FASTCIFAR_TEST_HOLD"
WAIT_S = 500.0


class Held(LeNet5):
    """LeNet-5, whose process waits at a step of its training while the file that ``HOLD`` names is there.

    The file says at which step, the process's first being 1; those that only warm up count too. A signal that asks
    training to stop ends the wait as well.
    """

    _steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and HOLD in os.environ:
            self._steps += 1
            self._wait(Path(os.environ[HOLD]))
        return super().forward(x)

    def _wait(self, file: Path) -> None:
        end = time.monotonic() + WAIT_S
        while self._steps == _step_in(file) and not interrupt.requested():
            if time.monotonic() > end:
                raise TimeoutError(f"{file} is still there")
            time.sleep(0.02)


def _step_in(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except FileNotFoundError:  # perhaps only just now
        return None
