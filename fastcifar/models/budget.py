"""How long a recipe takes: steps and evaluations counted from the recipe, times an epoch's parts as measured.

The model is ``compilation + epochs * steps * step time + evaluations * images * evaluation time``. It leaves out what
is measured to be small beside these: starting Python, reading the data, writing checkpoints. It knows only step times
that `benchmarks/step_times.py` measured on the hardware in question; without one it predicts nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar.config.schema import Recipe

CIFAR_TRAIN, CIFAR_TEST = 50_000, 10_000
NOT_IN_COST = {"name", "init", "shakedrop_gate"}


def step_key(recipe: Recipe) -> str:
    """Return what decides the time of a training step, as text: recipes with the same key share one measured time.

    Augmentation, mixing and label smoothing are left out: they are a few percent of any step that takes long.
    """
    options = recipe.model.model_dump(exclude_defaults=True, exclude=NOT_IN_COST)
    model = " ".join([recipe.model.name, *(f"{k}={v}" for k, v in sorted(options.items()))])
    start = recipe.asam.start if recipe.asam else 0.0
    distilled = ["distilled"] if recipe.distill else []
    asam = ["asam" if not start else f"asam from {start:g}"] if recipe.asam else []
    selected = [f"selected {recipe.select.share:g}"] if recipe.select else []
    update = "+".join([recipe.optimizer.name, *asam, *distilled, *selected, *(["ema"] if recipe.ema else [])])
    return f"{model} | batch {recipe.train.batch_size} | {update} | {recipe.engine.gpu_precision}"


def evaluation_key(recipe: Recipe) -> str:
    """Return the same for the evaluation of images."""
    return f"evaluate {step_key(recipe).split(' | ')[0]} | {recipe.engine.gpu_precision}"


def compilation_key(recipe: Recipe) -> str:
    """Return the same for compilation and warm-up, once a run."""
    return f"compile {step_key(recipe)}"


def images_to_train(recipe: Recipe, train_images: int = CIFAR_TRAIN) -> int:
    """Return how many images one epoch trains on: those of the set, of the subset, less the holdout (all in total)."""
    kept = min(train_images, recipe.data.subset) if recipe.data.subset else train_images
    return kept - recipe.data.holdout


def steps_per_epoch(recipe: Recipe, images: int) -> int:
    """Return the number of steps in an epoch over ``images``."""
    full, rest = divmod(images, recipe.train.batch_size)
    return full + (1 if rest and not recipe.train.drop_last else 0)


def evaluated_images(recipe: Recipe, train_images: int = CIFAR_TRAIN, test_images: int = CIFAR_TEST) -> int:
    """Return how many images a run evaluates in all: test and holdout, raw and EMA, and the last epoch's extras."""
    test = min(test_images, recipe.data.test_subset) if recipe.data.test_subset else test_images
    weights = 2 if recipe.ema else 1
    epochs = -(-recipe.train.epochs // recipe.eval.every_epochs)
    views = {"none": 0, "flip": 2, "multicrop": 6}[recipe.eval.tta]
    once = weights * views * test
    if recipe.eval.train_logits:  # the last weights, and once each the best and the selected ones
        once += (weights + 1 + (recipe.data.holdout > 0)) * images_to_train(recipe, train_images)
    return weights * epochs * (test + recipe.data.holdout) + once


@dataclass(frozen=True)
class Prediction:
    """The predicted seconds of a run, and the measured times behind them."""

    total_s: float
    step_s: float
    evaluation_image_s: float
    compilation_s: float


def predict(recipe: Recipe, times_s: dict[str, float], train_images: int = CIFAR_TRAIN) -> Prediction | None:
    """Return the predicted time of a run, or None where its step was not measured.

    Args:
        recipe: the run.
        times_s: seconds by `step_key`, `evaluation_key` (per image) and `compilation_key`, from `measured_times`.
        train_images: images in the training set before subset and holdout.
    """
    step_s, evaluation_s = times_s.get(step_key(recipe)), times_s.get(evaluation_key(recipe))
    if step_s is None or evaluation_s is None:
        return None
    compilation_s = times_s.get(compilation_key(recipe), 0.0)
    steps = recipe.train.epochs * steps_per_epoch(recipe, images_to_train(recipe, train_images))
    total_s = compilation_s + steps * step_s + evaluated_images(recipe, train_images) * evaluation_s
    return Prediction(total_s, step_s, evaluation_s, compilation_s)


def measured_times(files: Iterable[Path]) -> dict[str, float]:
    """Return the seconds by name that ``step-times`` measured; later files win, whole measurements win over quick ones.

    Args:
        files: results files of one kind of hardware, oldest first.
    """
    times: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for path in files:
        for report in json.loads(path.read_text())["benchmarks"]:
            if report["benchmark"] == "step_times":
                rows: list[dict[str, Any]] = report["results"]
                times[bool(report.get("quick"))] |= {row["name"]: row["value"] / 1e3 for row in rows}
    return times[True] | times[False]


def results_of(folder: Path, hardware: str) -> list[Path]:
    """Return the results files whose hardware contains a word such as ``h200``, oldest first; maybe none."""
    wanted = hardware.strip().lower()
    return [path for path in sorted(folder.glob("*.json")) if wanted and wanted in hardware_of(path)]


def measured_hardware(folder: Path) -> list[str]:
    """Return the hardware that the folder has results files of, which are not all of its files."""
    return sorted({hardware_of(path) for path in folder.glob("????-??-??-*.json")})


def hardware_of(path: Path) -> str:
    """Return the hardware in a results file's name, ``<date>-<hardware>.json``."""
    return path.stem[len("2026-01-31-") :]
