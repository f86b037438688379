"""Starts a Python process on the null device, with a deadline, and returns a typed report of each of its jobs."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.nullgpu.build import CACHE, LIBRARY, build
from tests.nullgpu.report import Report

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One call of a function in scenarios.py, in the child process."""

    scenario: str
    arguments: dict[str, Any] = field(default_factory=dict)


class ChildFailed(AssertionError):
    """The child process crashed or passed its deadline; the message has the end of what it printed."""


def on_null_device(
    jobs: list[Job],
    folder: Path,
    *,
    deadline_s: float,
    compiled: Path | None = CACHE,
    graph_cache: bool = True,
    one_configuration: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Report]:
    """Execute jobs one after the other in one process on the null device.

    Args:
        jobs: what to do; they share the process, and so what it has imported and compiled.
        folder: empty; logs, modules and reports go there.
        deadline_s: after so long the child is killed. Generous: under load a compilation takes a multiple.
        compiled: where Triton's and Inductor's caches are; None for empty ones in ``folder``.
        graph_cache: whether Inductor may take whole graphs from its cache; their bytes are then unknown.
        one_configuration: compile only the first configuration of each generated kernel.
        environment: variables beside the usual ones, such as ``NULLGPU_MEMORY_BYTES``.

    Raises:
        ChildFailed: the process did not end well, so that a report is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = {"one_configuration": one_configuration, "jobs": [vars(job) for job in jobs]}
    (folder / "jobs.json").write_text(json.dumps(table))
    (folder / "modules").mkdir()
    variables = child_environment(folder, compiled or folder / "compiled", graph_cache) | (environment or {})
    printed = folder / "printed.txt"
    with printed.open("w") as out:
        command = [sys.executable, "-m", "tests.nullgpu.child", str(folder)]
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT)
        try:
            status: int | str = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            status = f"no end after {deadline_s:.0f} s"
        finally:
            process.kill()
            process.wait()
    paths = [folder / f"report-{number}.pickle" for number in range(len(jobs))]
    if status != 0 or not all(path.exists() for path in paths):
        tail = printed.read_text(errors="replace")[-3000:]
        raise ChildFailed(f"the process on the null device failed ({status}); it printed, at the end:\n{tail}")
    return [pickle.loads(path.read_bytes()) for path in paths]


def child_environment(folder: Path, compiled: Path, graph_cache: bool) -> dict[str, str]:
    """Return the environment of a process that shall see the null device."""
    library = build()
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    return kept | {
        "LD_PRELOAD": str(library / LIBRARY),
        "LD_LIBRARY_PATH": str(library),  # for libraries that link libcuda.so.1 by name
        "TRITON_LIBCUDA_PATH": str(library),
        "NULLGPU_MODULES": str(folder / "modules"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": str(int(graph_cache)),
        "TORCHINDUCTOR_AUTOGRAD_CACHE": str(int(graph_cache)),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the child itself: pools of processes outlive a deadline
        "TORCHINDUCTOR_SHAPE_PADDING": "0",  # whether padding a matrix product pays is decided by timing it
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
