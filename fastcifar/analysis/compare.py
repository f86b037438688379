"""Runs side by side: means over seeds, and whether two runs differ on the same test images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcifar.analysis.members import WHICH, distinct_names, same_test_images
from fastcifar.analysis.statistics import mcnemar, mean_of
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory


def group_by_recipe(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return one row per recipe (equal but for the seed): mean and standard error over its runs.

    Each row has ``name``, ``runs`` (folders), ``seeds`` and, for ``last``, ``best``, ``selected``, the mean, its
    standard error and their number in percent, or None where a run has no such metric.
    """
    groups: dict[str, list[RunDirectory]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    return [_row(group) for group in groups.values()]


def _key(run: RunDirectory) -> str:
    """Return the recipe without its seed, as text."""
    from fastcifar.config import to_toml

    same = {"seed": 0} if "seed" in type(run.recipe).model_fields else {}
    return to_toml(run.recipe.model_copy(update=same))


def _row(group: list[RunDirectory]) -> dict[str, Any]:
    metrics = {}
    for which in WHICH:
        entries = [entry for run in group if (entry := run.summary.get(which))]
        complete = len(entries) == len(group)
        mean = mean_of(entry["accuracy"] for entry in entries) if complete else None
        metrics[which] = mean.row() if mean else None
    training = mean_of(run.summary["clocks"]["training_s"] for run in group)
    return {
        "name": group[0].recipe.name,
        "runs": [str(run.folder) for run in group],
        "seeds": [run.summary["seed"] for run in group],
        **metrics,
        "training_s": training.mean if training else None,
    }


def pairs_against_first(runs: Sequence[RunDirectory], which: str = "last") -> list[dict[str, Any]]:
    """Return McNemar's test of each further run against the first one, on the logits of ``which`` epoch.

    Raises:
        UserError: two runs were not evaluated on the same images.
    """
    first, names = runs[0], distinct_names(list(runs))
    labels = first.logits("test/labels")
    rows = []
    for name, run in zip(names[1:], runs[1:], strict=True):
        if not same_test_images(run, first):
            raise UserError(f"{run.folder}: was not evaluated on the test images of {first.folder}; compare such runs")
        found = mcnemar(_logits(first, which), _logits(run, which), labels)
        rows.append({"first": names[0], "second": name, "which": which, **found})
    return rows


def _logits(run: RunDirectory, which: str) -> np.ndarray:
    return run.logits(f"test/{which}/{run.summary['weights']}")
