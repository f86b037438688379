"""The Triton kernels without a GPU: interpreted against plain torch, and compiled for sm_90."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcifar.kernels import flat_triton as kernels

ROOT = Path(__file__).parents[2]
# Sums in another order and multiply-adds with one rounding instead of two.
BOUND_ULPS = 8.0


def test_interpreted_kernels_equal_plain_torch() -> None:
    # A process of its own: Triton decides when a kernel is defined whether to interpret it.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.check_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) > 150
    assert [pair for pair in found if not pair[1] <= BOUND_ULPS] == []


FLOATS = set("weights grads partials saved momenta average stats stats_average rate coefficient".split())
SIZES = ("n", "m", "scaled_end", "shadow_end")
SGD = {"NESTEROV": True, "RESTORE": False, "AVERAGE": False, "SHADOW": False, "COEFFICIENT": False, "SKIP": False}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "norm": (kernels.norm_kernel, {"ADAPTIVE": False, "ROUNDS": 6}),
    "norm-adaptive": (kernels.norm_kernel, {"ADAPTIVE": True, "ROUNDS": 6}),
    "ascend-sam": (kernels.ascend_kernel, {"ADAPTIVE": False, "SHADOW": False, "PARTIALS": 1024}),
    "ascend-asam": (kernels.ascend_kernel, {"ADAPTIVE": True, "SHADOW": False, "PARTIALS": 1024}),
    "ascend-working_copy": (kernels.ascend_kernel, {"ADAPTIVE": True, "SHADOW": True, "PARTIALS": 1024}),
    "descend-sgd": (kernels.descend_kernel, SGD),
    "descend-ema": (kernels.descend_kernel, SGD | {"AVERAGE": True}),
    "descend-asam-ema": (kernels.descend_kernel, SGD | {"AVERAGE": True, "RESTORE": True}),
    "descend-everything": (kernels.descend_kernel, {name: True for name in SGD}),
}


def compile_for_sm90(kernel: Any, constants: dict[str, Any]) -> Any:
    constants = constants | {"BLOCK": kernels.BLOCK}
    signature, divisible = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = "*fp32" if name in FLOATS else "*bf16" if name == "working_copy" else "i32"
        kind = "fp32" if name in ("rho", "eta", "weight_decay", "momentum", "share") else kind
        signature[name] = "constexpr" if name in constants else kind
        if kind.startswith("*") or name in SIZES:
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})


def resources(cubin: bytes) -> dict[str, int]:
    """Return what ``cuobjdump -res-usage`` says: REG, STACK, SHARED, LOCAL, ..."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    fields = [field.split(":") for field in done.stdout.split() if field.count(":") == 1]
    return {name: int(value) for name, value in fields if value.isdigit()}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90_without_spills(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = compile_for_sm90(*KERNELS[name])
    used = resources(compiled.asm["cubin"])
    with capsys.disabled():
        print(f"\n  {name}: {used['REG']} registers, {used['STACK']} bytes of stack, {used['LOCAL']} spilled", end="")
    assert used["LOCAL"] == used["STACK"] == 0
    # 64 registers at 256 threads keep four programs on a multiprocessor, enough to saturate its memory.
    assert used["REG"] <= 64
    assert ".v4" in compiled.asm["ptx"], "memory is not read 16 bytes at a time"
    if "working_copy" in name or "everything" in name:
        assert "cvt.rn.bf16" in compiled.asm["ptx"], "the working_copy is not rounded to nearest"


@pytest.mark.gpu
def test_kernels_on_the_gpu_equal_plain_torch() -> None:
    import torch

    from fastcifar.kernels import flat_cpu as plain
    from fastcifar.kernels.flat import Ascent, Averages, Descent

    n, m, generator = 1_000_003, 12_345, torch.Generator("cuda").manual_seed(0)
    draw = lambda size: torch.randn(size, device="cuda", generator=generator)  # noqa: E731
    w, g, v, average, stats, old = draw(n), draw(n), draw(n), draw(n), draw(m), draw(m)
    lr = torch.full((1,), 0.1, device="cuda")
    sides = []
    for module in (kernels, plain):
        buffers = [t.clone() for t in (w, g, v, average, old)]
        saved, ascent = torch.zeros_like(w), Ascent(2.0, True, 0.01, n // 2)
        module.ascend(buffers[0], buffers[1], saved, module.norm_squared(w, g, ascent), ascent)
        climbed = buffers[0].clone()
        buffers[1].copy_(g)
        averages = Averages(0.999, buffers[3], stats, buffers[4])
        module.descend(*buffers[:3], Descent(0.9, True, 5e-4), lr, saved=saved, averages=averages)
        sides.append([climbed, *buffers])
    for ours, expected in zip(*sides, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
