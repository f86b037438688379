"""Parameters that learn only in the first epochs: around any optimizer, in a captured graph too."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.errors import UserError, nearest
from fastcifar.kernels.sgd_ema import Averages
from fastcifar.models.hooks import Learning, learning_epochs
from fastcifar.train.flat_parameters import FlatParameters, Segment
from fastcifar.train.optimizers import Optimizer
from fastcifar.train.schedule import LearningRate, learning_rate


class Freeze:
    """Takes an optimizer's step, of which some parameters make a share only: none at all from an epoch on.

    A share of a step is what a learning rate of its own would give, because momentum (and Adam's moments) do not
    depend on the learning rate. The count of steps lies on the device and in the checkpoint.

    Args:
        optimizer: what takes the whole step.
        flat: the flat buffers.
        averages: the moving averages, which ``optimizer`` moves; they follow the frozen parameters too.
        shares: float32 (k + 1,) by parameter name: the share at each step; the last one, 0, holds from step k on.
    """

    def __init__(
        self, optimizer: Optimizer, flat: FlatParameters, averages: Averages | None, shares: Mapping[str, Tensor]
    ):
        self._optimizer, self._flat, self._averages = optimizer, flat, averages
        self._steps = flat.add_steps("freeze_steps")
        self._shares = [(_find(flat, name), table.to(flat.weights.device)) for name, table in shares.items()]

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `fastcifar.train.optimizers.Optimizer`."""
        weights = self._flat.weights
        before = self._copies(weights if saved is None else saved)
        averages = [] if self._averages is None else self._copies(self._averages.weights)
        self._optimizer.step(lr, saved=saved, coefficient=coefficient)
        for (part, table), old in zip(self._shares, before, strict=True):
            share = table.index_select(0, self._steps.clamp(max=len(table) - 1))
            weights[part] = old.lerp(weights[part], share)
        if self._averages is not None:
            # The optimizer averaged the whole step: take the average again, with the weights as they are now.
            for (part, _), average in zip(self._shares, averages, strict=True):
                self._averages.weights[part] = average.lerp_(weights[part], 1 - self._averages.decay)
        self._steps.add_(1)
        self._flat.cast()

    def _copies(self, buffer: Tensor) -> list[Tensor]:
        """Return a copy of each parameter's elements of a flat buffer."""
        return [buffer[part].clone() for part, _ in self._shares]


def _find(flat: FlatParameters, name: str) -> slice:
    """Return where a parameter lies in the flat buffers.

    Raises:
        UserError: there is none of that name.
    """
    segment: Segment | None = next((s for s in flat.segments if s.name == name), None)
    if segment is None:
        meant = nearest(name, [s.name for s in flat.segments])
        raise UserError(f'model: learning_epochs names "{name}", which is no parameter that learns{meant}')
    return slice(segment.offset, segment.offset + segment.size)


def step_shares(learning: Learning, rate: LearningRate, epochs: int, steps_per_epoch: int) -> Tensor:
    """Return which share of its step a parameter makes, step by step: float32 (k + 1,), the last one 0.

    Args:
        learning: how long it learns, and whether its learning rate falls to 0 within that time.
        rate: the run's learning rate by (epoch, step), as a share of its peak.
        epochs: length of the run.
        steps_per_epoch: updates in an epoch.
    """
    count = min(learning.epochs, epochs) * steps_per_epoch
    shares = [1.0] * count
    if learning.fade:
        # The run's own learning rate is in the step already; where that is 0, so is the step.
        own = [1 - step / (learning.epochs * steps_per_epoch) for step in range(count)]
        run = [rate(*divmod(step, steps_per_epoch)) for step in range(count)]
        shares = [a / b if b else 0.0 for a, b in zip(own, run, strict=True)]
    return torch.tensor([*shares, 0.0])


def every_nth(shares: Tensor, every: int) -> Tensor:
    """Return the shares at steps 0, ``every``, 2 ``every`` and so on of the run, and the last one, which holds on."""
    return torch.cat([shares[:-1:every], shares[-1:]])


def build_freeze(
    optimizer: Optimizer,
    recipe: Recipe,
    model: nn.Module,
    flat: FlatParameters,
    averages: Averages | None,
    steps_per_epoch: int,
    every: int = 1,
) -> Optimizer:
    """Return the optimizer with the freezing that the model asks for around it, or itself where it asks for none.

    Args:
        optimizer: what takes the whole step.
        recipe: for the length of the run and its learning rates.
        model: whose modules say how long their parameters learn, in epochs of the run.
        flat: its flat buffers.
        averages: the moving averages, which ``optimizer`` moves.
        steps_per_epoch: steps of the run in an epoch.
        every: the optimizer steps at every so many of them only, the run's first one among them.
    """
    epochs = recipe.train.epochs
    rate = learning_rate(recipe.schedule, 1.0, epochs, steps_per_epoch)
    shares = {
        name: every_nth(step_shares(learning, rate, epochs, steps_per_epoch), every)
        for name, learning in learning_epochs(model).items()
        if learning.fade or learning.epochs < epochs
    }
    return Freeze(optimizer, flat, averages, shares) if shares else optimizer
