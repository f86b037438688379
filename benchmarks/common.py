"""What all benchmarks share: alternating sides, medians with their spread, pairwise ratios, one output format.

A benchmark is a file ``benchmarks/NAME.py`` that ends with ``main("NAME", run)``; ``run(quick)`` returns a list of
`result` rows. It starts as ``python benchmarks/NAME.py [--quick] [--json]``, so it says ``from common import ...``.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastcifar.environment import describe
from fastcifar.errors import UserError

Row = dict[str, Any]
# What the two sides in published.py are called in results and tables; tools/tables.py looks rows up by these labels.
THEIR_LOOP = "our reimplementation of windopper/cifar's training loop"
THEIR_LOADER = "our reimplementation of windopper/cifar's DataLoader"


def alternate(sides: dict[str, Callable[[], float]], n: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run the sides in turn (A B A B ...), so that a machine that slows down slows all of them.

    Args:
        sides: name -> a call that does one timed part and returns its own measure (images/s, seconds, ...).
        n: measured rounds.
        warmup: rounds before them whose measures are dropped (compilation, caches, clocks).

    Returns:
        name -> n measures; element i of each side comes from the same round.
    """
    rounds = [{name: float(side()) for name, side in sides.items()} for _ in range(warmup + n)]
    return {name: [measures[name] for measures in rounds[warmup:]] for name in sides}


def result(
    name: str,
    values: Iterable[float],
    unit: str,
    baseline: str | None = None,
    baseline_values: Iterable[float] | None = None,
    higher_is_better: bool = True,
) -> Row:
    """Return one row: the median and spread of ``values`` and how much faster that is than the baseline.

    Args:
        name: what was measured.
        values: n measures of this side, from `alternate`.
        unit: of the values.
        baseline: name of the side to compare with.
        baseline_values: its n measures from the same rounds.
        higher_is_better: False for times; a ratio above 1 always means that this side is faster.

    Returns:
        ``{"name", "value", "unit", "spread": [low, high], "n", "baseline", "ratio", "ratio_spread"}``; the ratio is
        the median of the pairwise ratios, its spread their smallest and largest.
    """
    values = list(values)
    row: Row = {"name": name, "value": statistics.median(values), "unit": unit}
    row |= {"spread": [min(values), max(values)], "n": len(values)}
    row |= {"baseline": baseline, "ratio": None, "ratio_spread": None}
    if baseline is not None and baseline_values is not None:
        pairs = list(zip(values, baseline_values, strict=True))
        ratios = [ours / theirs if higher_is_better else theirs / ours for ours, theirs in pairs]
        row |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
    return row


def timed(work: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Return the seconds that one call of ``work`` takes, on the device's own clock (CUDA events) where it has one."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def device() -> torch.device:
    """Return the device that benchmarks use: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(name: str, run: Callable[[bool], list[Row]]) -> None:
    """Parse ``--quick`` and ``--json``, run, print the table to stderr and, with ``--json``, the object to stdout."""
    execute(name, parser_of(name).parse_args(), run)


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few repeats: seconds instead of minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    return parser


def execute(
    name: str, arguments: argparse.Namespace, run: Callable[[bool], list[Row]], recipes: list[str] | None = None
) -> None:
    """Run a benchmark with parsed options; see `main`. ``recipes`` are those that it was told to measure."""
    be_strict()
    try:
        rows = run(arguments.quick)
    except UserError as error:
        sys.exit(f"fastcifar: bench {name.replace('_', '-')}: {error}")
    except KeyboardInterrupt:  # Ctrl-C, which `fastcifar bench` hands on after its own words
        sys.exit(130)
    report = report_of(name, arguments.quick, rows) | ({"recipes": recipes} if recipes else {})
    show(report)
    if arguments.json:
        json.dump(report, sys.stdout, indent=1)
        print()


def be_strict() -> None:
    """Make any fallback of a step an error (as ``engine.strict``): a benchmark measures what it says, or nothing."""
    os.environ.setdefault("FASTCIFAR_STRICT", "1")


def report_of(name: str, quick: bool, rows: list[Row]) -> dict[str, Any]:
    """Return a benchmark's report, as it is printed and kept: with today's date and this environment."""
    environment = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **describe()}
    return {"benchmark": name, "quick": quick, "environment": environment, "results": rows}


def show(report: dict[str, Any]) -> None:
    """Print a benchmark's rows as a table to stderr."""
    table = Table(title=f"{report['benchmark']} on {report['environment']['hardware']}")
    for column in ("what", "median", "spread", "unit", "n", "times faster", "than"):
        table.add_column(column)
    for row in report["results"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} ({_span(row['ratio_spread'])})"
        spread = _span(row["spread"])
        table.add_row(row["name"], f"{row['value']:,.5g}", spread, row["unit"], str(row["n"]), ratio, row["baseline"])
    Console(stderr=True, highlight=False).print(table)


def _span(pair: list[float]) -> str:
    return f"{pair[0]:,.4g} to {pair[1]:,.4g}"
