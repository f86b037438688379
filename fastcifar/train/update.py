"""The update of a step on the flat parameters, moving averages and the clearing of gradients included."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fastcifar.config.schema import AdamConfig, OptimizerConfig, SGDConfig
from fastcifar.kernels.flat import Averages, Descent, operations
from fastcifar.kernels.flat_cpu import average
from fastcifar.train.flat_parameters import FlatParameters


class Update(Protocol):
    """Changes the flat parameters' weights by its gradients, moves the averages, and clears the gradients."""

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step.

        Args:
            lr: learning rate; on a GPU a float32 tensor (1,), so that a captured graph sees its changes.
            saved: the weights (n,) to go back to first, after a perturbation.
            coefficient: float32 (1,), multiplies the gradient (unscaling, clipping).
        """


def build_update(
    config: OptimizerConfig, flat: FlatParameters, averages: Averages | None, *, skip: bool = False
) -> Update:
    """Make the update that a recipe's optimizer names, with its state in the flat parameters' buffers.

    ``skip`` leaves out steps whose coefficient is not finite (fp16) instead of letting them spoil the weights.
    """
    if isinstance(config, SGDConfig):
        return SGDUpdate(config, flat, averages, skip)
    if isinstance(config, AdamConfig):
        return AdamUpdate(config, flat, averages, skip)
    from fastcifar.train.muon import MuonUpdate

    return MuonUpdate(config, flat, averages)


class SGDUpdate:
    """Stochastic gradient descent as torch.optim.SGD defines it, in one pass over the flat."""

    def __init__(self, config: SGDConfig, flat: FlatParameters, averages: Averages | None, skip: bool):
        # torch.optim.SGD refuses Nesterov without momentum; without momentum the two are the same.
        self._descent = Descent(config.momentum, config.nesterov, config.weight_decay, skip)
        self._momentum = flat.add("momentum")
        self._arena, self._averages = flat, averages
        self._operations = operations(flat.weights)

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Update`."""
        flat = self._arena
        self._operations.descend(
            flat.weights, flat.grads, self._momentum, self._descent, lr,
            saved=saved, averages=self._averages, coefficient=coefficient, working_copy=flat.working_copy,
        )  # fmt: skip


class AdamUpdate:
    """Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019): torch's fused kernel over one flat tensor."""

    def __init__(self, config: AdamConfig, flat: FlatParameters, averages: Averages | None, skip: bool):
        self._settings: dict[str, Any] = {
            "beta1": config.betas[0], "beta2": config.betas[1], "eps": config.eps,
            "weight_decay": config.weight_decay, "amsgrad": False, "maximize": False,
        }  # fmt: skip
        self._kernel = torch._fused_adam_ if config.name == "adam" else torch._fused_adamw_
        self._first, self._second = flat.add("adam_first"), flat.add("adam_second")
        flat.buffers["adam_steps"] = self._steps = torch.zeros((), device=flat.weights.device)
        self._arena, self._averages, self._skip = flat, averages, skip

    def __call__(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Update`."""
        flat, missed = self._arena, None
        if saved is not None:
            flat.weights.copy_(saved)
        if coefficient is not None:
            missed = 1.0 - torch.isfinite(coefficient).float() if self._skip else None
            flat.grads.mul_(coefficient)
        self._steps.add_(1)
        self._kernel(
            [flat.weights], [flat.grads], [self._first], [self._second], [], [self._steps],
            lr=lr, found_inf=missed, **self._settings,
        )  # fmt: skip
        if missed is not None:
            self._steps.sub_(missed[0])
        if self._averages is not None:
            average(flat.weights, self._averages)
        flat.grads.zero_()
        flat.cast()
