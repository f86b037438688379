"""CutMix (Yun et al., 2019) and Mixup (Zhang et al., 2018) on a finished batch, without a host synchronisation.

All randomness comes from Philox (stream `Stream.MIX`). Draws of a batch have the counter index ``step``:

====== =====================================================================
 draw  use (batch)
====== =====================================================================
 0     whether the batch is mixed
 1     CutMix or Mixup
 2     lambda: one of 65,536 equally likely quantiles of Beta(alpha, alpha)
 4, 5  centre row and column of the box
====== =====================================================================

Draws of a sample have the index ``step * B + position``: 8 orders the permutation; with ``per_sample``, 10 is the
sample's lambda and 12, 13 are its box.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcifar.config.schema import MixConfig
from fastcifar.kernels.philox import Stream, philox

QUANTILE_BITS = 16
WORD = 1 << 32


class Target(NamedTuple):
    """What a mixed batch should be taken for: the loss is ``lam * loss(labels_a) + (1 - lam) * loss(labels_b)``.

    Attributes:
        labels_a: int64 (B,): each image's own labels.
        labels_b: int64 (B,): those of the images mixed in.
        lam: float32 () or (B,): in 0..1, the own image's share; 1 where nothing was mixed in.
    """

    labels_a: Tensor
    labels_b: Tensor
    lam: Tensor


def beta_quantiles(alpha: float) -> Tensor:
    """Return the quantiles of Beta(alpha, alpha) at the midpoints of 65,536 equal intervals: float64 (65536,)."""
    from scipy.special import betaincinv

    count = 1 << QUANTILE_BITS
    middle = (np.arange(count) + 0.5) / count
    return torch.from_numpy(middle if alpha == 1 else betaincinv(alpha, alpha, middle))


def box_mask(share: Tensor, centre_y: Tensor, centre_x: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels a CutMix box covers: bool (N, H, W).

    Args:
        share: float64 (N,): lambda before clipping; the box has sides sqrt(1 - lambda) of the image's, rounded down.
        centre_y: int64 (N,), in 0..H-1.
        centre_x: int64 (N,), in 0..W-1.
        height: H, in pixels.
        width: W, in pixels.
    """
    side = (1 - share).sqrt()

    def covered(length: int, centre: Tensor) -> Tensor:
        half = (side * length).long() // 2
        place = torch.arange(length, device=share.device)
        return (place >= (centre - half)[:, None]) & (place < (centre + half)[:, None])

    return covered(height, centre_y)[:, :, None] & covered(width, centre_x)[:, None, :]


class Mix:
    """Mixes batches as a recipe's ``mix`` table says; `build_mix` makes it."""

    def __init__(self, config: MixConfig, seed: int, epochs: int, steps_per_epoch: int) -> None:
        self.config, self.seed, self.steps_per_epoch = config, seed, steps_per_epoch
        self.first_step = config.start * epochs * steps_per_epoch
        self.cutmix_share = {"cutmix": 1.0, "mixup": 0.0, "cutmix_or_mixup": config.switch}[config.name]
        self._quantiles = beta_quantiles(config.alpha)

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
        size, device = len(labels), images.device
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        epoch, step = zero + epoch, zero + step
        sample = step * size + torch.arange(size, device=device)
        gate, switch, word, _ = philox(self.seed, step, epoch, 0, Stream.MIX)
        order, _, own_word, _ = philox(self.seed, sample, epoch, 2, Stream.MIX)
        partner = ((order >> 1 << 32) | torch.arange(size, device=device)).argsort()
        mixing = (gate < self.config.p * WORD) & (epoch * self.steps_per_epoch + step >= self.first_step)
        quantile = (own_word if self.config.per_sample else word) >> (32 - QUANTILE_BITS)
        share = torch.where(mixing, self._table(device)[quantile], 1.0)
        index, block = (sample, 3) if self.config.per_sample else (step, 1)
        mask = self._box(share, index, epoch, block, images.shape[2:])
        cutting = switch < self.cutmix_share * WORD
        weight = torch.where(cutting[:, None, None], (~mask).double(), share[:, None, None]).float()
        lam = torch.where(cutting, weight.double().mean((1, 2)), share).float()
        target = Target(labels, labels[partner], lam if self.config.per_sample else lam[0])
        return combine(images, partner, weight), target

    def _box(self, share: Tensor, index: Tensor, epoch: Tensor, block: int, size: torch.Size) -> Tensor:
        row, column, _, _ = philox(self.seed, index, epoch, block, Stream.MIX)
        height, width = size
        return box_mask(share, row * height >> 32, column * width >> 32, height, width)

    def _table(self, device: torch.device) -> Tensor:
        if self._quantiles.device != device:
            self._quantiles = self._quantiles.to(device)
        return self._quantiles


def combine(images: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight * images + (1 - weight) * images[partner]``, computed in float32, in the images' dtype.

    Args:
        images: floating (B, C, H, W).
        partner: int64 (B,).
        weight: float32 (1 or B, 1 or H, 1 or W), in 0..1.
    """
    own = images.permute(0, 2, 3, 1)
    other = own.index_select(0, partner)
    share = weight[:, :, :, None]
    return (own.float() * share + other.float() * (1 - share)).to(images.dtype).permute(0, 3, 1, 2)


def build_mix(config: MixConfig | None, *, seed: int, epochs: int, steps_per_epoch: int) -> Mix | None:
    """Return the mixing of a recipe, or None where it has none.

    Args:
        config: the ``mix`` table.
        seed: 0..2**64-1.
        epochs: of the whole run; ``config.start`` is a fraction of it.
        steps_per_epoch: batches per epoch.
    """
    return None if config is None else Mix(config, seed, epochs, steps_per_epoch)
