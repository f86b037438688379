"""Seconds of training to a target accuracy: whole runs of the speed recipes, each with its own seed.

Training alone counts (data on the device, compilation and evaluation apart), over n runs whose mean accuracy must reach
the target. The first step of a run, which compiles, is counted as an average one. With ``--contract`` the clock is that
of the records, to the letter: reset, whitening and augmentation count, compilation and evaluation do not; see
`fastcifar.train.contract`. There each run is in the results file at once, in a report that is not ``complete``, and the
next start goes on after it, where sources and torch are still the same. ``--quick`` trains the smoke recipe on
synthetic images instead, to show that the way works.
"""

import argparse
import hashlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Row, device, execute, parser_of, result
from fastcifar.analysis.statistics import mean_of, p_value_above
from fastcifar.config import load_recipe
from fastcifar.config.schema import Recipe
from fastcifar.errors import UserError
from fastcifar.open_run import open_run
from fastcifar.train.contract import ContractResult, ContractRun
from fastcifar.train.run import train
from resuming import keep, kept_runs

CONTRACT = "time_to_accuracy_contract"
RUNS = {"beyond/speed94": 20, "beyond/speed96": 10}
QUICK_RUNS = {"smoke": 2}


def one_run(recipe: Recipe) -> dict[str, Any]:
    """Train once and return the run's summary with ``images``, the images trained on; the run itself is thrown away."""
    with tempfile.TemporaryDirectory() as folder, open_run(recipe, Path(folder) / "run", None) as run:
        summary = train(recipe, run, quiet=True)
        return {**summary, "images": sum(row["images"] for row in run.metrics())}


def accuracy(summary: dict[str, Any]) -> float:
    """Return the last epoch's accuracy in percent, with test-time augmentation where the recipe has it."""
    return float((summary.get("tta") or summary["last"])["accuracy"])


def recipes(name: str, n: int) -> list[Recipe]:
    """Return a recipe with n seeds, one after the other.

    Raises:
        UserError: there is no such recipe, or it combines runs instead of training.
    """
    recipe = load_recipe(name)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name}: combines trained runs; name a recipe that trains")
    return [recipe.model_copy(update={"seed": recipe.seed + k}) for k in range(n)]


def measure(name: str, n: int) -> list[Row]:
    """Return the rows of one recipe: seconds, accuracy of each run and their mean, compilation."""
    with_seeds = recipes(name, n)
    runs = [one_run(recipe) for recipe in with_seeds]
    accuracies = [accuracy(summary) for summary in runs]
    seconds = [summary["images"] / summary["images_per_s"] for summary in runs]
    reached = result(f"{name}: mean accuracy, target {with_seeds[0].target}", accuracies, "%")
    return [
        result(f"{name}: training", seconds, "s", higher_is_better=False),
        {**reached, "value": statistics.fmean(accuracies)},
        result(f"{name}: compilation and warm-up", [s["clocks"]["compilation_s"] for s in runs], "s"),
    ]


def contract(given: dict[str, int], quick: bool) -> list[Row]:
    """Return the rows of recipes under the records' contract; runs that unfinished reports hold are not made again.

    Args:
        given: recipe -> how many seeds.
        quick: whether nothing is kept.
    """
    kept = {} if quick else {key: ContractResult(*values) for key, values in kept_runs(CONTRACT).items()}
    rows: list[Row] = []
    for name, n in given.items():
        wanted, warm = recipes(name, n), device().type != "cuda"
        for recipe in wanted:
            if key_of(recipe) in kept:
                continue
            if not warm:  # as airbench does: the first run of a process loads libraries and sets clocks going
                ContractRun(recipe)()
                warm = True
            done = kept[key_of(recipe)] = ContractRun(recipe)()
            found = f"{done.seconds:.3f} s, {done.accuracy:.2f}%"
            print(f"{name}: seed {recipe.seed}: {found}", file=sys.stderr, flush=True)
            if not quick:
                keep(None, CONTRACT, [*rows, *rows_of(name, wanted, kept)], recipes=list(given), runs=kept)
        rows += rows_of(name, wanted, kept)
    return rows


def key_of(recipe: Recipe) -> str:
    """Return what a run's result is kept by: all that its recipe says."""
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()


def rows_of(name: str, wanted: list[Recipe], kept: dict[str, ContractResult]) -> list[Row]:
    """Return the rows of those of a recipe's runs that have ended."""
    return contract_rows(name, [kept[key] for key in map(key_of, wanted) if key in kept], wanted[0].target)


def contract_rows(name: str, runs: list[ContractResult], target: float | None) -> list[Row]:
    """Return the rows of finished runs; a standard error and a p-value only where there is a spread."""

    def rows(what: str, values: list[float], unit: str) -> list[Row]:
        mean = mean_of(values)
        assert mean is not None
        found = {**result(f"{name}: {what}, mean", values, unit, higher_is_better=unit == "%"), "value": mean.mean}
        return [found, *([] if mean.error is None else [result(f"{name}: {what}, standard error", [mean.error], unit)])]

    seconds, evaluation_s, accuracies = (list(values) for values in zip(*runs, strict=True))
    p = None if target is None else p_value_above(accuracies, target)
    return [
        *rows("reset, whitening and training", seconds, "s"),
        *rows("accuracy", accuracies, "%"),
        *([] if p is None else [result(f"{name}: p of a mean of no more than {target}%", [p], "")]),
        *rows("evaluation (not counted)", evaluation_s, "s"),
    ]


def asked(arguments: argparse.Namespace) -> dict[str, int]:
    """Return which recipes to train how often."""
    given = dict.fromkeys(arguments.recipe, 10) if arguments.recipe else QUICK_RUNS if arguments.quick else RUNS
    return {name: arguments.runs or n for name, n in given.items()}


def main() -> None:
    """Measure the speed recipes, or the smoke recipe with ``--quick``."""
    parser = parser_of("time_to_accuracy")
    parser.add_argument("--contract", action="store_true", help="time as the records do")
    parser.add_argument("--recipe", action="append", help="train this one; more than once for several")
    parser.add_argument("--runs", type=int, help="how many seeds")
    arguments = parser.parse_args()
    given = asked(arguments)
    if arguments.contract:
        execute(CONTRACT, arguments, lambda quick: contract(given, quick), list(given))
    else:
        rows = lambda _: [row for name, n in given.items() for row in measure(name, n)]  # noqa: E731
        execute("time_to_accuracy", arguments, rows, list(given))


if __name__ == "__main__":
    main()
