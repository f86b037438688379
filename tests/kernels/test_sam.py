"""The ascent step of SAM: on the CPU against the papers' formula in float64, on sm_90, and on a GPU."""

from typing import Any

import pytest
import torch

from fastcifar.kernels.sam import Ascent, cpu, reference, triton
from tests.kernels.sm90 import compile_for_sm90, resources


@pytest.mark.parametrize("scaled_end", [1000, 333, 0])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("block", [64, 4096])
def test_the_cpu_follows_the_papers(
    monkeypatch: pytest.MonkeyPatch, adaptive: bool, scaled_end: int, block: int
) -> None:
    """Also in blocks that divide neither the buffer nor the scope."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    generator = torch.Generator().manual_seed(scaled_end)
    w, g = torch.randn(2, 1000, generator=generator).unbind()
    ascent, saved, copy = Ascent(2.0, adaptive, 0.01, scaled_end), torch.zeros(1000), torch.zeros(600).bfloat16()
    expected = reference.ascend(w.double(), g.double(), ascent)
    squared = (reference.scale(w.double(), ascent) * g.double()).square().sum()
    before, partials = w.clone(), cpu.norm_squared(w, g, ascent)
    cpu.ascend(w, g, saved, partials, ascent, copy)
    torch.testing.assert_close(partials.sum().double(), squared, rtol=1e-6, atol=0)
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(saved, before)
    assert torch.equal(copy, w[:600].bfloat16())


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    w, g = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).unbind()
    g[7] = float("inf")
    before, ascent = w.clone(), Ascent(2.0, True, 0.0, 50)
    cpu.ascend(w, g, torch.zeros(50), cpu.norm_squared(w, g, ascent), ascent)
    assert torch.equal(w, before)
    assert torch.equal(reference.ascend(before.double(), g.double(), ascent), before.double())


TYPES = {name: "*fp32" for name in ("weights", "grads", "partials", "saved")}
TYPES |= {"working_copy": "*bf16", "rho": "fp32", "eta": "fp32"}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "norm": (triton.norm_kernel, {"ADAPTIVE": False, "ROUNDS": 6}),
    "norm-adaptive": (triton.norm_kernel, {"ADAPTIVE": True, "ROUNDS": 6}),
    "ascend-sam": (triton.ascend_kernel, {"ADAPTIVE": False, "COPY": False, "PARTIALS": 1024}),
    "ascend-asam": (triton.ascend_kernel, {"ADAPTIVE": True, "COPY": False, "PARTIALS": 1024}),
    "ascend-working-copy": (triton.ascend_kernel, {"ADAPTIVE": True, "COPY": True, "PARTIALS": 1024}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90_without_spills(name: str) -> None:
    kernel, constants = KERNELS[name]
    compiled = compile_for_sm90(kernel, constants | {"BLOCK": triton.BLOCK}, TYPES, triton.WARPS)
    used = resources(compiled)
    assert used["LOCAL"] == used["STACK"] == 0
    # 64 registers at 256 threads keep four programs on a multiprocessor, enough to saturate its memory.
    assert used["REG"] <= 64
    assert ".v4" in compiled.asm["ptx"], "memory is not read 16 bytes at a time"
    if constants.get("COPY"):
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "the working copy is not rounded to nearest"


@pytest.mark.gpu
def test_the_gpu_equals_the_cpu() -> None:
    n, generator = 1_000_003, torch.Generator().manual_seed(0)
    w, g = torch.randn(2, n, generator=generator).unbind()
    ascent, sides = Ascent(2.0, True, 0.01, n // 2), []
    for module, device in ((triton, "cuda"), (cpu, "cpu")):
        weights, grads, saved = w.to(device, copy=True), g.to(device, copy=True), torch.zeros(n, device=device)
        module.ascend(weights, grads, saved, module.norm_squared(weights, grads, ascent), ascent)
        sides.append((weights.cpu(), saved.cpu()))
    for ours, expected in zip(*sides, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
