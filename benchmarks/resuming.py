"""For benchmarks of many parts: what is measured is in the results file at once, and another start goes on after it."""

from pathlib import Path
from typing import Any

from common import Row, report_of
from fastcifar.cli.bench import hardware, merge, read_results, results_name
from fastcifar.locations import new_results_folder
from fastcifar.models.budget import results_of


def unfinished(benchmark: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the results file to go on with, and its unfinished report; None where there is none that fits this start.

    Args:
        benchmark: the name that its reports have.
    """
    now = report_of(benchmark, False, [])
    fresh = new_results_folder() / results_name(now["environment"])
    paths = results_of(new_results_folder(), hardware(now["environment"]))
    found = [(path, r) for path in paths for r in read_results(path)["benchmarks"] if r["benchmark"] == benchmark]
    if not found or found[-1][1].get("complete", True) or sources(found[-1][1]) != sources(now):
        return fresh, None
    return found[-1]


def sources(report: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows of one report have to share: the commit, torch, Triton, and the hardware."""
    environment = report["environment"]
    packages = environment["packages"]
    return environment["git"], packages.get("torch"), packages.get("triton"), environment["hardware"]


def keep(path: Path, benchmark: str, rows: list[Row], **more: Any) -> None:
    """Write the rows so far, and what the next start needs beside them, into the results file."""
    merge(path, report_of(benchmark, False, rows) | {"complete": False} | more)
