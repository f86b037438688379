"""Lookahead (Zhang et al., 2019): around any optimizer, in a captured graph too."""

import torch
from torch import Tensor

from fastcifar.config.schema import LookaheadConfig
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.optimizers import Optimizer


class Lookahead:
    """Takes an optimizer's step and, every so many steps, sets weights and statistics to a slow average of themselves.

    See `LookaheadConfig`. The momentum stays. There is no host-device synchronization here: between two averages,
    everything moves by a share of 0, which leaves its bits alone.

    Args:
        optimizer: what takes the whole step.
        config: how often and how slow.
        flat: the flat buffers; the average starts at the present weights.
        total_steps: of the run, which ends on the average.
    """

    def __init__(self, optimizer: Optimizer, config: LookaheadConfig, flat: FlatParameters, total_steps: int):
        self._optimizer, self._flat = optimizer, flat
        self._steps = flat.add_steps("lookahead_steps")
        slow, slow_stats = flat.add("lookahead"), flat.add("stats_lookahead", like="stats")
        self._pairs = [(slow, flat.weights), (slow_stats, flat.stats)]
        for average, present in self._pairs:
            average.copy_(present)
        taken, back = slow_shares(config, total_steps)
        self._taken, self._back = taken.to(slow.device), back.to(slow.device)

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `fastcifar.train.optimizers.Optimizer`."""
        self._optimizer.step(lr, saved=saved, coefficient=coefficient)
        taken, back = self._taken.index_select(0, self._steps), self._back.index_select(0, self._steps)
        for average, present in self._pairs:
            average.lerp_(present, taken)
            present.lerp_(average, back)
        self._steps.add_(1)
        self._flat.cast()


def slow_shares(config: LookaheadConfig, total_steps: int) -> tuple[Tensor, Tensor]:
    """Return what each step moves: float32 (total_steps,) twice.

    The first is the share of the present weights that the average takes in after a step, the second how far the weights
    go back to the average: all the way or not at all.
    """
    steps = torch.arange(1, total_steps + 1, dtype=torch.float64)
    due = steps % config.every == 0
    kept = config.decay * (steps / total_steps) ** config.power
    back = due | (steps == total_steps)
    return torch.where(due, 1 - kept, 0.0).float(), back.float()
