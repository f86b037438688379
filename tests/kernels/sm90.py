"""Compile a Triton kernel for an H100 without having one, and read what it needs."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for_sm90(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int) -> Any:
    """Compile a kernel for compute capability 9.0.

    Args:
        kernel: a ``triton.jit`` function.
        constants: its constexpr arguments.
        types: Triton's types of the arguments that are not ``i32`` sizes, such as ``*fp32``. Pointers, and sizes called
            ``n`` or ``m`` or that end in ``_end``, count as multiples of 16.
        warps: per program.
    """
    signature, divisible = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        if kind.startswith("*") or name in ("n", "m") or name.endswith("_end"):
            divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def resources(compiled: Any) -> dict[str, int]:
    """Return what ``cuobjdump -res-usage`` says of a compiled kernel: REG, STACK, SHARED, LOCAL, ..."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    fields = [field.split(":") for field in done.stdout.split() if field.count(":") == 1]
    return {name: int(value) for name, value in fields if value.isdigit()}
