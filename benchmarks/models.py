"""Forward + backward of every model: images/s and peak memory. On a CPU these say nothing about a GPU.

Each model runs in a process of its own, so that its peak memory is its own. The GPU's column is measured where there
is one, and is "not measured yet" where there is none.
"""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.nn import functional as F

from common import Row, device, main, result, timed
from fastcifar.cli.models import CATALOGUE
from fastcifar.config.schema import ModelConfig
from fastcifar.models import bind_counter, build_model

QUICK = ("lenet5", "deep_baseline_bn", "speednet")
BATCH = {"cpu": 16, "cuda": 512}
PART_S = 0.5
"""The least time that one measure takes."""


def forward_backward(name: str, batch: int, where: torch.device) -> Callable[[], Any]:
    """Return a call that runs one batch of random images forward and backward, in bf16 autocast."""
    model = build_model(TypeAdapter(ModelConfig).validate_python(CATALOGUE[name]), seed=0).to(where)
    bind_counter(model, torch.ones(1, dtype=torch.int64, device=where), seed=0)
    images = torch.randn(batch, 3, 32, 32, device=where).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=where)

    def work() -> None:
        with torch.autocast(where.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        model.zero_grad(set_to_none=True)
        loss.backward()

    return work


def peak_bytes(where: torch.device) -> int:
    """Return the peak memory of this process so far: of the GPU's allocator, or resident on the host."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(name: str, n: int, where_type: str) -> dict[str, Any]:
    """Return a model's images/s (n measures) and how many bytes its batch added to the process's peak."""
    where = torch.device(where_type)
    batch = BATCH[where.type]
    before = peak_bytes(where)
    work = forward_backward(name, batch, where)
    work()
    repeats = max(1, round(PART_S / timed(work, where)))
    parts = [timed(lambda: [work() for _ in range(repeats)], where) for _ in range(n)]
    return {"rates": [batch * repeats / seconds for seconds in parts], "bytes": peak_bytes(where) - before}


def run(quick: bool) -> list[Row]:
    rows, where = [], device()
    for name in QUICK if quick else CATALOGUE:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(measure, name, 1 if quick else 3, where.type).result()
        rows.append(result(f"{name}: forward + backward", found["rates"], "images/s"))
        rows.append(result(f"{name}: peak memory", [found["bytes"] / 2**20], "MiB"))
    print(f"eager, bf16, batch {BATCH[where.type]}, on {where.type}", file=sys.stderr)
    if where.type != "cuda":
        print("on a GPU: not measured yet", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main("models", run)
