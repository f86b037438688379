"""Several runs as one comparison, as plain values: recipes over seeds, differences with their errors, tests, time."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastcifar.analysis.compare import group_by_recipe, left_out, note_left_out
from fastcifar.analysis.members import marked_names, same_test_images
from fastcifar.analysis.statistics import binomial_error, mcnemar
from fastcifar.config import CombineRecipe, load_recipe, shipped_by_name
from fastcifar.run_directory import RunDirectory


def comparison(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Return the comparison of two or more runs.

    ``groups`` has a row per recipe, over its finished seeds, with its difference to the first one; ``left_out`` has the
    folders of the runs that are in no row, and ``note`` says so in words; ``pairs`` has McNemar's test for
    each two runs on the same test images; ``curves`` has each recipe's metrics by epoch; ``time`` has what each run of
    a row took and reached; ``published`` has the ladder's published accuracies.
    """
    names, without = marked_names(runs), left_out(runs)
    by_folder = {str(run.folder): run for run in runs}
    groups = group_by_recipe(runs)
    members = [[by_folder[folder] for folder in group["runs"]] for group in groups]
    for group, found in zip(groups, members, strict=True):
        group["difference"] = None if group is groups[0] else _difference(group, groups[0], found[0])
    return {
        "runs": names,
        "groups": groups,
        "left_out": [str(run.folder) for run in without],
        "note": note_left_out(without),
        "pairs": _pairs(runs, names),
        "curves": [curves_of(found) for found in members],
        "time": [_time(run, name, groups) for run, name in zip(runs, names, strict=True) if run not in without],
        "published": published_rows(),
    }


def _difference(group: dict[str, Any], first: dict[str, Any], run: RunDirectory) -> dict[str, Any] | None:
    """Return last minus the first recipe's last, in points, with the standard error of that difference.

    A recipe with a single seed has no spread; its binomial error, of the sampling of test images, stands in and ``of``
    says so.
    """
    if not group["last"] or not first["last"]:
        return None
    images = len(run.logits("test/labels"))
    errors = [_error_of(entry["last"], images) for entry in (group, first)]
    single = any(entry["last"]["n"] == 1 for entry in (group, first))
    return {
        "points": group["last"]["mean"] - first["last"]["mean"],
        "standard_error": math.hypot(*errors),
        "of": "test images" if single else "seeds",
    }


def _error_of(mean: dict[str, Any], images: int) -> float:
    error = mean["standard_error"]
    return binomial_error(mean["mean"], images) if error is None else error


def _pairs(runs: Sequence[RunDirectory], names: list[str]) -> list[dict[str, Any]]:
    """Return, for each two runs that were evaluated on the same images, how they differ there.

    ``points`` is the second's accuracy minus the first's; its standard error takes into account that both saw the same
    images: with b and c images that only one has right, sqrt(b + c - (b - c)**2 / N) / N.
    """
    logits = [run.logits(f"test/last/{run.summary['weights']}") for run in runs]
    found = []
    for j in range(len(runs)):
        for i in range(j):
            if same_test_images(runs[i], runs[j]):
                labels = runs[i].logits("test/labels")
                test = mcnemar(logits[i], logits[j], labels)
                pair = {"first": i, "second": j, "names": [names[i], names[j]]}
                found.append({**pair, **test, **paired(test, len(labels))})
    return found


def paired(test: dict[str, float | int], images: int) -> dict[str, float]:
    """Return the difference of two accuracies on the same images, in points, with its standard error."""
    b, c = test["only_first"], test["only_second"]
    return {
        "points": 100 * (c - b) / images,
        "standard_error": 100 * math.sqrt(b + c - (b - c) ** 2 / images) / images,
    }


def curves_of(runs: Sequence[RunDirectory]) -> dict[str, Any]:
    """Return the metrics of one recipe by epoch: each the mean over its seeds, with the lowest and the highest."""
    weights = runs[0].summary["weights"]
    rows = [run.metrics() for run in runs]
    epochs = min((len(found) for found in rows), default=0)
    seeds = [found[:epochs] for found in rows]
    return {
        "epochs": [row["epoch"] for row in seeds[0]],
        "minutes": _band([list(np.cumsum([row["training_s"] / 60 for row in found])) for found in seeds])["mean"],
        "train_loss": _band([[row["train_loss"] for row in found] for found in seeds]),
        "test_loss": _band([_metric(found, weights, "loss") for found in seeds]),
        "test_accuracy": _band([_metric(found, weights, "accuracy") for found in seeds]),
    }


def _metric(rows: list[dict[str, Any]], weights: str, metric: str) -> list[float]:
    """Return a test metric by epoch, nan where the epoch was not evaluated."""
    return [row.get("test", {}).get(weights, {}).get(metric, math.nan) for row in rows]


def _band(seeds: list[list[float]]) -> dict[str, list[float | None]]:
    """Return mean, lowest and highest over seeds, epoch by epoch; None where a seed has no value."""
    columns = list(zip(*seeds, strict=True))
    known = [None if any(math.isnan(v) for v in column) else column for column in columns]
    return {
        "mean": [None if c is None else sum(c) / len(c) for c in known],
        "low": [None if c is None else min(c) for c in known],
        "high": [None if c is None else max(c) for c in known],
    }


def _time(run: RunDirectory, name: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    group = next(i for i, group in enumerate(groups) if str(run.folder) in group["runs"])
    summary = run.summary
    entry = summary["best"] or summary["last"] or {}
    return {
        "name": name,
        "group": group,
        "minutes": summary["clocks"]["total_s"] / 60,
        "training_minutes": summary["clocks"]["training_s"] / 60,
        "accuracy": entry.get("accuracy"),
        "hardware": run.environment.get("hardware"),
    }


def published_rows() -> list[dict[str, Any]]:
    """Return the published accuracies of the ladder, lowest first; how long those runs took was not published."""
    rows = []
    for name, path in shipped_by_name().items():
        recipe = load_recipe(path) if "/" not in name else None
        if recipe is not None and recipe.published:
            combined = isinstance(recipe, CombineRecipe)
            rows.append({"name": name, "accuracy": recipe.published.best, "combined": combined})
    return sorted(rows, key=lambda row: row["accuracy"])
