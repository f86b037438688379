"""Makes run directories with given or random logits, as a training would."""

from pathlib import Path

import numpy as np

from fastcifar.config.schema import Recipe
from fastcifar.run_directory import RunDirectory


def recipe(name: str, **tables: object) -> Recipe:
    """Return the smallest recipe under a name."""
    base = {
        "name": name,
        "model": {"name": "lenet5"},
        "optimizer": {"name": "adam", "lr": 3e-4},
        "train": {"epochs": 3},
    }
    return Recipe.model_validate({**base, **tables})


def logits_for(labels: np.ndarray, rng: np.random.Generator, skill: float, classes: int = 10) -> np.ndarray:
    """Return noisy logits float32 (N, K) in which the label stands out by ``skill`` standard deviations."""
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    return logits.astype(np.float32)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((logits.argmax(1) == labels).mean())


def make_run(
    folder: Path, arrays: dict[str, np.ndarray], made: Recipe | None = None, *, weights: str = "raw", epochs: int = 3
) -> RunDirectory:
    """Write a finished run with these logits and a summary and metrics that agree with them."""
    made = made or recipe(folder.name)
    environment = {"hardware": "a test", "python": "3", "packages": {"torch": "2"}, "git": None}
    run = RunDirectory.create(folder, made, environment)
    run.write_logits(arrays)
    labels = arrays["test/labels"]
    metrics = {}
    for which in ("last", "best", "selected"):
        key = f"test/{which}/{weights}"
        found = arrays.get(key)
        entry = {"epoch": epochs, "loss": 0.5, "protocol": which}
        metrics[which] = None if found is None else {**entry, "accuracy": accuracy(found, labels)}
    if metrics["selected"]:
        metrics["selected"]["holdout_accuracy"] = 50.0
    for epoch in range(1, epochs + 1):
        run.append_epoch(epoch_row(epoch, metrics["last"]["accuracy"], weights, "holdout/labels" in arrays))
    run.write_summary({
        "name": made.name, "status": "finished", "epochs": epochs, "epochs_done": epochs, "weights": weights,
        **metrics, "tta": None, "clocks": {"total_s": 75.0, "training_s": 60.0, "compilation_s": 5.0},
        "images_per_s": 12345.6, "seed": made.seed, "loader": "resident", "environment": {"hardware": "a test"},
        "git": "0123456789",
    })  # fmt: skip
    return run


def stopped(run: RunDirectory, epoch: int = 1) -> RunDirectory:
    """Let a run have been stopped after an epoch, before its end."""
    run.write_metrics(run.metrics()[:epoch])
    run.write_summary({**run.summary, "status": "stopped", "epochs_done": epoch})
    return RunDirectory.open(run.folder)


def add_weights(run: RunDirectory, which: str, state: dict) -> None:
    """Add weights to a run, as its training would."""
    from safetensors.torch import save  # imports torch, which runs without weights do not need

    run.commit({f"weights/{which}.safetensors": save({k: v.contiguous() for k, v in state.items()})})


def change_recipe(folder: Path, *changes: tuple[str, str]) -> None:
    """Change texts in a run's recipe, as if the run had been made with the changed one."""
    run = RunDirectory(folder)
    text = (folder / "recipe.toml").read_text()
    for old, new in changes:
        text = text.replace(old, new, 1)
    run.commit({"recipe.toml": text})


def epoch_row(epoch: int, last: float, weights: str, holdout: bool) -> dict:
    """Return one plausible line of metrics.jsonl."""
    metrics = {kind: {"accuracy": last - 3 + epoch, "loss": 1 / epoch} for kind in {"raw", weights}}
    row = {"epoch": epoch, "lr": 0.1 / epoch, "train_loss": 2 / epoch, "train_accuracy": 30.0 + epoch, "images": 100,
           "seconds": 1.0, "training_s": 0.9, "images_per_s": 100.0, "test": metrics}  # fmt: skip
    return {**row, "holdout": metrics} if holdout else row


def make_members(
    root: Path,
    skills: tuple[float, ...] = (1.0, 1.5, 2.0),
    *,
    seed: int = 0,
    test: int = 400,
    holdout: int = 0,
    train: int = 0,
    classes: int = 10,
) -> dict[str, RunDirectory]:
    """Return runs ``m0``, ``m1``, ... on the same images, better with ``skills``, with the splits asked for."""
    rng = np.random.default_rng(seed)
    sizes = {"test": test, "holdout": holdout, "train": train}
    labels = {split: rng.integers(classes, size=n) for split, n in sizes.items() if n}
    runs = {}
    for i, skill in enumerate(skills):
        arrays = {f"{split}/labels": array for split, array in labels.items()}
        for split, array in labels.items():
            for which in ("last", "best", "selected") if holdout else ("last", "best"):
                arrays[f"{split}/{which}/raw"] = logits_for(array, rng, skill, classes)
        if holdout:
            arrays["holdout/indices"] = np.arange(holdout)
        runs[f"m{i}"] = make_run(root / f"m{i}", arrays)
    return runs
