"""Optimizers over flat parameters: each moves the weights by the gradient and the moving averages with them."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fastcifar.config.schema import AdamConfig, OptimizerConfig, SGDConfig, UserOptimizerConfig
from fastcifar.kernels.sgd_ema import Averages, SGDSettings, average, sgd_step
from fastcifar.train.flat_parameters import FlatParameters, Segment
from fastcifar.train.groups import Group, decay_per_step, rate_groups


class Optimizer(Protocol):
    """Moves the flat weights by the flat gradient, in place. The gradient's memory may be used up."""

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one optimizer step and move the averages.

        Args:
            lr: learning rate; on a GPU a float32 tensor (1,), so that a captured graph sees its changes.
            saved: the weights (n,) to go back to first, after a SAM ascent step.
            coefficient: float32 (1,), multiplies the gradient (unscaling, clipping).
        """


def build_optimizer(
    config: OptimizerConfig, flat: FlatParameters, averages: Averages | None, *, skip: bool = False
) -> Optimizer:
    """Make the optimizer that a recipe names; its state are buffers of ``flat``, so that checkpoints hold it.

    One of the user's own keeps its state itself: see `fastcifar.train.user_optimizer`.

    Args:
        config: the recipe's ``optimizer`` table.
        flat: the parameters.
        averages: what moves along, or None.
        skip: leave out steps whose coefficient is not finite instead of letting them spoil the weights.
    """
    if isinstance(config, SGDConfig):
        return SGD(config, flat, averages, skip)
    if isinstance(config, AdamConfig):
        return Adam(config, flat, averages, skip)
    if isinstance(config, UserOptimizerConfig):
        from fastcifar.train.user_optimizer import UserOptimizer

        return UserOptimizer(config, flat, averages, skip)
    from fastcifar.train.muon import Muon

    return Muon(config, flat, averages)


class SGD:
    """Stochastic gradient descent as torch.optim.SGD defines it, restoring and averaging in the same launch.

    There is one launch for each range of parameters that share a learning rate: mostly one for all.
    """

    def __init__(self, config: SGDConfig, flat: FlatParameters, averages: Averages | None, skip: bool):
        self._momentum = flat.add("momentum")
        self._groups = sgd_groups(config, flat, skip)
        self._flat, self._averages = flat, averages

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Optimizer`."""
        flat, averages, whole = self._flat, self._averages, len(self._groups) == 1
        for part, factor, settings in self._groups:
            # A product by 1 would be one more launch for nothing.
            rate = lr if factor == 1 else lr * factor
            sgd_step(
                flat.weights[part], flat.grads[part], self._momentum[part], settings, rate,
                saved=None if saved is None else saved[part],
                averages=None if averages is None else averages_of(averages, part, last=part is self._groups[-1].part),
                coefficient=coefficient, working_copy=flat.working_copy if whole else None,
            )  # fmt: skip
        # A range does not know where it lies in the copy, which begins with the matrices.
        if not whole:
            flat.cast()


def sgd_groups(config: SGDConfig, flat: FlatParameters, skip: bool) -> list[Group]:
    """Return the ranges of one learning rate, each with its step."""

    def rate(segment: Segment) -> float:
        if config.lr_norm_bias is not None and segment.name in flat.norm_biases:
            return config.lr_norm_bias
        return config.lr

    # torch.optim.SGD refuses Nesterov without momentum; without momentum the two are the same.
    settings = SGDSettings(config.momentum, config.nesterov, config.weight_decay, skip)
    groups = rate_groups(flat, rate, config.lr, settings)
    return decay_per_step(groups, config.lr) if config.decay_per == "step" else groups


def averages_of(averages: Averages, part: slice, *, last: bool) -> Averages:
    """Return the averages of a range of the weights; those of the statistics move once a step, with the last range."""
    end = None if last else 0
    return Averages(averages.decay, averages.weights[part], averages.stats[:end], averages.stats_average[:end])


class Adam:
    """Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019): torch's fused kernel over one flat tensor."""

    def __init__(self, config: AdamConfig, flat: FlatParameters, averages: Averages | None, skip: bool):
        self._settings: dict[str, Any] = {
            "beta1": config.betas[0], "beta2": config.betas[1], "eps": config.eps,
            "amsgrad": False, "maximize": False,
        }  # fmt: skip
        # The flat parameters begin with the matrices: a range that decays, and one that does not.
        end = flat.matrix_end if config.decay == "matrices" else flat.weights.numel()
        self._parts = [(slice(0, end), config.weight_decay), (slice(end, flat.weights.numel()), 0.0)]
        self._parts = [(part, decay) for part, decay in self._parts if part.stop > part.start]
        self._kernel = torch._fused_adam_ if config.name == "adam" else torch._fused_adamw_
        self._first, self._second = flat.add("adam_first"), flat.add("adam_second")
        flat.buffers["adam_steps"] = self._steps = torch.zeros((), device=flat.weights.device)
        self._flat, self._averages, self._skip = flat, averages, skip

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `Optimizer`."""
        flat, missed = self._flat, None
        if saved is not None:
            flat.weights.copy_(saved)
        if coefficient is not None:
            missed = 1.0 - torch.isfinite(coefficient).float() if self._skip else None
            # Not by NaN: that would stay in the padding between tensors, and every later norm would count it.
            flat.grads.mul_(coefficient.nan_to_num(nan=0.0) if self._skip else coefficient)
        # On the device, so that bias correction goes on when a captured graph is replayed.
        self._steps.add_(1)
        for part, decay in self._parts:
            self._kernel(
                [flat.weights[part]], [flat.grads[part]], [self._first[part]], [self._second[part]], [], [self._steps],
                lr=lr, found_inf=missed, weight_decay=decay, **self._settings,
            )  # fmt: skip
        if missed is not None:
            # A skipped step does not count, as with torch.amp.GradScaler.
            self._steps.sub_(missed[0])
        if self._averages is not None:
            average(flat.weights, self._averages)
        flat.cast()
