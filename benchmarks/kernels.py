"""Kernels without a benchmark of their own, each against the same computation in torch, compiled and eager. GPU only.

``batch_norm``: BatchNorm, ReLU and their backward pass, bf16, at the widths of WRN-16-8. ``mix`` and ``shakedrop``: the
kernels against their reference, which a CPU runs: torch operators that give the same bits. Every side is captured as a
CUDA graph, so that launches are compared as training pays for them, and many replays are in each measure.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import Row, alternate, device, main, result, timed
from fastcifar.augment.mix import beta_quantiles
from fastcifar.kernels.batch_norm import batch_norm
from fastcifar.kernels.mix import MixSettings, MixTables, channels_last, mix_batch
from fastcifar.kernels.mix import reference as mix_reference
from fastcifar.kernels.shakedrop import draw_scales
from fastcifar.kernels.shakedrop import reference as shakedrop_reference

BATCH = 128
SHAPES = ((128, 32), (256, 16), (512, 8))  # channels, side in pixels
BLOCKS = 54  # of PyramidNet-110
SAMPLE_S = 0.05  # the least time that one measure takes
Work = Callable[[], Any]


def sides_of_batch_norm(channels: int, side: int) -> dict[str, Work]:
    """Return forward + backward of BatchNorm and ReLU: ours, torch's compiled, torch's eager."""
    where = device()
    images = torch.randn(BATCH, channels, side, side, device=where, dtype=torch.bfloat16)
    x, grad = (channels_last(tensor).detach() for tensor in (images, torch.randn_like(images)))
    x.requires_grad_()
    weight, bias = (torch.ones(channels, device=where, requires_grad=True) for _ in range(2))
    running = torch.ones(2 * channels, device=where)  # means, then variances

    def ours(images: Tensor) -> Tensor:
        return batch_norm(images, weight, bias, running, channels, relu=True)[0]

    def torchs(images: Tensor) -> Tensor:
        mean, var = running.split(channels)
        return F.relu(F.batch_norm(images, mean, var, weight, bias, training=True))

    forwards = {"ours": ours, "torch, compiled": torch.compile(torchs, dynamic=False), "torch, eager": torchs}
    leaves = (x, weight, bias)
    return {name: lambda f=f: torch.autograd.grad(f(x), leaves, grad) for name, f in forwards.items()}  # type: ignore


def sides_of_mix() -> dict[str, Work]:
    """Return CutMix of a batch: our kernels, and the reference's torch operators."""
    where = device()
    settings = MixSettings(seed=0, p=1.0, cutmix_share=1.0, first_step=0.0, steps_per_epoch=391, per_sample=False)
    tables = MixTables.of(0, beta_quantiles(1.0)).to(where)
    images = channels_last(torch.randn(BATCH, 3, 32, 32, device=where, dtype=torch.bfloat16))
    labels = torch.randint(0, 10, (BATCH,), device=where)
    epoch, step = (torch.zeros(1, dtype=torch.int64, device=where) for _ in range(2))
    arguments = (images, labels, epoch, step, settings, tables)
    return {"ours": lambda: mix_batch(*arguments), "torch, eager": lambda: mix_reference.mix_batch(*arguments)}


def sides_of_shakedrop() -> dict[str, Work]:
    """Return the factors of all blocks of a pass: our kernel, and the reference's torch operators."""
    where = device()
    thresholds = torch.linspace(0, 2**23, BLOCKS, device=where).long()
    counter, seed = (torch.zeros(1, dtype=torch.int64, device=where) for _ in range(2))
    return {
        "ours": lambda: draw_scales(thresholds, counter, seed, BATCH, True),
        "torch, eager": lambda: shakedrop_reference.scales(thresholds, counter, 0, BATCH, True),
    }


def graphed(work: Work) -> Work:
    """Capture a call as a CUDA graph, after some warm-up calls, and return its replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def replays(replay: Work) -> Callable[[], float]:
    """Return a side for `alternate`: microseconds a replay, the mean of many in a row."""

    def measure() -> float:
        count = max(1, round(SAMPLE_S / max(timed(replay, device()), 1e-6)))
        return 1e6 * timed(lambda: [replay() for _ in range(count)], device()) / count

    return measure


def rows_of(name: str, sides: dict[str, Work], rounds: int) -> list[Row]:
    """Return our time against each other side's."""
    times = alternate({side: replays(graphed(work)) for side, work in sides.items()}, rounds)
    others = [side for side in times if side != "ours"]
    return [result(name, times["ours"], "us", side, times[side], higher_is_better=False) for side in others]


def run(quick: bool) -> list[Row]:
    """Measure each kernel, in microseconds; without a GPU there is nothing to measure."""
    if device().type != "cuda":
        print("kernels: these run on a GPU only, and there is none here: not measured yet", file=sys.stderr)
        return []
    rounds = 3 if quick else 9
    rows = []
    for channels, side in SHAPES[:1] if quick else SHAPES:
        name = f"BatchNorm, ReLU, backward: {BATCH} x {channels} x {side} x {side}"
        rows += rows_of(name, sides_of_batch_norm(channels, side), rounds)
    rows += rows_of(f"CutMix of {BATCH} images", sides_of_mix(), rounds)
    return rows + rows_of(f"ShakeDrop's factors, {BLOCKS} blocks", sides_of_shakedrop(), rounds)


if __name__ == "__main__":
    main("kernels", run)
