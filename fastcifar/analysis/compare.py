"""Runs side by side: means over seeds, and whether two runs differ on the same test images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcifar.analysis.members import WHICH, distinct_names
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory


def mean_and_error(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return mean, standard error of the mean (None for a single value) and count."""
    array = np.asarray(values, np.float64)
    error = float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "standard_error": error, "n": len(array)}


def group_by_recipe(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return one row per recipe (equal but for the seed): mean and standard error over its runs.

    Each row has ``name``, ``runs`` (folders), ``seeds`` and, for ``last``, ``best``, ``selected``, `mean_and_error` in
    percent, or None where a run has no such figure.
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
        metrics[which] = mean_and_error([entry["accuracy"] for entry in entries]) if complete else None
    training = mean_and_error([run.summary["clocks"]["training_s"] for run in group])
    return {
        "name": group[0].recipe.name,
        "runs": [str(run.folder) for run in group],
        "seeds": [run.summary["seed"] for run in group],
        **metrics,
        "training_s": training["mean"],
    }


def mcnemar(logits_a: np.ndarray, logits_b: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """Test whether two models are equally often right on the same images (McNemar, 1947; exact, two-sided).

    Only images that one has right and the other wrong count: under equality each falls to either with probability 1/2.

    Args:
        logits_a: (N, K) of the first model.
        logits_b: (N, K) of the second.
        labels: int64 (N,).

    Returns:
        ``only_first`` and ``only_second``: images that only this one has right; ``p_value``.
    """
    from scipy.stats import binomtest

    right_a, right_b = logits_a.argmax(1) == labels, logits_b.argmax(1) == labels
    first, second = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return {"only_first": first, "only_second": second, "p_value": p}


def pairs_against_first(runs: Sequence[RunDirectory], which: str = "last") -> list[dict[str, Any]]:
    """Return McNemar's test of each further run against the first one, on the logits of ``which`` epoch.

    Raises:
        UserError: two runs were not evaluated on the same images.
    """
    first, names = runs[0], distinct_names(list(runs))
    labels = first.logits("test/labels")
    rows = []
    for name, run in zip(names[1:], runs[1:], strict=True):
        if not np.array_equal(run.logits("test/labels"), labels):
            raise UserError(f"{run.folder}: was not evaluated on the test images of {first.folder}; compare such runs")
        found = mcnemar(_logits(first, which), _logits(run, which), labels)
        rows.append({"first": names[0], "second": name, "which": which, **found})
    return rows


def _logits(run: RunDirectory, which: str) -> np.ndarray:
    return run.logits(f"test/{which}/{run.summary['weights']}")
