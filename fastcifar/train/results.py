"""The results of a run as it goes: metrics, best and selected epochs, checkpoints, and the summary at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.run_directory import RunDirectory
from fastcifar.train import checkpoint
from fastcifar.train.evaluate import EvaluationSet, Metrics
from fastcifar.train.step import Step

BEST = "best epoch on the test set, as published"
SELECTED = "epoch chosen on the holdout, test set looked at once"


@dataclass
class Progress:
    """How far a run is and what came of it so far; all of it goes into a checkpoint.

    Attributes:
        epochs_done: finished epochs.
        images: images trained on, epochs together.
        timed_images: those of them that fall into ``clocks["training_s"]``.
        last, best, selected: metrics of an epoch, in percent and nats; None before the first evaluation.
        clocks: seconds by name.
        logits: float32 (N, classes) by ``split/which/weights``.
    """

    epochs_done: int = 0
    images: int = 0
    timed_images: float = 0.0
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    selected: dict[str, Any] | None = None
    clocks: dict[str, float] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)


class Results:
    """Evaluates, remembers, writes checkpoints and the end of a run.

    Args:
        splits: ``test``, and ``holdout`` where the recipe sets one aside, and ``train`` where its logits are wanted.

    On making it takes up the run's newest checkpoint, if there is one.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory, model: nn.Module, step: Step, splits: dict[str, EvaluationSet]
    ) -> None:
        self.recipe, self.run, self.model, self.step, self.splits = recipe, run, model, step, splits
        self.kinds = ("raw", "ema") if recipe.ema else ("raw",)
        self.reported = self.kinds[-1]
        self.progress = self._restore()

    def _restore(self) -> Progress:
        found = checkpoint.complete(self.run.folder / "checkpoints")
        progress = Progress()
        if found:
            tensors, state = checkpoint.load(found[-1])
            progress = Progress(**state, logits={k: v.numpy() for k, v in _under("logits/", tensors).items()})
            self.step.load_state_dict(_under("step/", tensors))
        self.run.keep_epochs(progress.epochs_done)
        return progress

    def add(self, row: dict[str, Any], clocks: dict[str, float]) -> None:
        """Take in a finished epoch: evaluate it where that is due, record it, and write a checkpoint where one is due.

        Args:
            row: the epoch's metrics; evaluation adds its metrics to it.
            clocks: seconds so far.
        """
        epoch, last = row["epoch"], row["epoch"] == self.recipe.train.epochs
        if epoch % self.recipe.eval.every_epochs == 0 or last:
            self._evaluate(row)
        self.run.append_epoch(row)
        self.progress.epochs_done = epoch
        self.progress.images += row["images"]
        self.progress.timed_images += row["images_per_s"] * row["training_s"]
        if epoch % self.recipe.checkpoint.every_epochs == 0 or last:
            self._checkpoint(clocks)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, row: dict[str, Any]) -> None:
        """Evaluate every kind of weights on test and holdout; keep the metrics of the last, best and selected epoch."""
        results = self._metrics([name for name in self.splits if name != "train"])
        for name, by_kind in results.items():
            row[name] = {kind: found.row() for kind, found in by_kind.items()}
        progress, test = self.progress, row["test"][self.reported]
        entry = {"epoch": row["epoch"], **test}
        progress.last = entry
        self._keep("last", results)
        if progress.best is None or test["accuracy"] > progress.best["accuracy"]:
            progress.best = {**entry, "protocol": BEST}
            self._keep("best", results, weights=True)
        if "holdout" in row:
            holdout = row["holdout"][self.reported]["accuracy"]
            if progress.selected is None or holdout > progress.selected["holdout_accuracy"]:
                progress.selected = {**entry, "holdout_accuracy": holdout, "protocol": SELECTED}
                self._keep("selected", results, weights=True)

    def _metrics(self, names: list[str], tta: str = "none") -> dict[str, dict[str, Metrics]]:
        """Return the metrics of each named split for each kind of weights."""
        found: dict[str, dict[str, Metrics]] = {name: {} for name in names}
        for kind in self.kinds:
            with self.step.weights(kind):
                for name in names:
                    found[name][kind] = self.splits[name].metrics(tta)
        return found

    def _keep(self, which: str, results: dict[str, dict[str, Metrics]], weights: bool = False) -> None:
        """Keep an epoch's logits, and its reported weights where wanted, as the ``last``, ``best`` or ``selected``."""
        for name, by_kind in results.items():
            for kind, found in by_kind.items():
                self.progress.logits[f"{name}/{which}/{kind}"] = found.logits
        if weights:
            self._write_weights(which)

    def _write_weights(self, which: str) -> None:
        folder = self.run.folder / "weights"
        folder.mkdir(exist_ok=True)
        with self.step.weights(self.reported):
            state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
            save_file(state, folder / f".{which}.tmp")
        (folder / f".{which}.tmp").replace(folder / f"{which}.safetensors")

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def _checkpoint(self, clocks: dict[str, float]) -> None:
        self.progress.clocks = clocks
        tensors = {f"step/{k}": v for k, v in self.step.state_dict().items()}
        # Copies: the last epoch's logits may be the best one's too, and safetensors refuses shared memory.
        tensors |= {f"logits/{k}": torch.tensor(v) for k, v in self.progress.logits.items()}
        state = {k: v for k, v in vars(self.progress).items() if k != "logits"}
        folder = self.run.folder / "checkpoints"
        checkpoint.save(folder, self.progress.epochs_done, tensors, state, self.recipe.checkpoint.keep)

    # --------------------------------------------------------------------------------------------------------- the end

    def finish(self, clocks: dict[str, float], facts: dict[str, Any]) -> dict[str, Any]:
        """Write logits, weights and summary of a run that has come to its end or stops here; return the summary.

        Args:
            clocks: seconds by name.
            facts: more entries for the summary (loader, environment, ...).
        """
        progress, recipe = self.progress, self.recipe
        finished = progress.epochs_done == recipe.train.epochs
        self._checkpoint(clocks)
        arrays = dict(progress.logits)
        tta = self._tta(arrays) if finished and recipe.eval.tta != "none" else None
        if finished and "train" in self.splits:
            arrays |= self._train_logits()
        arrays |= {f"{name}/labels": split.labels.cpu().numpy() for name, split in self.splits.items()}
        self.run.write_logits(arrays | facts.pop("arrays", {}))
        self._write_weights("last")
        summary = {
            "name": recipe.name, "stage": recipe.stage, "status": "finished" if finished else "stopped",
            "epochs": recipe.train.epochs, "epochs_done": progress.epochs_done, "seed": recipe.seed,
            "weights": self.reported, "last": progress.last, "best": progress.best, "selected": progress.selected,
            "tta": tta, "published": recipe.published.model_dump() if recipe.published else None,
            "clocks": {k: round(v, 3) for k, v in clocks.items()}, "images": progress.images,
            "images_per_s": progress.timed_images / clocks["training_s"] if clocks["training_s"] else None,
            **facts,
        }
        self.run.write_summary(summary)
        return {"format": 1, **summary}

    def _train_logits(self) -> dict[str, np.ndarray]:
        """Return the logits of the training images by key: of the last weights, and of the best and selected ones."""
        arrays = {f"train/last/{k}": found.logits for k, found in self._metrics(["train"])["train"].items()}
        for which in ("best", "selected"):
            if getattr(self.progress, which) is not None:
                with self._saved_weights(which):
                    arrays[f"train/{which}/{self.reported}"] = self.splits["train"].metrics().logits
        return arrays

    @contextmanager
    def _saved_weights(self, which: str) -> Iterator[None]:
        """Let the model have the weights of an earlier epoch for a while."""
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(load_file(self.run.folder / "weights" / f"{which}.safetensors"))
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def _tta(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Evaluate the last weights with test-time augmentation; add the logits to ``arrays``."""
        kind = self.recipe.eval.tta
        found = self._metrics(["test"], kind)["test"]
        arrays |= {f"test/last/{weights}/tta": f.logits for weights, f in found.items()}
        return {"kind": kind, **found[self.reported].row()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
