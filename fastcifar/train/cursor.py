"""Where a run is: epoch, step and learning rate, as Python numbers on a CPU and as device tensors on a GPU."""

import torch
from torch import Tensor

from fastcifar.train.schedule import LearningRate


class HostCursor:
    """Plain numbers: the cheapest where the device is the host.

    Attributes:
        steps_per_epoch: batches in an epoch.
        epoch: counted from 0.
        step: step within the epoch, counted from 0.
        lr: learning rate of this step.
    """

    def __init__(self, rate: LearningRate, steps_per_epoch: int):
        self._rate, self.steps_per_epoch = rate, steps_per_epoch
        self.epoch: int = 0
        self.step: int = 0
        self.lr: float = rate(0, 0)

    def begin(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.step = epoch, 0
        self.lr = self._rate(epoch, 0)

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1
        self.lr = self._rate(self.epoch, self.step)

    def record(self, table: Tensor, value: Tensor) -> None:
        """Write a scalar into the (steps_per_epoch,) table at this step."""
        table[self.step] = value

    def tensors(self) -> list[Tensor]:
        """Return what a captured graph changes when it is replayed: nothing."""
        return []


class DeviceCursor:
    """Tensors that a captured CUDA graph reads and advances by itself.

    Attributes:
        steps_per_epoch: batches in an epoch.
        epoch: int64 ().
        step: int64 (1,).
        lr: float32 (1,).
    """

    def __init__(self, rate: LearningRate, steps_per_epoch: int, device: torch.device):
        self._rate, self.steps_per_epoch = rate, steps_per_epoch
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.lr = torch.zeros(1, device=device)
        # One entry more than there are steps, for the advance after the last.
        self._rates = torch.zeros(steps_per_epoch + 1, device=device)
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Go to the start of an epoch: the only copies from the host, once an epoch."""
        # The whole epoch's rates at once: a replayed graph cannot call a Python function for the next one.
        rates = torch.tensor([self._rate(epoch, step) for step in range(self.steps_per_epoch + 1)])
        self._rates.copy_(rates)
        self.epoch.fill_(epoch)
        self.step.zero_()
        self.lr.copy_(self._rates[:1])

    def advance(self) -> None:
        """Go to the next step, on the device."""
        self.step.add_(1)
        # index_select, because indexing by a device tensor would make the host wait for its value.
        self.lr.copy_(self._rates.index_select(0, self.step))

    def record(self, table: Tensor, value: Tensor) -> None:
        """Write a scalar into the (steps_per_epoch,) table at this step."""
        # Likewise without the host: `table[self.step] = value` would have to read the step.
        table.index_copy_(0, self.step, value.reshape(1).to(table.dtype))

    def tensors(self) -> list[Tensor]:
        """Return what a captured graph changes when it is replayed."""
        return [self.step, self.lr]


def build_cursor(rate: LearningRate, steps_per_epoch: int, device: torch.device) -> HostCursor | DeviceCursor:
    """Return the cursor that suits the device."""
    return HostCursor(rate, steps_per_epoch) if device.type == "cpu" else DeviceCursor(rate, steps_per_epoch, device)
