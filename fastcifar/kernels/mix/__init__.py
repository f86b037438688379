"""CutMix (Yun et al., 2019) and Mixup (Zhang et al., 2018) of a finished batch: draws, images and labels.

`reference` says what is drawn and how; a CPU runs it, and the two launches of `triton` give the same bits on a GPU.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 1 << 32
QUANTILE_BITS = 16


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


@dataclass(frozen=True)
class MixSettings:
    """What decides a run's mixing.

    Attributes:
        seed: 0..2**64-1.
        p: probability that a batch is mixed.
        cutmix_share: probability that a mixed batch is mixed by CutMix rather than by Mixup.
        first_step: step of the run, counted from 0, from which on batches are mixed.
        steps_per_epoch: batches in an epoch.
        per_sample: draw lambda and box for each sample instead of once a batch.
    """

    seed: int
    p: float
    cutmix_share: float
    first_step: float
    steps_per_epoch: int
    per_sample: bool


class MixTables(NamedTuple):
    """What mixing reads on the device.

    Attributes:
        quantiles: float64 (65536,), of Beta(alpha, alpha).
        seed: int64 (1,), the seed's 64 bits as a signed integer.
    """

    quantiles: Tensor
    seed: Tensor

    @classmethod
    def of(cls, seed: int, quantiles: Tensor) -> "MixTables":
        """Return the tables of a seed in 0..2**64-1."""
        return cls(quantiles, torch.tensor([seed - (1 << 64) if seed >> 63 else seed]))

    def to(self, device: torch.device) -> "MixTables":
        """Return the tables on a device."""
        return MixTables(self.quantiles.to(device), self.seed.to(device))


def mix_batch(
    images: Tensor, labels: Tensor, epoch: Tensor, step: Tensor, settings: MixSettings, tables: MixTables
) -> tuple[Tensor, Target]:
    """Mix each image with the one that a random permutation puts beside it, without a host-device synchronization.

    Args:
        images: bf16, fp16 or fp32 (B, C, H, W).
        labels: int64 (B,).
        epoch: int64 (1,), from 0, on the images' device.
        step: int64 (1,), of the epoch, from 0.
        settings: of the run.
        tables: on the images' device.

    Returns:
        The mixed images, channels-last, of the same dtype, and their target.
    """
    if images.is_cuda:
        from fastcifar.kernels.mix import triton  # not imported where there is no GPU

        return triton.mix_batch(images, labels, epoch, step, settings, tables)
    from fastcifar.kernels.mix import reference

    return reference.mix_batch(images, labels, epoch, step, settings, tables)


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) whose memory is (B, H, W, C), copied only where it is not."""
    return images.contiguous(memory_format=torch.channels_last)
