"""CutMix and Mixup as two Triton kernels: one draws the permutation, one everything else.

The draws of a batch are a few Philox words; each program of `mix_kernel` computes them again instead of reading them.
Floating-point operations are not fused, so that images and lambdas are the bits of
`fastcifar.kernels.mix.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcifar.kernels.mix import MixSettings, MixTables, Target, channels_last
from fastcifar.kernels.philox import Stream

TILE = 32  # samples whose rank one program of `partner_kernel` finds
CHUNK = 128  # samples that they are compared with at once
STREAM = tl.constexpr(int(Stream.MIX))


@triton.jit
def words_of(seed, index, epoch, block):  # type: ignore[no-untyped-def]
    """Return the four words (uint32) of a Philox block in the stream of mixing; ``index`` is a tensor."""
    zero = (index * 0).to(tl.uint32)
    return tl.philox(seed, zero + index.to(tl.uint32), zero + epoch, zero + block, zero + STREAM)


@triton.jit
def key_of(seed, step, epoch, i, batch):  # type: ignore[no-untyped-def]
    """Return the key (int64) by which sample ``i`` is sorted: 31 random bits, ties broken by its place."""
    word, _, _, _ = words_of(seed, step * batch + i, epoch, 2)
    return ((word >> 1).to(tl.int64) << 32) | i.to(tl.int64)


@triton.jit
def partner_kernel(  # type: ignore[no-untyped-def]
    partner, epoch_at, step_at, seed_at, batch, ROUNDS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Write the permutation: partner[rank of i] = i, the rank being how many keys are smaller than that of i."""
    epoch, step = tl.load(epoch_at).to(tl.uint32), tl.load(step_at).to(tl.int32)
    seed = tl.load(seed_at)
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    own = key_of(seed, step, epoch, i, batch)
    rank = tl.zeros((TILE,), tl.int32)
    # ROUNDS is a constant because the interpreter cannot count to a value that a kernel was given.
    for k in range(ROUNDS):
        j = k * CHUNK + tl.arange(0, CHUNK)
        smaller = (key_of(seed, step, epoch, j, batch)[None, :] < own[:, None]) & (j < batch)[None, :]
        rank += tl.sum(smaller.to(tl.int32), 1)
    tl.store(partner + rank, i.to(tl.int64), mask=i < batch)


@triton.jit
def inside(place, centre, side, length):  # type: ignore[no-untyped-def]
    """Tell which places lie in a box of ``side`` (float64, a share of ``length``) around ``centre``."""
    half = (side * length).to(tl.int32) // 2
    return (place >= centre - half) & (place < centre + half)


@triton.jit
def scaled(word, length):  # type: ignore[no-untyped-def]
    """Map a random word to 0..length-1."""
    return (word.to(tl.int64) * length >> 32).to(tl.int32)


@triton.jit
def mix_kernel(  # type: ignore[no-untyped-def]
    images, out, labels, labels_b, lam, partner, quantiles, epoch_at, step_at, seed_at, batch,
    p_word, cutmix_word, first_step, steps_per_epoch,
    PER_SAMPLE: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mix image ``program`` (H, W, C) with its partner; write its lambda and its partner's label."""
    b = tl.program_id(0)
    epoch, step, seed = tl.load(epoch_at), tl.load(step_at), tl.load(seed_at)
    lane = tl.arange(0, BLOCK)
    # The words as vectors, because tl.philox wants tensors; all lanes hold the same.
    batch_index = lane * 0 + step.to(tl.int32)
    sample_index = batch_index * batch + b
    gate, switch, word, _ = words_of(seed, batch_index, epoch.to(tl.uint32), 0)
    row, column, _, _ = words_of(seed, batch_index, epoch.to(tl.uint32), 1)
    if PER_SAMPLE:
        _, _, word, _ = words_of(seed, sample_index, epoch.to(tl.uint32), 2)
        row, column, _, _ = words_of(seed, sample_index, epoch.to(tl.uint32), 3)
    # As torch compares integers with a Python float: in float32.
    started = (lane * 0 + epoch * steps_per_epoch + step).to(tl.float32) >= first_step
    mixing = (gate.to(tl.int64).to(tl.float32) < p_word) & started
    cutting = switch.to(tl.int64).to(tl.float32) < cutmix_word
    share = tl.where(mixing, tl.load(quantiles + (word >> 16).to(tl.int32)), 1.0)
    side = tl.sqrt(1.0 - share)
    pixel = lane // C
    y, x = pixel // W, pixel % W
    covered = inside(y, scaled(row, H), side, H) & inside(x, scaled(column, W), side, W)
    weight = tl.where(cutting, tl.where(covered, 0.0, 1.0).to(tl.float64), share).to(tl.float32)
    other, valid = tl.load(partner + b), lane < H * W * C
    place = b.to(tl.int64) * (H * W * C) + lane  # a batch may have more than 2**31 values
    own_value = tl.load(images + place, mask=valid, other=0.0).to(tl.float32)
    other_value = tl.load(images + other * H * W * C + lane, mask=valid, other=0.0).to(tl.float32)
    mixed = own_value * weight + other_value * (1.0 - weight)
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=valid)
    tl.store(labels_b + b, tl.load(labels + other))
    # The own image's share: that of the uncovered pixels, or lambda itself.
    uncovered = tl.sum(tl.where(covered | ~valid, 0, 1), 0) // C
    kept = uncovered.to(tl.float64) / (H * W)
    result = tl.where(cutting, kept, share).to(tl.float32)
    if PER_SAMPLE:
        tl.store(lam + b + lane, result, mask=lane == 0)
    else:
        tl.store(lam + lane, result, mask=(lane == 0) & (b == 0))


def mix_batch(
    images: Tensor, labels: Tensor, epoch: Tensor, step: Tensor, settings: MixSettings, tables: MixTables
) -> tuple[Tensor, Target]:
    """Mix a batch in two launches; see `fastcifar.kernels.mix.mix_batch`."""
    batch, (channels, height, width) = len(labels), images.shape[1:]
    images = channels_last(images)
    out, labels_b = torch.empty_like(images), torch.empty_like(labels)
    partner = torch.empty(batch, dtype=torch.int64, device=images.device)
    lam = torch.empty(batch if settings.per_sample else (), device=images.device)
    partner_kernel[(triton.cdiv(batch, TILE),)](
        partner, epoch, step, tables.seed, batch, ROUNDS=triton.cdiv(batch, CHUNK), TILE=TILE, CHUNK=CHUNK
    )
    mix_kernel[(batch,)](
        images, out, labels, labels_b, lam, partner, tables.quantiles, epoch, step, tables.seed, batch,
        settings.p * 2.0**32, settings.cutmix_share * 2.0**32, settings.first_step, settings.steps_per_epoch,
        PER_SAMPLE=settings.per_sample, C=channels, H=height, W=width,
        BLOCK=triton.next_power_of_2(height * width * channels), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out, Target(labels, labels_b, lam)
