"""Run the Triton kernels in the interpreter against plain torch; started with TRITON_INTERPRET=1 by test_kernels.py.

It prints one JSON list of [what, error in units of the last place of the largest value of that buffer].
"""

import itertools
import json

import torch
from torch import Tensor

from fastcifar.kernels import flat_cpu as plain
from fastcifar.kernels import flat_triton as kernels
from fastcifar.kernels.flat import Ascent, Averages, Descent

SIZES = [(1, 0), (33, 1), (2048, 33), (2081, 2049), (4 * 2048 + 1187, 7)]
ULP = 2.0**-23


def draw(*sizes: int) -> list[Tensor]:
    return [torch.randn(size) for size in sizes]


def compare(ours: list[Tensor], plains: list[Tensor]) -> float:
    """Return the largest difference of any buffer, in ulps of the buffer's largest value."""
    errors = []
    for a, b in zip(ours, plains, strict=True):
        ulp = ULP * max(float(b.float().nan_to_num().abs().max()) if b.numel() else 0.0, 1e-30)
        ulp *= 2.0**13 if b.dtype == torch.float16 else 1.0
        difference = (a.double() - b.double()).nan_to_num(nan=1e9)
        errors.append(0.0 if torch.equal(a.nan_to_num(), b.nan_to_num()) else float(difference.abs().max()) / ulp)
    return max(errors)


def check_climb(n: int, ascent: Ascent, poison: bool) -> float:
    w, g = draw(n, n)
    if poison:
        g[n // 2] = float("inf")
    partials = kernels.norm_squared(w, g, ascent)
    total = plain.norm_squared(w, g, ascent)
    sides = []
    for module in (kernels, plain):
        buffers = [w.clone(), g.clone(), torch.ones(n), torch.zeros(n // 3, dtype=torch.float16)]
        module.ascend(*buffers[:3], partials if module is kernels else total, ascent, buffers[3])
        sides.append(buffers)
    return max(compare([partials.sum()[None]], [total.sum()[None]]), compare(*sides))


def check_descent(n: int, m: int, descent: Descent, restore: bool, decay: float, coefficient: float | None) -> float:
    w, g, v, saved, average, stats, old = draw(n, n, n, n, n, m, m)
    sides = []
    for module in (kernels, plain):
        buffers = [t.clone() for t in (w, g, v, average, old)] + [torch.zeros(n // 3, dtype=torch.float16)]
        averages = Averages(decay, buffers[3], stats, buffers[4]) if decay else None
        module.descend(
            *buffers[:3], descent, torch.tensor([0.1]), saved=saved if restore else None, averages=averages,
            coefficient=None if coefficient is None else torch.tensor([coefficient]), working_copy=buffers[5],
        )  # fmt: skip
        sides.append(buffers)
    return compare(*sides)


def main() -> None:
    torch.manual_seed(0)
    found = []
    for (n, _), adaptive, eta, share, poison in itertools.product(
        SIZES, (True, False), (0.0, 0.01), (1.0, 0.4), (False, True)
    ):
        ascent = Ascent(2.0, adaptive, eta, int(share * n))
        found.append([f"ascend {n} {ascent} poison={poison}", check_climb(n, ascent, poison)])
    for (n, m), nesterov, restore, decay, coefficient in itertools.product(
        SIZES, (True, False), (True, False), (0.0, 0.999), (None, 0.25, float("nan"))
    ):
        descent = Descent(0.9, nesterov, 5e-4, skip=True)
        what = f"descent {n} {m} {descent} restore={restore} decay={decay} coefficient={coefficient}"
        found.append([what, check_descent(n, m, descent, restore, decay, coefficient)])
    twice = [kernels.norm_squared(*draws) for draws in [[torch.linspace(-1, 1, 9377)] * 2] * 2]
    found.append(["the norm's bits differ from run to run", 0.0 if torch.equal(*twice) else 1e9])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
