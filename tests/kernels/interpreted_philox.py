"""In Triton's interpreter: tl.philox gives the integers of fastcifar.kernels.philox."""

import torch
import triton
import triton.language as tl

from fastcifar.kernels.philox import philox


@triton.jit
def kernel(seed_at, counters, out, N: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(seed_at)
    c0, c1 = tl.load(counters + i).to(tl.uint32), tl.load(counters + N + i).to(tl.uint32)
    c2, c3 = tl.load(counters + 2 * N + i).to(tl.uint32), tl.load(counters + 3 * N + i).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + N + i, w1.to(tl.int64))
    tl.store(out + 2 * N + i, w2.to(tl.int64))
    tl.store(out + 3 * N + i, w3.to(tl.int64))


def main() -> list[tuple[str, float, float]]:
    """Return whether the words are wrong, for some seeds."""
    found = []
    for seed in (0, 42, 2**31 + 5, 2**63 - 1):
        counters = torch.randint(0, 2**32, (4, 64))
        counters[3] = 3
        out = torch.zeros(4, 64, dtype=torch.int64)
        kernel[(1,)](torch.tensor([seed]), counters, out, N=64)
        expected = torch.stack(philox(seed, counters[0], counters[1], counters[2], 3))
        found.append((f"words of seed {seed}", float(not torch.equal(out, expected)), 0.0))
    return found
