"""The learning rate over a run."""

import math
from collections.abc import Callable

from fastcifar.config.schema import ScheduleConfig

LearningRate = Callable[[int, int], float]


def learning_rate(config: ScheduleConfig, lr: float, epochs: int, steps_per_epoch: int) -> LearningRate:
    """Return the function (epoch, step within the epoch) -> learning rate, both counted from 0.

    Per epoch, ``cosine`` equals ``torch.optim.lr_scheduler.CosineAnnealingLR(T_max=epochs, eta_min=final * lr)``
    stepped once an epoch (Loshchilov & Hutter, 2017): its last epoch is one notch above ``final``. The warm-up's
    last interval (epoch or step) already has the full rate, unless ``warmup_from`` says where it begins.

    Args:
        config: shape, interval and warm-up.
        lr: peak learning rate, above 0.
        epochs: length of the run.
        steps_per_epoch: updates in an epoch; only used where ``config.per == "step"``.
    """
    interval = 1.0 if config.per == "epoch" else 1.0 / steps_per_epoch

    def rate(epoch: int, step: int) -> float:
        position = float(epoch) if config.per == "epoch" else epoch + step * interval
        if position < config.warmup_epochs:
            if config.warmup_from is not None:
                return lr * (config.warmup_from + (1 - config.warmup_from) * position / config.warmup_epochs)
            return lr * min(1.0, (position + interval) / config.warmup_epochs)
        return lr * _factor(config, (position - config.warmup_epochs) / max(epochs - config.warmup_epochs, interval))

    return rate


def _factor(config: ScheduleConfig, progress: float) -> float:
    """Return the share of the peak rate at ``progress`` (0 to 1) of the time after the warm-up."""
    if config.name == "constant":
        return 1.0
    if config.name == "linear":
        return 1.0 + (config.final - 1.0) * progress
    return config.final + (1.0 - config.final) * (1.0 + math.cos(math.pi * progress)) / 2.0
