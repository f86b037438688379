"""What a report says about a run, as plain values: the same object that ``--json`` prints and the page shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis.confusion import confusion_matrix, largest_confusions, precision_percent, recall_percent
from fastcifar.analysis.ensemble import softmax
from fastcifar.analysis.label_errors import find_label_errors
from fastcifar.analysis.members import WHICH
from fastcifar.analysis.statistics import binomial_error
from fastcifar.analysis.top_loss import describe, top_loss
from fastcifar.config.schema import CombineRecipe, DataConfig
from fastcifar.data.split import subset_rows
from fastcifar.data.store import Store, resolve_store
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
METHOD = (
    "Confident learning (Northcutt, Jiang & Chuang, 2021), pruning by noise rate, on probabilities of images that the "
    "model was not trained on. It sees the images through this one model: what the model confuses systematically looks "
    "like an error, an error that model and annotators share stays hidden. Look before you believe."
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
    splits: dict[str, np.ndarray]
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
        UserError: the member's run directory is gone.
    """
    recipe = run.recipe
    if isinstance(recipe, CombineRecipe):
        return data_config(RunDirectory.open(run.summary["members"][0]["run"]))
    return recipe.data


def _splits(run: RunDirectory, config: DataConfig, store: Store) -> dict[str, np.ndarray]:
    """Pick the rows that the run evaluated on, and make sure by their labels that they are the same images."""
    test, train, have = store.split("test"), store.split("train"), run.logits_keys()
    rows = subset_rows(test.labels, config.test_subset, "data.test_subset")
    found = {"test": (test.images[rows], test.labels[rows])}
    if "holdout/labels" in have:
        held = run.logits("holdout/indices")
        if held.max(initial=-1) >= len(train.labels):
            raise UserError(f"{store.root}: has fewer training images than the run in {run.folder} was trained on")
        found["holdout"] = (train.images[held], train.labels[held])
    for split, (_, labels) in found.items():
        if not np.array_equal(labels, run.logits(f"{split}/labels")):
            raise UserError(f"{store.root}: its {split} labels are not those of {run.folder}; give its own --data")
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
    logits, labels = run.logits(f"test/{which}/{weights}"), run.logits("test/labels")
    matrix = confusion_matrix(labels, logits.argmax(1), logits.shape[1])
    return {
        "name": run.recipe.name,
        "title": run.recipe.title,
        "run": str(run.folder),
        "explained": which,
        "classes": images.classes,
        "results": results(run),
        "confusion": _confusion(matrix),
        "calibration_error": calibration_error(logits, labels),
        "hard_images": [image._asdict() for image in top_loss(logits, labels, hard)],
        "label_errors": {
            split: _label_errors(run.logits(f"{split}/{which}/{weights}"), run.logits(f"{split}/labels"), hard)
            for split in ("test", "holdout")
            if f"{split}/{which}/{weights}" in run.logits_keys()
        },
        "label_errors_method": METHOD,
    }


def results(run: RunDirectory) -> dict[str, Any]:
    """Return a run's metrics as its summary has them, each accuracy with its binomial standard error in points."""
    summary, samples = run.summary, len(run.logits("test/labels"))
    metrics = {}
    for which in (*WHICH, "tta"):
        entry = summary.get(which)
        metrics[which] = {**entry, "standard_error": binomial_error(entry["accuracy"], samples)} if entry else None
    kept = ("status", "epochs", "epochs_done", "weights", "clocks", "images_per_s", "seed", "loader", "git", "members")
    return {**metrics, "test_images": samples, **{key: summary.get(key) for key in kept}}


def _confusion(matrix: np.ndarray) -> dict[str, Any]:
    return {
        "rows": "given label",
        "columns": "predicted",
        "counts": matrix.tolist(),
        "recall_percent": _plain(recall_percent(matrix)),
        "precision_percent": _plain(precision_percent(matrix)),
        "largest": [pair._asdict() for pair in largest_confusions(matrix)],
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, which knows no nan."""
    return [None if np.isnan(value) else float(value) for value in values]


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error in points (Guo et al., 2017): how far confidence is from accuracy.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        bins: equally wide bins of confidence in 0..1.
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, confidence - right, minlength=bins)
    return 100 * float(np.abs(gaps).sum() / len(labels))


def _label_errors(logits: np.ndarray, labels: np.ndarray, most: int) -> dict[str, Any]:
    """Return the suspects of one split, the least believed first."""
    found = find_label_errors(softmax(logits), labels)
    return {
        "suspected": len(found.rows),
        "estimated": found.estimated_errors,
        "disagreement_percent": 100 * float((logits.argmax(1) != labels).mean()),
        "images": [image._asdict() for image in describe(logits, labels, found.rows[:most])],
        "all_rows": found.rows.tolist(),
    }
