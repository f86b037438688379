"""Observes one job in the child process: marks in the device's log, what Inductor compiled, counters of torch."""

import ctypes
import os
import re
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.nullgpu.report import Graph, Kernel, LogReader, Report

DEVICE = ctypes.CDLL("libcuda.so.1")
graphs: dict[int, Graph] = {}
"""What Inductor has compiled in this process, by the number that its calls leave in the log."""


def mark(word: str, detail: Any = "") -> None:
    """Write a line of our own into the device's log."""
    DEVICE.nullgpu_mark(word.encode(), str(detail).encode())


def watch_inductor() -> None:
    """Count the bytes of every graph that Inductor compiles, and mark every call of one.

    A graph that comes out of Inductor's cache was not scheduled here; its bytes are unknown and its calls are marked
    with -1.
    """
    from torch._inductor.graph import GraphLowering
    from torch._inductor.output_code import CompiledFxGraph

    made, called = CompiledFxGraph.__init__, CompiledFxGraph.__call__

    def init(self: Any, current_callable: Any, graph: GraphLowering, *args: Any, **kwargs: Any) -> None:
        made(self, current_callable, graph, *args, **kwargs)
        self.nullgpu_number = len(graphs)
        graphs[self.nullgpu_number] = _describe(graph)

    def call(self: Any, inputs: Any) -> Any:
        mark(f"graph {getattr(self, 'nullgpu_number', -1)}")
        return called(self, inputs)

    CompiledFxGraph.__init__, CompiledFxGraph.__call__ = init, call  # type: ignore[method-assign]


def _describe(graph: Any) -> Graph:
    moved = {True: 0, False: 0}
    for node in graph.scheduler.nodes:
        moved[bool(node.is_extern())] += int(node.get_read_write_buffers_sizes())
    return Graph(bool(graph.is_backward), generated_bytes=moved[False], library_bytes=moved[True])


def compile_one_configuration() -> None:
    """Let Inductor compile the first configuration of each kernel only.

    Choosing among several means timing them, which the null device cannot; it would compile them all for nothing.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    made = CachingAutotuner.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if "configs" in kwargs:
            kwargs["configs"] = kwargs["configs"][:1]
        made(self, *args, **kwargs)

    CachingAutotuner.__init__ = init  # type: ignore[method-assign]


def observe(work: Callable[[], dict[str, Any]], log: Path) -> Report:
    """Execute a job and return all that was seen of it; an exception of the job is part of the report."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    torch.cuda.reset_peak_memory_stats()
    DEVICE.nullgpu_open(str(log).encode())
    facts, error, began_cpu_s = {}, None, cpu_s()
    try:
        facts = work()
    except Exception:
        error = traceback.format_exc()
    report = LogReader().read(log)
    DEVICE.nullgpu_open(None)
    report.facts, report.error, report.cpu_s = facts, error, cpu_s() - began_cpu_s
    report.graph_breaks = {str(k): int(v) for k, v in counters["graph_break"].items()}
    caches = counters["inductor"] | counters["aot_autograd"]
    report.caches = {str(k): int(v) for k, v in caches.items() if "cache" in k}
    report.graphs = dict(graphs)
    report.kernels = loaded_kernels(log)
    report.peak_bytes = torch.cuda.max_memory_allocated()
    report.reserved_bytes = torch.cuda.memory_reserved()
    return report


def cpu_s() -> float:
    """Return the processor seconds so far of this process and of its children that have ended (ptxas)."""
    return sum(os.times()[:4])


# ------------------------------------------------------------------------------------------------------------- cubins


def loaded_kernels(log: Path) -> list[Kernel]:
    """Return registers and stack of every module that the log says was loaded, as cuobjdump reads them."""
    from tests.nullgpu.report import read_lines

    folder = Path(os.environ["NULLGPU_MODULES"])
    names = sorted({line.name for line in read_lines(log) if line.kind == "module"})
    return [kernel for name in names for kernel in read_cubin(folder / name)]


def read_cubin(path: Path) -> list[Kernel]:
    """Return the kernels of one compiled module."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True, env={}, timeout=60)
    kernels = []
    for name, usage in re.findall(r"Function (\S+):\s*\n\s*(.*)", done.stdout):
        numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        stack = numbers.get("STACK", 0) + numbers.get("LOCAL", 0)
        kernels.append(Kernel(name, numbers.get("REG", 0), stack, target_of(path.read_bytes())))
    return kernels


def target_of(image: bytes) -> str:
    """Return what a compiled module is for, such as ``sm_90``: a byte of its ELF header's flags.

    Which byte depends on the version of the binary interface (8 since CUDA 13).
    """
    flags, version = int.from_bytes(image[48:52], "little"), image[8]
    return f"sm_{flags >> 8 & 0xFF if version >= 8 else flags & 0xFF}"
