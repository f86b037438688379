"""Seconds of training to a target accuracy: whole runs of the speed recipes, each with its own seed.

As the records count: training alone (data on the device, compilation and evaluation apart), over n runs whose mean
accuracy must reach the target. The first step of a run, which compiles, is counted as an average one. ``--quick``
trains the smoke recipe on synthetic images instead, to show that the way works.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any, cast

from common import Row, main, result
from fastcifar.config import load_recipe
from fastcifar.config.schema import Recipe
from fastcifar.open_run import open_run
from fastcifar.train.run import train

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


def measure(name: str, n: int) -> list[Row]:
    """Return the rows of one recipe: seconds, accuracy of each run and their mean, compilation."""
    recipe = cast(Recipe, load_recipe(name))
    runs = [one_run(recipe.model_copy(update={"seed": recipe.seed + k})) for k in range(n)]
    accuracies = [accuracy(summary) for summary in runs]
    seconds = [summary["images"] / summary["images_per_s"] for summary in runs]
    reached = result(f"{name}: mean accuracy, target {recipe.target}", accuracies, "%")
    return [
        result(f"{name}: training", seconds, "s", higher_is_better=False),
        {**reached, "value": statistics.fmean(accuracies)},
        result(f"{name}: compilation and warm-up", [s["clocks"]["compilation_s"] for s in runs], "s"),
    ]


def run(quick: bool) -> list[Row]:
    """Measure the speed recipes, or the smoke recipe with ``--quick``."""
    return [row for name, n in (QUICK_RUNS if quick else RUNS).items() for row in measure(name, n)]


if __name__ == "__main__":
    main("time_to_accuracy", run)
