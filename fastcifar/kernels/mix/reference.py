"""CutMix and Mixup in plain torch: what the Triton kernels must equal bit for bit, and what a CPU runs.

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

import torch
from torch import Tensor

from fastcifar.kernels.mix import QUANTILE_BITS, WORD, MixSettings, MixTables, Target
from fastcifar.kernels.philox import Stream, philox


def mix_batch(
    images: Tensor, labels: Tensor, epoch: Tensor, step: Tensor, settings: MixSettings, tables: MixTables
) -> tuple[Tensor, Target]:
    """Mix a batch; see `fastcifar.kernels.mix.mix_batch`."""
    size, device, seed = len(labels), images.device, settings.seed
    sample = step * size + torch.arange(size, device=device)
    gate, switch, word, _ = philox(seed, step, epoch, 0, Stream.MIX)
    order, _, own_word, _ = philox(seed, sample, epoch, 2, Stream.MIX)
    partner = ((order >> 1 << 32) | torch.arange(size, device=device)).argsort()
    mixing = (gate < settings.p * WORD) & (epoch * settings.steps_per_epoch + step >= settings.first_step)
    quantile = (own_word if settings.per_sample else word) >> (32 - QUANTILE_BITS)
    share = torch.where(mixing, tables.quantiles[quantile], 1.0)
    index, block = (sample, 3) if settings.per_sample else (step, 1)
    row, column, _, _ = philox(seed, index, epoch, block, Stream.MIX)
    height, width = images.shape[2:]
    mask = box_mask(share, row * height >> 32, column * width >> 32, height, width)
    cutting = switch < settings.cutmix_share * WORD
    weight = torch.where(cutting[:, None, None], (~mask).double(), share[:, None, None]).float()
    lam = torch.where(cutting, weight.double().mean((1, 2)), share).float()
    target = Target(labels, labels[partner], lam if settings.per_sample else lam[0])
    return combine(images, partner, weight), target


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
