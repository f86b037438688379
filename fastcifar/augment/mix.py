"""CutMix (Yun et al., 2019) and Mixup (Zhang et al., 2018) on a finished batch, as a recipe's ``mix`` table says.

What is drawn, and in which order, stands in `fastcifar.kernels.mix.reference`.
"""

import numpy as np
import torch
from torch import Tensor

from fastcifar.config.schema import MixConfig
from fastcifar.kernels.mix import QUANTILE_BITS, MixSettings, MixTables, Target, mix_batch


def beta_quantiles(alpha: float) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at the midpoints of 65,536 equal intervals: float64 (65536,)."""
    from scipy.special import betaincinv

    count = 1 << QUANTILE_BITS
    middle = (np.arange(count) + 0.5) / count
    return torch.from_numpy(middle if alpha == 1 else betaincinv(alpha, alpha, middle))


class Mix:
    """Mixes batches as a recipe's ``mix`` table says; `build_mix` makes it."""

    def __init__(self, config: MixConfig, seed: int, epochs: int, steps_per_epoch: int) -> None:
        cutmix_share = {"cutmix": 1.0, "mixup": 0.0, "cutmix_or_mixup": config.switch}[config.name]
        first_step = config.start * epochs * steps_per_epoch
        self.config = config
        self.settings = MixSettings(seed, config.p, cutmix_share, first_step, steps_per_epoch, config.per_sample)
        self._tables = MixTables.of(seed, beta_quantiles(config.alpha))

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int | Tensor, step: int | Tensor
    ) -> tuple[Tensor, Target]:
        """Mix each image with the one that a random permutation puts beside it.

        Args:
            images: floating (B, C, H, W), channels-last for speed.
            labels: int64 (B,).
            epoch: from 0; int or int64 tensor of one element on the images' device.
            step: of the epoch, from 0, likewise.

        Returns:
            The mixed images, of the same dtype and layout, and their target.
        """
        if self._tables.seed.device != images.device:
            self._tables = self._tables.to(images.device)
        epoch, step = _counter(epoch, images.device), _counter(step, images.device)
        return mix_batch(images, labels, epoch, step, self.settings, self._tables)


def _counter(value: int | Tensor, device: torch.device) -> Tensor:
    """Return an epoch or step number as int64 (1,) on the device."""
    if isinstance(value, Tensor):
        return value.reshape(1)
    return torch.full((1,), value, dtype=torch.int64, device=device)


def build_mix(config: MixConfig | None, *, seed: int, epochs: int, steps_per_epoch: int) -> Mix | None:
    """Return the mixing of a recipe, or None where it has none.

    Args:
        config: the ``mix`` table.
        seed: 0..2**64-1.
        epochs: of the whole run; ``config.start`` is a fraction of it.
        steps_per_epoch: batches per epoch.
    """
    return None if config is None else Mix(config, seed, epochs, steps_per_epoch)
