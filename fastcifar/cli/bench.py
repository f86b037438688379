"""``fastcifar bench``: run the benchmarks and keep their results in one file per day and hardware."""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fastcifar.console import err, out
from fastcifar.errors import UserError, nearest
from fastcifar.locations import benchmarks_folder, new_results_folder
from fastcifar.text import slug

NAMES = (
    "ceilings", "loaders", "augment", "optimizer", "kernels", "step", "models", "step-times", "time-to-accuracy",
    "launches", "large-data", "seeds", "jobs",
)  # fmt: skip
POLL_S = 0.2
# A benchmark has nothing to save. Shorter than what `make gpu` leaves this command, which is killed then, and could not
# end a benchmark any more.
GRACE_S = 10.0
OWN_FILES = {"launches": "launches.json"}
"""Benchmarks that keep their results themselves, and where."""


def bench(
    names: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(NAMES)}, or all (the default)")] = None,
    quick: Annotated[bool, typer.Option(help="tiny sizes and few repeats: seconds instead of minutes")] = False,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object to stdout")] = False,
    to: Annotated[Path | None, typer.Option("--out", help="results file, instead of benchmarks/results/...")] = None,
    contract: Annotated[
        bool, typer.Option("--contract", help="time-to-accuracy: time as the speed records do; mean, error, p-value")
    ] = False,
    recipe: Annotated[
        list[str] | None, typer.Option(help="time-to-accuracy: train this one, with its target; step: take its step")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, max=10_000, help="time-to-accuracy: how many seeds")] = None,
) -> None:
    """Run benchmarks; each compares sides in turn and reports medians, spreads and ratios.

    The results go into benchmarks/results/<date>-<hardware>.json, in the clone or, where fastcifar is installed from a
    wheel, in the working directory; a quick result never replaces a full one.
    """
    folder = benchmarks_folder()
    reports, failed = [], []
    options = options_of(names, contract, recipe, runs)
    if to:
        refuse_results(to)
    for name in chosen(names or ["all"]):
        report = run_one(folder / f"{name.replace('-', '_')}.py", [*(["--quick"] if quick else []), *options])
        if report is None:
            failed.append(name)
            continue
        reports.append(report)
        if not report["results"]:  # it has said why
            continue
        path = to or new_results_folder() / OWN_FILES.get(name, results_name(report["environment"]))
        if to or name not in OWN_FILES:
            merge(path, report)
        err.print(f"{name}: in {path}")
    if json_:
        out({"environment": reports[-1]["environment"] if reports else None, "benchmarks": reports, "failed": failed})
    if failed:
        err.print(f"failed, for the reasons above: {', '.join(failed)}", style="red")
        raise typer.Exit(1)


def chosen(names: list[str]) -> list[str]:
    """Return the benchmarks that the names mean, in the suite's order; underscores count as hyphens.

    Raises:
        UserError: an unknown name.
    """
    wanted = [name.replace("_", "-") for name in names]
    for name in wanted:
        if name not in (*NAMES, "all"):
            raise UserError(f'bench: no benchmark "{name}"{nearest(name, NAMES)}; there are {", ".join(NAMES)} and all')
    return [name for name in NAMES if "all" in wanted or name in wanted]


def options_of(names: list[str] | None, contract: bool, recipes: list[str] | None, runs: int | None) -> list[str]:
    """Return the options of time-to-accuracy, or of step, as their own command lines have them.

    Raises:
        UserError: they are given with other benchmarks than these, or a recipe is none that trains.
    """
    from fastcifar.config import CombineRecipe, load_recipe

    options = ["--contract"] * contract + [f"--recipe={name}" for name in recipes or []]
    options += [] if runs is None else [f"--runs={runs}"]
    asked = chosen(names or ["all"])
    of_step = asked == ["step"] and not contract and runs is None
    if options and asked != ["time-to-accuracy"] and not of_step:
        raise UserError(
            "bench: --contract, --recipe and --runs are of time-to-accuracy (--recipe of step too): "
            f"`fastcifar bench time-to-accuracy {' '.join(options)}`"
        )
    for name in recipes or []:
        if isinstance(load_recipe(name), CombineRecipe):
            raise UserError(f"bench: --recipe {name}: is a combination, which trains nothing; name one that trains")
    return options


def refuse_results(path: Path) -> None:
    """Refuse a results file before minutes are measured for it.

    Raises:
        UserError: what is there is no results file, or nothing can be written there.
    """
    try:
        if path.exists():
            read_results(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another with --out") from None


def run_one(script: Path, options: list[str]) -> dict[str, Any] | None:
    """Run one benchmark in a process of its own, so that no side effect reaches the next; None when it fails.

    Raises:
        Interrupted: a signal came; the benchmark's process, and what that has started, have ended.
    """
    from fastcifar.interrupt import deferred
    from fastcifar.ladder.runner import stop

    command = [sys.executable, str(script), "--json", *options]
    with deferred("ending the benchmark"):
        # In a session of its own: Ctrl-C in a terminal reaches this process alone, which then asks it to stop.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            printed = printed_by(process)
        finally:
            stop(process, GRACE_S)
    try:
        return json.loads(printed) if process.returncode == 0 else None
    except json.JSONDecodeError:
        err.print(f"{script}: printed no JSON object", style="red")
        return None


def printed_by(process: "subprocess.Popen[str]") -> str:
    """Wait for a process and return what it has printed to stdout.

    Raises:
        Interrupted: a signal came.
    """
    from fastcifar.interrupt import stop_if_requested

    while True:
        stop_if_requested()
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=POLL_S)[0]


def results_name(environment: dict[str, Any]) -> str:
    """Return ``<date>-<hardware>.json``, such as ``2026-01-31-nvidia-h200.json`` or ``...-amd-epyc-2-cores.json``."""
    return f"{environment['date'][:10]}-{hardware(environment)}.json"


def hardware(environment: dict[str, Any]) -> str:
    """Return a short name of the hardware in lower-case letters, digits and hyphens."""
    return slug(environment["hardware"])


def merge(path: Path, report: dict[str, Any]) -> None:
    """Put a report into a results file, in place of the older ones of the same benchmark and the same recipes.

    An unfinished report replaces an unfinished one only: it stands beside a complete one until it is complete itself.

    Raises:
        UserError: the file is there and is not a results file.
    """
    from fastcifar.run_directory import write_json

    held = read_results(path) if path.exists() else {"benchmarks": []}
    same = [b for b in held["benchmarks"] if b["benchmark"] == report["benchmark"]]
    older = [b for b in same if recipes_of(b) == recipes_of(report)]
    if report.get("quick") and any(not b.get("quick") for b in older):
        return
    replaced = [b for b in older if is_complete(report) or not is_complete(b)]
    others = [b for b in held["benchmarks"] if not any(b is each for each in replaced)]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of two of the same the unfinished one is the newer and the last, which `benchmarks/resuming.py` goes on with.
    merged = sorted([*others, report], key=lambda b: (b["benchmark"], recipes_of(b), not is_complete(b)))
    write_json(path, {"environment": report["environment"], "benchmarks": merged})


def is_complete(report: dict[str, Any]) -> bool:
    """Return whether a benchmark had ended when it was reported; else another start goes on with it."""
    return bool(report.get("complete", True))


def recipes_of(report: dict[str, Any]) -> tuple[str, ...]:
    """Return the recipes that a benchmark was told to measure, sorted; none where it measures the same ones always."""
    return tuple(sorted(report.get("recipes") or ()))


def read_results(path: Path) -> dict[str, Any]:
    """Return the content of a results file: ``{"environment": {...}, "benchmarks": [reports]}``.

    Raises:
        UserError: it cannot be read as that.
    """
    try:
        content = json.loads(path.read_text())
        if all({"benchmark", "results"} <= b.keys() for b in content["benchmarks"]):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as benchmark results ({error}); remove it or choose --out") from None
    raise UserError(f"{path}: is not a file of benchmark results; remove it or choose another with --out")
