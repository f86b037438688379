"""The optimizer step: on the CPU against torch.optim.SGD's formula in float64, on sm_90, and on a GPU."""

from typing import Any

import pytest
import torch

from fastcifar.kernels.sgd_ema import Averages, SGDSettings, cpu, reference, triton
from tests.kernels.sm90 import compile_for_sm90, resources


@pytest.mark.parametrize("coefficient", [None, 0.25, float("nan")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("block", [64, 4096])
def test_the_cpu_follows_the_formula(
    monkeypatch: pytest.MonkeyPatch, nesterov: bool, coefficient: float | None, block: int
) -> None:
    """With restored weights, averages and a working copy, also in blocks that do not divide the buffer."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    w, g, v, a, saved = torch.randn(5, 1000, generator=generator).unbind()
    stats, old, copy = torch.randn(30, generator=generator), torch.randn(30, generator=generator), torch.zeros(600)
    settings = SGDSettings(0.9, nesterov, 5e-4, skip=True)
    weights, momentum = reference.sgd_step(
        saved.double(), g.double(), v.double(), settings, 0.1, 1.0 if coefficient is None else coefficient
    )
    expected = {
        "weights": weights, "momentum": momentum,
        "average": reference.average(a.double(), weights, 0.9),
        "stats": reference.average(old.double(), stats.double(), 0.9),
    }  # fmt: skip
    cpu.sgd_step(
        w, g, v, settings, 0.1, saved=saved, averages=Averages(0.9, a, stats, old), working_copy=copy,
        coefficient=None if coefficient is None else torch.tensor([coefficient]),
    )  # fmt: skip
    for name, found in (("weights", w), ("momentum", v), ("average", a), ("stats", old)):
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(copy, w[:600])


def test_without_skip_a_bad_coefficient_shows() -> None:
    w, g, v = torch.ones(3, 10).unbind()
    cpu.sgd_step(w, g, v, SGDSettings(0.9, True, 0.0), 0.1, coefficient=torch.tensor([float("nan")]))
    assert w.isnan().all()


TYPES = {name: "*fp32" for name in "weights grads momenta saved average stats stats_average rate coefficient".split()}
TYPES |= {"working_copy": "*bf16", "weight_decay": "fp32", "momentum": "fp32", "share": "fp32"}
SGD = {"NESTEROV": True, "RESTORE": False, "AVERAGE": False, "COPY": False, "COEFFICIENT": False, "SKIP": False}
CASES: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "ema": SGD | {"AVERAGE": True},
    "sam-ema": SGD | {"AVERAGE": True, "RESTORE": True},
    "everything": {name: True for name in SGD},
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_for_sm90_without_spills(name: str) -> None:
    compiled = compile_for_sm90(triton.sgd_kernel, CASES[name] | {"BLOCK": triton.BLOCK}, TYPES, triton.WARPS)
    used = resources(compiled)
    assert used["LOCAL"] == used["STACK"] == 0
    assert used["REG"] <= 64
    assert ".v4" in compiled.asm["ptx"], "memory is not read 16 bytes at a time"
    if CASES[name]["COPY"]:
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "the working copy is not rounded to nearest"


@pytest.mark.gpu
def test_the_gpu_equals_the_cpu() -> None:
    n, m, generator = 1_000_003, 12_345, torch.Generator().manual_seed(0)
    w, g, v, average, saved = torch.randn(5, n, generator=generator).unbind()
    stats, old = torch.randn(2, m, generator=generator).unbind()
    sides = []
    for module, device in ((triton, "cuda"), (cpu, "cpu")):
        buffers = [t.to(device, copy=True) for t in (w, v, average, old)]
        averages = Averages(0.999, buffers[2], stats.to(device), buffers[3])
        module.sgd_step(
            buffers[0], g.to(device, copy=True), buffers[1], SGDSettings(0.9, True, 5e-4),
            torch.full((1,), 0.1, device=device), saved=saved.to(device), averages=averages,
        )  # fmt: skip
        sides.append([t.cpu() for t in buffers])
    for ours, expected in zip(*sides, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
