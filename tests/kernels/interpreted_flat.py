"""In Triton's interpreter: the kernels on flat buffers, ShakeDrop's draws and mixing, against those of the CPU.

What is found is a list of [what, error in ulps of the largest value of that buffer or of the operands, about 1, the
ulps allowed].
"""

import itertools
from unittest import mock

import torch
from torch import Tensor

from fastcifar.kernels.mix import MixSettings, MixTables
from fastcifar.kernels.mix import reference as mix_reference
from fastcifar.kernels.mix import triton as mix_triton
from fastcifar.kernels.sam import Ascent
from fastcifar.kernels.sam import cpu as sam_cpu
from fastcifar.kernels.sam import triton as sam_triton
from fastcifar.kernels.sgd_ema import Averages, SGDSettings
from fastcifar.kernels.sgd_ema import cpu as sgd_cpu
from fastcifar.kernels.sgd_ema import triton as sgd_triton
from fastcifar.kernels.shakedrop import reference as shakedrop_reference
from fastcifar.kernels.shakedrop import triton as shakedrop_triton

SIZES = [(1, 0), (33, 1), (2048, 33), (2081, 2049), (2 * 2048 + 1187, 7)]
ULP = 2.0**-23
# Sums in another order and multiply-adds with one rounding instead of two.
BOUND_ULPS = 8.0


def draw(*sizes: int) -> list[Tensor]:
    return [torch.randn(size) for size in sizes]


def compare(ours: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of any buffer, in ulps of its largest value or of 1, whichever is larger.

    Operands are drawn from a standard normal distribution: a buffer of one element may cancel to nearly 0 and keep the
    rounding of the numbers that it was made of.
    """
    errors = []
    for a, b in zip(ours, expected, strict=True):
        ulp = ULP * max(float(b.float().nan_to_num().abs().max()) if b.numel() else 0.0, 1.0)
        ulp *= 2.0**13 if b.dtype == torch.float16 else 1.0
        difference = (a.double() - b.double()).nan_to_num(nan=1e9)
        errors.append(0.0 if torch.equal(a.nan_to_num(), b.nan_to_num()) else float(difference.abs().max()) / ulp)
    return max(errors)


def check_ascent(n: int, ascent: Ascent, poison: bool) -> float:
    w, g = draw(n, n)
    if poison:
        g[n // 2] = float("inf")
    partials = sam_triton.norm_squared(w, g, ascent)
    total = sam_cpu.norm_squared(w, g, ascent)
    sides = []
    for module in (sam_triton, sam_cpu):
        buffers = [w.clone(), torch.ones(n), torch.zeros(n // 3, dtype=torch.float16)]
        module.ascend(
            buffers[0], g.clone(), buffers[1], partials if module is sam_triton else total, ascent, buffers[2]
        )
        sides.append(buffers)
    return max(compare([partials.sum()[None]], [total.sum()[None]]), compare(*sides))


def check_step(n: int, m: int, settings: SGDSettings, restore: bool, decay: float, coefficient: float | None) -> float:
    w, g, v, saved, average, stats, old = draw(n, n, n, n, n, m, m)
    sides = []
    for module in (sgd_triton, sgd_cpu):
        buffers = [t.clone() for t in (w, v, average, old)] + [torch.zeros(n // 3, dtype=torch.float16)]
        averages = Averages(decay, buffers[2], stats, buffers[3]) if decay else None
        module.sgd_step(
            buffers[0], g.clone(), buffers[1], settings, torch.tensor([0.1]), saved=saved if restore else None,
            averages=averages, coefficient=None if coefficient is None else torch.tensor([coefficient]),
            working_copy=buffers[4],
        )  # fmt: skip
        sides.append(buffers)
    return compare(*sides)


def check_draws(blocks: int, batch: int, per_sample: bool, seed: int) -> float:
    """ShakeDrop's draws must be the same bits."""
    thresholds, counter = torch.randint(0, 2**24, (blocks,)), torch.randint(0, 2**32, (1,))
    ours = shakedrop_triton.scales(thresholds, counter, torch.tensor([seed]), batch, per_sample)
    return 0.0 if torch.equal(ours, shakedrop_reference.scales(thresholds, counter, seed, batch, per_sample)) else 1e9


def check_mix(batch: int, height: int, dtype: torch.dtype, settings: MixSettings, steps: int) -> float:
    """Mixed images, lambdas and labels must be the same bits."""
    images = torch.randn(batch, 3, height, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    tables = MixTables.of(settings.seed, torch.linspace(0, 1, 65536, dtype=torch.float64))
    worst = 0.0
    for step in range(steps):
        counters = torch.tensor([3]), torch.tensor([step])
        ours, target = mix_triton.mix_batch(images, labels, *counters, settings, tables)
        expected, wanted = mix_reference.mix_batch(images, labels, *counters, settings, tables)
        same = torch.equal(ours, expected) and all(torch.equal(a, b) for a, b in zip(target, wanted, strict=True))
        worst = max(worst, 0.0 if same else 1e9)
    return worst


def check_mixes() -> list[tuple[str, float]]:
    """Mix by images and by boxes, for whole batches and for each sample.

    Two batches are longer than what the permutation's kernel takes at once, which is less here than on a GPU: the
    interpreter takes a program for each sample. The small ones see more steps, each of which decides anew.
    """
    found, tile, chunk = [], 8, 32
    with mock.patch.multiple(mix_triton, TILE=tile, CHUNK=chunk):
        for batch, height, dtype, cutmix, per_sample, steps in [
            (chunk + 1, 5, torch.float32, 0.5, False, 1),
            (tile + 1, 6, torch.float32, 0.0, True, 1),
            (7, 8, torch.float16, 1.0, True, 2),
            (4, 8, torch.float32, 0.5, False, 8),
        ]:
            settings = MixSettings(2**63 + 5, 0.8, cutmix, 2.0, 1, per_sample)
            found.append((f"mix {batch} {height} {dtype} {settings}", check_mix(batch, height, dtype, settings, steps)))
    return found


def main() -> list[tuple[str, float, float]]:
    """Return all comparisons."""
    found = []
    for (n, _), adaptive, eta, share, poison in itertools.product(
        SIZES, (True, False), (0.0, 0.01), (1.0, 0.4), (False, True)
    ):
        ascent = Ascent(2.0, adaptive, eta, int(share * n))
        found.append([f"ascend {n} {ascent} poison={poison}", check_ascent(n, ascent, poison)])
    for (n, m), nesterov, restore, decay, coefficient in itertools.product(
        SIZES, (True, False), (True, False), (0.0, 0.999), (None, 0.25, float("nan"))
    ):
        settings = SGDSettings(0.9, nesterov, 5e-4, skip=True)
        what = f"step {n} {m} {settings} restore={restore} decay={decay} coefficient={coefficient}"
        found.append([what, check_step(n, m, settings, restore, decay, coefficient)])
    for blocks, batch, per_sample, seed in [(1, 1, False, 0), (5, 130, True, 42), (3, 128, False, -(2**62) - 7)]:
        what = f"ShakeDrop's draws: {blocks} blocks, {batch} samples, per_sample={per_sample}, seed {seed}"
        found.append([what, check_draws(blocks, batch, per_sample, seed)])
    found += check_mixes()
    twice = [sam_triton.norm_squared(*draws) for draws in [[torch.linspace(-1, 1, 9377)] * 2] * 2]
    found.append(["the norm's bits differ from run to run", 0.0 if torch.equal(*twice) else 1e9])
    return [(what, error, BOUND_ULPS) for what, error in found]
