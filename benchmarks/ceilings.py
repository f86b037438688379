"""What this hardware can do at most: memory copy bandwidth and matrix products. Other results are read against it."""

from collections.abc import Callable

import torch

from common import Row, alternate, device, main, result, timed


def copy(bytes_moved: int, where: torch.device) -> Callable[[], float]:
    """Return a call that copies inside the device's memory and returns GB/s, bytes read and written both counted."""
    source = torch.ones(bytes_moved // 2 // 4, device=where)
    target = torch.empty_like(source)
    return lambda: bytes_moved / 1e9 / timed(lambda: target.copy_(source), where)


def product(size: int, dtype: torch.dtype, repeats: int, where: torch.device) -> Callable[[], float]:
    """Return a call that multiplies square matrices of random numbers and returns TFLOP/s (2 size^3 a product)."""
    generator = torch.Generator(where).manual_seed(0)
    a, b = (torch.randn(size, size, device=where, generator=generator).to(dtype) for _ in range(2))
    target = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=target)

    return lambda: 2 * size**3 * repeats / 1e12 / timed(multiply, where)


def run(quick: bool) -> list[Row]:
    """Measure copy bandwidth (GB/s) and bf16 and fp32 products (TFLOP/s); smaller ones without a GPU."""
    where = device()
    gpu = where.type == "cuda"
    size, repeats = (8192, 10) if gpu else (512 if quick else 1024, 1)
    moved = (2**33 if gpu else 2**29) >> (2 if quick else 0)
    sides = {
        f"copy of {moved // 2**20:,} MiB": copy(moved, where),
        f"bf16 matrix product {size}": product(size, torch.bfloat16, repeats, where),
        f"fp32 matrix product {size}": product(size, torch.float32, repeats, where),
    }
    measures = alternate(sides, n=3 if quick else 20, warmup=2)
    return [result(name, values, "GB/s" if "copy" in name else "TFLOP/s") for name, values in measures.items()]


if __name__ == "__main__":
    main("ceilings", run)
