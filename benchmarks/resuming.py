"""For benchmarks of many parts: what is measured is in the results file at once, and another start goes on after it.

It does so from the same commit alone: with changes that are not committed, every start measures anew.
"""

from pathlib import Path
from typing import Any

from common import Row, report_of
from fastcifar.cli.bench import hardware, is_complete, merge, read_results, recipes_of, results_name
from fastcifar.locations import new_results_folder
from fastcifar.models.budget import results_of


def unfinished(benchmark: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the results file to go on with, and its unfinished report; None where there is none that fits this start.

    Args:
        benchmark: the name that its reports have.
    """
    now = report_of(benchmark, False, [])
    found = reports(benchmark)
    if not found or is_complete(found[-1][1]) or not same_sources(found[-1][1], now):
        return new_results_folder() / results_name(now["environment"]), None
    return found[-1]


def reports(benchmark: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return a benchmark's reports on this hardware with the files that they are in, oldest first."""
    environment = report_of(benchmark, False, [])["environment"]
    paths = results_of(new_results_folder(), hardware(environment))
    return [(path, r) for path in paths for r in read_results(path)["benchmarks"] if r["benchmark"] == benchmark]


def kept_runs(benchmark: str) -> dict[str, Any]:
    """Return the runs that these sources made and that unfinished reports hold; a finished one takes its own along."""
    now, pending = report_of(benchmark, False, []), {}
    for _, report in reports(benchmark):
        unfinished_here = not is_complete(report) and same_sources(report, now)
        pending[recipes_of(report)] = report.get("runs", {}) if unfinished_here else {}
    return {key: run for runs in pending.values() for key, run in runs.items()}


def same_sources(report: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether the same sources made two reports.

    A working tree with changes (``+``) may have had others since, and of code without a revision nothing is known.
    """
    revision = report["environment"]["git"]
    return bool(revision) and not revision.endswith("+") and sources(report) == sources(other)


def sources(report: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows of one report have to share: the commit, torch, Triton, and the hardware."""
    environment = report["environment"]
    packages = environment["packages"]
    return environment["git"], packages.get("torch"), packages.get("triton"), environment["hardware"]


def keep(path: Path | None, benchmark: str, rows: list[Row], **more: Any) -> None:
    """Write the rows so far, and what the next start needs beside them, into a results file; None for today's."""
    report = report_of(benchmark, False, rows) | {"complete": False} | more
    merge(path or new_results_folder() / results_name(report["environment"]), report)
