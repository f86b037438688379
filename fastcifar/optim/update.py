"""The update of a step on the arena, moving averages and the clearing of gradients included."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fastcifar.optim.arena import Arena
from fastcifar.optim.flat import Averages, Descent, operations
from fastcifar.optim.plain import average
from fastcifar.recipe.models import AdamConfig, OptimizerConfig, SGDConfig


class Update(Protocol):
    """Changes the arena's weights by its gradients, moves the averages, and clears the gradients."""

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step.

        Args:
            lr: learning rate; on a GPU a float32 tensor (1,), so that a captured graph sees its changes.
            saved: the weights (n,) to go back to first, after a perturbation.
            coefficient: float32 (1,), multiplies the gradient (unscaling, clipping).
        """


def build_update(config: OptimizerConfig, arena: Arena, averages: Averages | None, *, skip: bool = False) -> Update:
    """Make the update that a recipe's optimizer names, with its state in the arena's buffers.

    ``skip`` leaves out steps whose coefficient is not finite (fp16) instead of letting them spoil the weights.
    """
    if isinstance(config, SGDConfig):
        return SGDUpdate(config, arena, averages, skip)
    if isinstance(config, AdamConfig):
        return AdamUpdate(config, arena, averages, skip)
    from fastcifar.optim.muon import MuonUpdate

    return MuonUpdate(config, arena, averages)


class SGDUpdate:
    """Stochastic gradient descent as torch.optim.SGD defines it, in one pass over the arena."""

    def __init__(self, config: SGDConfig, arena: Arena, averages: Averages | None, skip: bool):
        # torch.optim.SGD refuses Nesterov without momentum; without momentum the two are the same.
        self._descent = Descent(config.momentum, config.nesterov, config.weight_decay, skip)
        self._momentum = arena.add("momentum")
        self._arena, self._averages = arena, averages
        self._operations = operations(arena.weights)

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Update`."""
        arena = self._arena
        self._operations.descend(
            arena.weights, arena.grads, self._momentum, self._descent, lr,
            saved=saved, averages=self._averages, coefficient=coefficient, shadow=arena.shadow,
        )  # fmt: skip


class AdamUpdate:
    """Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019): torch's fused kernel over one flat tensor."""

    def __init__(self, config: AdamConfig, arena: Arena, averages: Averages | None, skip: bool):
        self._settings: dict[str, Any] = {
            "beta1": config.betas[0], "beta2": config.betas[1], "eps": config.eps,
            "weight_decay": config.weight_decay, "amsgrad": False, "maximize": False,
        }  # fmt: skip
        self._kernel = torch._fused_adam_ if config.name == "adam" else torch._fused_adamw_
        self._first, self._second = arena.add("adam_first"), arena.add("adam_second")
        arena.buffers["adam_steps"] = self._steps = torch.zeros((), device=arena.weights.device)
        self._arena, self._averages, self._skip = arena, averages, skip

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Update`."""
        arena, missed = self._arena, None
        if saved is not None:
            arena.weights.copy_(saved)
        if coefficient is not None:
            missed = 1.0 - torch.isfinite(coefficient).float() if self._skip else None
            arena.grads.mul_(coefficient)
        self._steps.add_(1)
        self._kernel(
            [arena.weights], [arena.grads], [self._first], [self._second], [], [self._steps],
            lr=lr, found_inf=missed, **self._settings,
        )  # fmt: skip
        if missed is not None:
            self._steps.sub_(missed[0])
        if self._averages is not None:
            average(arena.weights, self._averages)
        arena.grads.zero_()
        arena.cast()
