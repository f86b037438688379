"""What the child process does on the null device: a function for each kind of job, which returns what a test asks."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.nullgpu import internals
from tests.nullgpu.observe import cpu_s

SYNTHETIC = ("data.source=synthetic", "data.test_subset=30")


def run(recipe: str, out: str, changes: list[str], resume: bool = False, stop_after: int = 0) -> dict[str, Any]:
    """Run ``fastcifar run`` on synthetic images; with ``resume``, stop after one epoch and go on in a second call.

    The second call has a loader, a step and graphs of its own, as a new process would.
    """
    sets = [word for change in (*SYNTHETIC, *changes) for word in ("--set", change)]
    stop = ["--stop-after", str(stop_after or 1)] if resume or stop_after else []
    calls = [internals.command("run", recipe, "--out", out, "--quiet", *sets, *stop)]
    if resume:
        calls.append(internals.command("run", "--resume", out, "--quiet"))
    summary = internals.run_summary(Path(out)) if all(call["status"] == 0 for call in calls) else {}
    return {"calls": calls, "summary": summary, **internals.modes()}


def seeds(recipe: str, out: str, changes: list[str], count: int) -> dict[str, Any]:
    """Run several seeds side by side, and then the second of them alone."""
    sets = [word for change in (*SYNTHETIC, *changes) for word in ("--set", change)]
    internals.seen_draws.clear()
    calls = [internals.command("run", recipe, "--seeds", str(count), "--out", out, "--quiet", *sets)]
    together, second = list(internals.seen_draws), sorted({seed for seed, *_ in internals.seen_draws})[1]
    internals.seen_draws.clear()
    calls.append(internals.command("run", recipe, "--out", f"{out}-alone", "--quiet", *sets, "--set", f"seed={second}"))
    return {"calls": calls, "together": together, "alone": list(internals.seen_draws), **internals.modes()}


def steps(recipe: str, changes: list[str], odd: bool = True, evaluate: bool = True) -> dict[str, Any]:
    """Take a first step, a second one, evaluate, take an odd last batch, and begin a second epoch.

    ``compile_cpu_s`` of the result is the first step's: compiling one configuration of each kernel, and capturing.
    """
    bench = internals.Bench(recipe, changes)
    bench.step.begin_epoch(0)
    before = cpu_s()
    bench.step(bench.batch(0))
    compile_cpu_s, first_peak = cpu_s() - before, torch.cuda.max_memory_allocated()
    bench.step(bench.batch(1))
    if evaluate:
        bench.evaluator.warm_up(internals.IMAGE_SHAPE)
        bench.evaluate()
    if odd:
        bench.step(bench.batch(0, bench.size // 2 + 1))
    row = bench.step.end_epoch()
    bench.step.begin_epoch(1)
    bench.step(bench.batch(0))
    parameters = sum(p.numel() for p in bench.model.parameters())
    facts = {"parameters": parameters, "peak_bytes": first_peak, "compile_cpu_s": compile_cpu_s}
    return {"row": row, **facts, **internals.modes()}


# ------------------------------------------------------------------------------------------ the rules of stream capture


def capture_rule(case: str) -> dict[str, Any]:
    """Try something inside a capture and return whether torch was refused; `RULES` has the cases."""
    tensor, side, graph = torch.ones(8, device="cuda"), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    outside = torch.cuda.Event()
    outside.record(side)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            tensor.add_(1)
            RULES[case](tensor, side, outside)
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[0]}
    graph.replay()
    return {"refused": None}


def _joined(tensor: torch.Tensor, side: torch.cuda.Stream, outside: torch.cuda.Event) -> None:
    _forked(tensor, side, outside)
    torch.cuda.current_stream().wait_stream(side)


def _forked(tensor: torch.Tensor, side: torch.cuda.Stream, outside: torch.cuda.Event) -> None:
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor.mul_(2)


def _loader_works(tensor: torch.Tensor, side: torch.cuda.Stream, outside: torch.cuda.Event) -> None:
    """Page-lock and send memory on another thread, as a streaming loader does while the step is captured."""

    def send() -> None:
        with torch.cuda.stream(side):
            torch.ones(1 << 20).pin_memory().to("cuda", non_blocking=True)
        side.synchronize()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(send).result(timeout=60)


RULES: dict[str, Callable[[torch.Tensor, torch.cuda.Stream, torch.cuda.Event], Any]] = {
    "kernels": lambda tensor, side, outside: tensor.sum(),
    "item": lambda tensor, side, outside: tensor.sum().item(),
    "synchronize": lambda tensor, side, outside: torch.cuda.synchronize(),
    "wait for uncaptured work": lambda tensor, side, outside: torch.cuda.current_stream().wait_event(outside),
    "fork": _forked,
    "fork and join": _joined,
    "loader on another thread": _loader_works,
}


def memory() -> dict[str, Any]:
    """Return what torch sees of the device's memory: page-locked or not, bytes in use, copies there and back."""
    free, total = torch.cuda.mem_get_info()
    big = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    taken = free - torch.cuda.mem_get_info()[0]
    pinned, ordinary = torch.ones(4).pin_memory(), torch.ones(4)
    back = torch.full((4,), 7.0).to("cuda").cpu()
    del big
    return {
        "pinned": [pinned.is_pinned(), ordinary.is_pinned()], "taken": taken, "total": total, "back": back.tolist(),
        "name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------- what the engine must survive


def whole() -> dict[str, Any]:
    """Return what a failed capture is known to break: torch's generator, and its allocator's reuse of memory.

    A block that a side stream used comes back only when its event is asked for; an allocator that believes in a
    capture never asks, and takes new memory each time.
    """
    try:
        torch.nn.functional.dropout(torch.ones(8, device="cuda"), 0.5)
        dropout = "works"
    except RuntimeError as error:
        dropout = str(error).splitlines()[0]
    side, before = torch.cuda.Stream(), torch.cuda.memory_reserved()
    for _ in range(20):
        block = torch.empty(10_000_000, device="cuda")
        block.record_stream(side)
        del block
    return {"dropout": dropout, "grown_bytes": torch.cuda.memory_reserved() - before}


def failed_capture(recipe: str, changes: list[str]) -> dict[str, Any]:
    """Train a step that waits for the host, which no capture allows, and look at what that leaves behind."""
    bench = internals.Bench(recipe, changes, spoil=internals.Waiting)
    bench.step.begin_epoch(0)
    try:
        bench.step(bench.batch(0))
        ended = "trained"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    return {"ended": ended, **internals.modes(), **whole()}


def out_of_memory(recipe: str, changes: list[str], spare_bytes: int) -> dict[str, Any]:
    """Train a step on a device that has only so much memory left when the step begins."""
    bench = internals.Bench(recipe, changes)
    bench.step.begin_epoch(0)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    os.environ["NULLGPU_MEMORY_BYTES"] = str(total - free + spare_bytes)
    try:
        bench.step(bench.batch(0))
        ended = "trained"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    finally:
        del os.environ["NULLGPU_MEMORY_BYTES"]
    return {"ended": ended, **internals.modes()}


def with_fault(fault: str, scenario: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Execute another scenario while the project has a fault that it once had; see `internals.FAULTS`."""
    with internals.fault(fault):
        facts: dict[str, Any] = globals()[scenario](**arguments)
    return facts


class WideIndices(torch.nn.Module):
    """Random words as Philox makes them, from an ``arange`` times a constant above 2**31 inside the model."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale each image (B, C, H, W) by a number drawn from its position."""
        words = torch.arange(len(images), device=images.device) * 0xCD9E8D57
        return images * (words & 0xFFFF).to(images.dtype)[:, None, None, None]


def compile_wide_indices() -> dict[str, Any]:
    """Compile `WideIndices`: Inductor makes an int32 index expression of it on a GPU, which Triton refuses."""
    torch.compile(WideIndices(), dynamic=False)(torch.ones(2, 3, 4, 4, device="cuda"))
    return {}


def graph_break() -> dict[str, Any]:
    """Compile a function in which dynamo must break the graph."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(broken, dynamic=False)(torch.ones(8, device="cuda"))
    return {}
