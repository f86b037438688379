"""What the child process does on the null device: a function for each kind of job, which returns what a test asks."""

from pathlib import Path
from typing import Any

import torch

from tests.nullgpu import internals

SYNTHETIC = ("data.source=synthetic", "data.test_subset=3")


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


def steps(recipe: str, changes: list[str], odd: bool = True, evaluate: bool = True) -> dict[str, Any]:
    """Take a first step, a second one, evaluate, take an odd last batch, and begin a second epoch."""
    bench = internals.Bench(recipe, changes)
    bench.step.begin_epoch(0)
    for number in (0, 1):
        bench.step(bench.batch(number))
    first_peak = torch.cuda.max_memory_allocated()
    if evaluate:
        bench.evaluate()
    if odd:
        bench.step(bench.batch(0, bench.size // 2 + 1))
    row = bench.step.end_epoch()
    bench.step.begin_epoch(1)
    bench.step(bench.batch(0))
    parameters = sum(p.numel() for p in bench.model.parameters())
    return {"row": row, "parameters": parameters, "peak_bytes": first_peak, **internals.modes()}
