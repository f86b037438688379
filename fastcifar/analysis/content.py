"""What a report says about a run, as plain values: the same object that ``--json`` prints and the page shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis import disputed
from fastcifar.analysis.calibration import calibration
from fastcifar.analysis.confusion import confusion_matrix, largest_confusions, precision_percent, recall_percent
from fastcifar.analysis.ensemble import softmax
from fastcifar.analysis.label_errors import find_label_errors
from fastcifar.analysis.members import WHICH, source_of
from fastcifar.analysis.statistics import binomial_error, wilson_interval
from fastcifar.analysis.top_loss import HardImage, describe, losses, top_loss
from fastcifar.config.schema import CombineRecipe, DataConfig
from fastcifar.data import pixels
from fastcifar.data.split import subset_rows
from fastcifar.data.store import Store, resolve_store
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.teachers import member_folder

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
METHOD = (
    "Confident learning (Northcutt, Jiang & Chuang, 2021), pruning by noise rate, on probabilities of images that the "
    "model was not trained on. It sees the images through this one model: what the model confuses systematically looks "
    "like an error, an error that model and annotators share stays hidden. Look before you believe."
)
LABEL_ERRORS_FROM = 90.0
LABEL_ERRORS_RULE = (
    f"Suspects are named only where the model has {LABEL_ERRORS_FROM:.0f}% of the split's images right. Annotators "
    "found about 0.5% of CIFAR-10's test labels wrong: where a model contradicts more than 10% of the labels, at most "
    "1 in 18 of its contradictions could be such an error, and a list of them would show what the model cannot do."
)


@dataclass(frozen=True)
class Images:
    """The images behind a run's logits.

    Attributes:
        classes: the class names.
        splits: uint8 (N, H, W, C) by split name, in the order of the logits; empty where the data is not at hand.
        note: why there are no images; empty where there are.
    """

    classes: list[str]
    splits: dict[str, pixels.Images]
    note: str = ""


def find_images(run: RunDirectory, data: Path | None) -> Images:
    """Return the images of a run's test and holdout split, in the order of its logits.

    Args:
        run: a finished training run or combination.
        data: the value of ``--data``; without it, missing data is no error: the report goes without pictures.

    Raises:
        UserError: ``data`` was given and is not there, or is other data than the run's.
    """
    try:
        config = data_config(run)
        store = resolve_store(config, data)
        return Images(store.classes, _splits(run, config, store))
    except UserError as error:
        if data is not None:
            raise
        return Images(_class_names(run), {}, f"Pictures are left out: {error}")


def data_config(run: RunDirectory) -> DataConfig:
    """Return the data section of a run's recipe; a combination has its first member's.

    Raises:
        UserError: the member's run directory is neither where it was nor near the combination.
    """
    recipe = run.recipe
    if isinstance(recipe, CombineRecipe):
        return data_config(RunDirectory.open(member_folder(run, run.summary["members"][0])))
    return recipe.data


def _splits(run: RunDirectory, config: DataConfig, store: Store) -> dict[str, pixels.Images]:
    """Pick the rows that the run evaluated on, and make sure by their labels that they are the same images."""
    test, train, have = store.split("test"), store.split("train"), run.logits_keys()
    rows = subset_rows(test.labels, config.test_subset, "data.test_subset")
    found = {"test": (pixels.choose(test.images, rows), test.labels[rows])}
    if "holdout/labels" in have:
        held = run.logits("holdout/indices")
        if held.max(initial=-1) >= len(train.labels):
            raise UserError(f"{store.name}: has fewer training images than the run in {run.folder} was trained on")
        found["holdout"] = (pixels.choose(train.images, held), train.labels[held])
    for split, (_, labels) in found.items():
        if not np.array_equal(labels, run.logits(f"{split}/labels")):
            raise UserError(f"{store.name}: its {split} labels are not those of {run.folder}; give its own --data")
    return {split: images for split, (images, _) in found.items()}


def _class_names(run: RunDirectory) -> list[str]:
    """Return class names without the data: CIFAR-10's own, else numbers."""
    if "classes" in run.summary:
        return list(run.summary["classes"])
    classes = run.logits("test/last/" + run.summary["weights"]).shape[1]
    try:
        source = data_config(run).source
    except UserError:
        source = run.summary.get("source", "cifar10")
    return list(CIFAR10) if source == "cifar10" and classes == len(CIFAR10) else [str(i) for i in range(classes)]


def explained(run: RunDirectory) -> str:
    """Return which logits a report explains: the honestly ``selected`` ones where there are such, else the ``last``."""
    return "selected" if run.summary.get("selected") else "last"


def content(run: RunDirectory, images: Images, *, hard: int = 48) -> dict[str, Any]:
    """Return everything that a report tells of a run, as plain values.

    Args:
        run: a finished or stopped run with logits.
        images: from `find_images`; only the class names are used here.
        hard: how many of the hardest test images to list.
    """
    weights, which = run.summary["weights"], explained(run)
    key = f"{which}/{weights}"
    logits, labels = run.logits(f"test/{key}"), run.logits("test/labels")
    matrix = confusion_matrix(labels, logits.argmax(1), logits.shape[1])
    held = f"holdout/{key}" in run.logits_keys()
    holdout = (run.logits(f"holdout/{key}"), run.logits("holdout/labels")) if held else None
    splits = {"test": (logits, labels)} | ({"holdout": holdout} if holdout else {})
    return {
        "name": run.recipe.name,
        "title": run.recipe.title,
        "run": str(run.folder),
        "explained": which,
        "classes": images.classes,
        "results": results(run),
        "confusion": _confusion(matrix),
        "calibration": calibration(logits, labels, holdout),
        "hard_images": [image._asdict() for image in top_loss(logits, labels, hard)],
        "hard_by_class": _hardest_of_each_class(logits, labels),
        "test_set": disputed.about_the_test_set(logits, labels) if disputed.applies(source_of(run), labels) else None,
        "label_errors": {split: _label_errors(*found, hard) for split, found in splits.items()},
        "label_errors_method": METHOD,
        "label_errors_rule": LABEL_ERRORS_RULE,
    }


def _hardest_of_each_class(logits: np.ndarray, labels: np.ndarray, count: int = 12) -> list[dict[str, Any]]:
    """Return the images of highest loss of each class, by class and then hardest first."""
    order = np.argsort(-losses(logits, labels), kind="stable")
    rows = [row for label in range(logits.shape[1]) for row in order[labels[order] == label][:count]]
    return [image._asdict() for image in describe(logits, labels, np.array(rows, np.int64))]


def of_cells(logits: np.ndarray, labels: np.ndarray, count: int) -> dict[tuple[int, int], list[HardImage]]:
    """Return up to ``count`` images of each cell of the confusion matrix, by (given label, prediction).

    Those of highest loss come first: the surest errors, and on the diagonal the least sure right answers.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        count: images of a cell, at most.
    """
    predicted = logits.argmax(1)
    found: dict[tuple[int, int], list[int]] = {}
    for row in np.argsort(-losses(logits, labels), kind="stable"):
        cell = found.setdefault((int(labels[row]), int(predicted[row])), [])
        if len(cell) < count:
            cell.append(int(row))
    return {cell: describe(logits, labels, np.array(rows)) for cell, rows in sorted(found.items())}


def results(run: RunDirectory) -> dict[str, Any]:
    """Return a run's metrics as its summary has them, each accuracy with its binomial standard error in points."""
    summary, samples = run.summary, len(run.logits("test/labels"))
    metrics = {}
    for which in (*WHICH, "tta"):
        entry = summary.get(which)
        metrics[which] = {**entry, "standard_error": binomial_error(entry["accuracy"], samples)} if entry else None
    kept = ("status", "epochs", "epochs_done", "weights", "clocks", "images_per_s", "seed", "loader", "git", "members")
    best = metrics[explained(run)]
    interval = wilson_interval(round(best["accuracy"] / 100 * samples), samples) if best else None
    return {**metrics, "interval": interval, "test_images": samples, **{key: summary.get(key) for key in kept}}


def _confusion(matrix: np.ndarray) -> dict[str, Any]:
    right, given = np.diag(matrix).tolist(), matrix.sum(1).tolist()
    return {
        "rows": "given label",
        "columns": "predicted",
        "counts": matrix.tolist(),
        "recall_percent": _plain(recall_percent(matrix)),
        "recall_interval": [wilson_interval(k, n) if n else None for k, n in zip(right, given, strict=True)],
        "precision_percent": _plain(precision_percent(matrix)),
        "largest": [pair._asdict() for pair in largest_confusions(matrix)],
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, which knows no nan."""
    return [None if np.isnan(value) else float(value) for value in values]


def _label_errors(logits: np.ndarray, labels: np.ndarray, most: int) -> dict[str, Any]:
    """Return the suspects of one split, the least believed first; none where the model is too weak to name any."""
    accuracy = 100 * float((logits.argmax(1) == labels).mean())
    known = {"accuracy": accuracy, "disagreement_percent": 100 - accuracy}
    if accuracy < LABEL_ERRORS_FROM:
        return {**known, "meaningful": False, "suspected": None, "estimated": None, "images": [], "all_rows": []}
    found = find_label_errors(softmax(logits), labels)
    return {
        **known,
        "meaningful": True,
        "suspected": len(found.rows),
        "estimated": found.estimated_errors,
        "images": [image._asdict() for image in describe(logits, labels, found.rows[:most])],
        "all_rows": found.rows.tolist(),
    }
