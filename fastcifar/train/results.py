"""The results of a run as it goes: metrics, best and selected epochs, checkpoints, and the summary at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.console import err
from fastcifar.errors import UserError
from fastcifar.logits_file import write_arrays
from fastcifar.manifest import sha256
from fastcifar.run_directory import END, RunDirectory
from fastcifar.train.evaluate import EvaluationSet, Metrics
from fastcifar.train.follower import Follower
from fastcifar.train.step import Step
from fastcifar.train.step_state import USER

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
        partial: how far the run is within an epoch, as `fastcifar.run_records.Partial`; None between epochs.
        weights: the SHA-256 of the weights saved as ``best`` and ``selected``.
        logits: float32 (N, classes) by ``split/which/weights``.
    """

    epochs_done: int = 0
    images: int = 0
    timed_images: float = 0.0
    last: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    selected: dict[str, Any] | None = None
    clocks: dict[str, float] = field(default_factory=dict)
    partial: dict[str, Any] | None = None
    weights: dict[str, str] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSetting:
    """What a run ran with beyond its recipe, as the summary tells it.

    Attributes:
        loader: the backend that handed over the images, such as ``resident``.
        mode: how the steps were executed: ``eager``, ``compile``, ``graph`` or ``compile+graph``.
        fallback: why that is less than the recipe asks for; None where it is not.
        classes: their names, by number.
        image_px: side of the square images.
        content: the hash of the data set that its manifest has.
        holdout: int64 (n,), the rows of the training split that were set aside; n may be 0.
        together: how many runs took turns in the process; on a GPU the clocks of each hold what it did for the others.
    """

    loader: str
    mode: str
    fallback: str | None
    classes: list[str]
    image_px: int
    content: str
    holdout: np.ndarray
    together: int = 1


class Results:
    """Evaluates, remembers, writes checkpoints and the end of a run.

    Args:
        run: its directory, on rank 0; a `Follower` elsewhere.
        step: the training step; its ranks all evaluate, and the first one writes.
        splits: ``test``, and ``holdout`` where the recipe sets one aside, and ``train`` where its logits are wanted.

    On making it takes up the run's newest checkpoint, if there is one.
    """

    def __init__(
        self, recipe: Recipe, run: RunDirectory | Follower, model: nn.Module, step: Step,
        splits: dict[str, EvaluationSet],
    ) -> None:
        self.ranks = step.ranks
        self.recipe, self.run, self.model, self.step, self.splits = recipe, run, model, step, splits
        self.kinds = ("raw", "ema") if recipe.ema else ("raw",)
        self.reported = self.kinds[-1]
        self._files: dict[str, bytes | str] = {}  # to be written together, so that they belong together
        self._weights: dict[str, bytes | str] = {}  # of the best and the selected epoch, to go with the next checkpoint
        self._position: dict[str, Tensor] = {}  # of the step within an epoch that was interrupted
        # Only rank 0 reads; the others take up what it has.
        progress = Progress() if isinstance(run, Follower) else self._restore(run)
        self.progress, self._position = self.ranks.from_first((progress, self._position))
        step.follow_first()

    def _restore(self, run: RunDirectory) -> Progress:
        """Take up the newest intact checkpoint; name damaged and missing ones, and forget them."""
        # From the newest back to the first intact one: a damaged file costs some epochs, not the run.
        names, damaged, progress = run.checkpoints(), [], Progress()
        run.check_weights()
        for name in reversed(names):
            try:
                progress = self._load(run, name)
                break
            except UserError as error:
                damaged.append(name)
                err.print(str(error), markup=False, soft_wrap=True)
        if damaged and len(damaged) == len(names):
            raise UserError(
                f"{run.folder}: no checkpoint is intact; restore the folder from a copy, "
                f"or train afresh: `fastcifar run {run.folder / 'recipe.toml'}`"
            )
        if damaged:
            taken = progress_name(progress)
            err.print(f"{run.folder}: goes on from the one before, {taken}", markup=False, soft_wrap=True)
        self._forget_later(run, progress, damaged)
        return progress

    def _forget_later(self, run: RunDirectory, progress: Progress, damaged: list[str]) -> None:
        """Drop what comes after the checkpoint taken: metrics, the damaged checkpoints, and the end they had led to."""
        rows = run.metrics()
        # Those epochs will be trained again and write their rows again.
        later = rows[progress.epochs_done :]
        if later and not run.checkpoints():
            told = f"{run.folder}: has no checkpoint: begins again with the first epoch, metrics.jsonl had {len(rows)}"
            err.print(told, markup=False, soft_wrap=True)
        replaced = self._forget_choices(run, progress)
        if later or damaged or replaced:
            kept = run.metrics_file(rows[: progress.epochs_done]) if later else {}
            run.commit(kept, remove=[*END, *replaced, *run.files_of(damaged)])

    @staticmethod
    def _forget_choices(run: RunDirectory, progress: Progress) -> list[str]:
        """Return the files of best or selected weights that are of later epochs; forget the choices they have replaced.

        There are such files where the newest checkpoint is damaged, or a process was killed while it wrote them.
        """
        replaced = []
        for which in ("best", "selected"):
            file, chosen = f"weights/{which}.safetensors", getattr(progress, which)
            there = sha256(run.read(file)) if (run.folder / file).is_file() else None
            known = progress.weights.get(which, there if chosen else None)
            if there == known:
                continue
            if chosen:
                told = f"is not of the {which} epoch {chosen['epoch']} any more: chosen anew from the epochs to come"
                err.print(f"{run.folder / file}: {told}", markup=False, soft_wrap=True)
            replaced.append(file)
            setattr(progress, which, None)
            progress.weights.pop(which, None)
            progress.logits = {k: v for k, v in progress.logits.items() if k.split("/")[1] != which}
        return replaced

    def _load(self, run: RunDirectory, name: str) -> Progress:
        """Return a checkpoint's progress, its state taken up by the step.

        Raises:
            UserError: it is damaged or belongs to another run.
        """
        tensors, state = run.checkpoint(name)
        values = {k: v for k, v in state.items() if k != "recipe"}
        progress = Progress(**values, logits={k: v.numpy() for k, v in _under("logits/", tensors).items()})
        place = run.folder / "checkpoints" / name
        if progress_name(progress) != name or progress.epochs_done > self.recipe.train.epochs:
            raise UserError(f"{place}: is damaged: it says that it is of another epoch")
        try:
            self.step.load_state_dict(_under("step/", tensors))
        except ValueError as error:
            raise UserError(f"{place}: does not fit the recipe's model: {error}") from None
        self._position = _under("position/", tensors)
        return progress

    def begin_epoch(self, clocks: dict[str, float]) -> dict[str, Any]:
        """Return where the epoch begins: at its start, or after the steps done before an interrupt.

        Args:
            clocks: seconds so far.

        Returns:
            The values of `fastcifar.run_records.Partial`.
        """
        partial = self.progress.partial
        if partial is None:
            return {"steps": 0, "sizes": [], "before": clocks}
        self.step.go_to(partial["sizes"], self._position)
        self.progress.partial, self._position = None, {}
        return partial

    def save_within_epoch(self, partial: dict[str, Any], clocks: dict[str, float]) -> None:
        """Write a checkpoint between two steps of an epoch, from which a resume goes on to the same bits.

        Args:
            partial: as from `begin_epoch`, with the steps done since.
            clocks: seconds so far.

        Raises:
            UserError: the weights are not finite.
        """
        if not partial["steps"]:
            return
        self._require_finite(self.progress.epochs_done + 1)
        sizes, tensors = self.step.position()
        self.progress.partial = {**partial, "sizes": sizes}
        self._add_checkpoint(clocks, {f"position/{k}": v for k, v in tensors.items()})
        self._commit()

    def add(self, row: dict[str, Any], clocks: dict[str, float], save: bool = False) -> None:
        """Take in a finished epoch: evaluate it where that is due, record it, and write a checkpoint where one is due.

        Args:
            row: the epoch's metrics; evaluation adds its metrics to it.
            clocks: seconds so far.
            save: write a checkpoint in any case, for the run is about to stop.

        Raises:
            UserError: the weights or what they predict are not finite; nothing of the epoch is written then.
        """
        epoch, last = row["epoch"], row["epoch"] == self.recipe.train.epochs
        # Before the evaluation: a NaN that is only found in a checkpoint has spoiled the checkpoint.
        self._require_finite(epoch)
        if epoch % self.recipe.eval.every_epochs == 0 or last:
            self._evaluate(row)
        self.progress.epochs_done = epoch
        self.progress.images += row["images"]
        self.progress.timed_images += row["images_per_s"] * row["training_s"]
        # Written with the checkpoint in one commit: a crash between the two would leave one epoch more than the other.
        self._files |= self.run.metrics_file([*self.run.metrics(), row])
        if epoch % self.recipe.checkpoint.every_epochs == 0 or last or save:
            self._add_checkpoint(clocks)
        self._commit()

    def _commit(self) -> None:
        """Write what the epoch brought: all of it, or after a crash none. An earlier end is the run's no more."""
        name = progress_name(self.progress)
        wrote = any(file.startswith(f"checkpoints/{name}/") for file in self._files)
        outdated = self.run.outdated(name, self.recipe.checkpoint.keep) if wrote else []
        # A summary of an epoch that the run has gone beyond would pass for the result of the whole.
        ended = [file for file in END if file not in self._files]
        self.run.commit(self._files, remove=[*ended, *outdated])
        self._files = {}

    def _require_finite(self, epoch: int) -> None:
        """Make sure that no weight, average or statistic is spoiled, before anything of this epoch is kept.

        Raises:
            UserError: one is.
        """
        # An optimizer of the user's own may keep an infinity on purpose.
        own = [t for name, t in self.step.state_dict().items() if not name.startswith(USER)]
        floating = [t for t in own if t.is_floating_point()]
        # One wait for the device; a sum is not finite where an element is not, but may overflow: so look at each.
        spoiled = torch.stack([torch.isfinite(t).all() for t in floating]).logical_not()
        if bool(spoiled.any()):  # "none" is zero, as all else that says nothing happened, on the null device too
            raise UserError(diverged(f"the weights are not finite after epoch {epoch}"))

    # ------------------------------------------------------------------------------------------------------ evaluation

    def _evaluate(self, row: dict[str, Any]) -> None:
        """Evaluate every kind of weights on test and holdout; keep the metrics of the last, best and selected epoch."""
        results = self._finite_metrics(row["epoch"])
        for name, by_kind in results.items():
            row[name] = {kind: found.row() for kind, found in by_kind.items()}
        progress, test = self.progress, row["test"][self.reported]
        entry = {"epoch": row["epoch"], **test}
        progress.last = entry
        self._keep("last", results)
        # Chosen on the test set, as published ladders do; `selected` is the honest one beside it.
        if progress.best is None or test["accuracy"] > progress.best["accuracy"]:
            progress.best = {**entry, "protocol": BEST}
            self._keep("best", results, weights=True)
        if "holdout" in row:
            holdout = row["holdout"][self.reported]["accuracy"]
            if progress.selected is None or holdout > progress.selected["holdout_accuracy"]:
                progress.selected = {**entry, "holdout_accuracy": holdout, "protocol": SELECTED}
                self._keep("selected", results, weights=True)

    def _finite_metrics(self, epoch: int) -> dict[str, dict[str, Metrics]]:
        """Return the metrics after an epoch on test and holdout for each kind of weights.

        Raises:
            UserError: they are not finite.
        """
        results = self._metrics([name for name in self.splits if name != "train"])
        if not all(np.isfinite(found.loss) for by_kind in results.values() for found in by_kind.values()):
            raise UserError(diverged(f"the predictions after epoch {epoch} are not finite"))
        return results

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
        self.progress.logits |= _logits(which, results)
        if weights:
            # Not before the next checkpoint: a killed run goes on from the last one, whose best epoch has its own.
            file = self._weights_file(which)
            self._weights |= file
            self.progress.weights[which] = sha256(*file.values())

    def _weights_file(self, which: str) -> dict[str, bytes]:
        """Return the name and content of the file of the weights that the run reports."""
        with self.step.weights(self.reported):
            # Copies: tied weights have one memory under two names, which safetensors refuses.
            plain = torch.contiguous_format
            state = {k: v.detach().cpu().clone(memory_format=plain) for k, v in self.model.state_dict().items()}
            return {f"weights/{which}.safetensors": save(state)}

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def _add_checkpoint(self, clocks: dict[str, float], position: dict[str, Tensor] | None = None) -> None:
        self.progress.clocks = clocks
        tensors = {f"step/{k}": v for k, v in self.step.state_dict().items()} | (position or {})
        # Copies: the last epoch's logits may be the best one's too, and safetensors refuses shared memory.
        tensors |= {f"logits/{k}": torch.tensor(v) for k, v in self.progress.logits.items()}
        state = {k: v for k, v in vars(self.progress).items() if k != "logits"}
        # Before the checkpoint, which is complete when its last file is there.
        self._files |= self._weights
        self._weights = {}
        self._files |= self.run.checkpoint_files(progress_name(self.progress), tensors, state)

    # --------------------------------------------------------------------------------------------------------- the end

    def finish(self, clocks: dict[str, float], setting: RunSetting) -> dict[str, Any]:
        """Write logits, weights and summary of a run that has come to its end or stops here; return the summary.

        Args:
            clocks: seconds by name.
            setting: what the run ran with, for the summary.

        Raises:
            UserError: what the last weights predict is not finite.
        """
        progress, recipe = self.progress, self.recipe
        finished = progress.epochs_done == recipe.train.epochs
        last, arrays = self._last()
        if progress_name(progress) not in self.run.checkpoints():
            self._add_checkpoint(clocks)
            self._commit()
        tta = self._tta(arrays) if finished and recipe.eval.tta != "none" else None
        if finished and "train" in self.splits:
            arrays |= self._train_logits()
        arrays |= {f"{name}/labels": split.labels.cpu().numpy() for name, split in self.splits.items()}
        self._files["logits.npz"] = write_arrays(arrays | {"holdout/indices": setting.holdout})
        self._files |= self._weights_file("last")
        summary = {
            "name": recipe.name, "stage": recipe.stage, "status": "finished" if finished else "stopped",
            "epochs": recipe.train.epochs, "epochs_done": progress.epochs_done, "seed": recipe.seed,
            "weights": self.reported, "last": last, "best": progress.best, "selected": progress.selected,
            "tta": tta, "published": recipe.published.model_dump() if recipe.published else None,
            "clocks": {k: round(v, 3) for k, v in clocks.items()}, "images": progress.images,
            "images_per_s": progress.timed_images / clocks["training_s"] if clocks["training_s"] else None,
            "loader": setting.loader, "mode": setting.mode, "fallback": setting.fallback, "together": setting.together,
            "classes": setting.classes, "image_px": setting.image_px, "content": setting.content,
            "environment": self.run.environment, "git": self.run.environment.get("git"),
        }
        self._commit()
        self.run.write_summary(summary)
        return self.run.summary

    def _last(self) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
        """Return the metrics of the last epoch, and all logits by key with those of the last epoch among them."""
        progress = self.progress
        evaluated = progress.last["epoch"] if progress.last else 0
        if evaluated == progress.epochs_done:
            return progress.last, dict(progress.logits)
        # Stopped at an epoch that `eval.every_epochs` passes over. What is found is for this end alone: kept in the
        # progress, it would be the resumed run's, which then ended in another way than one that never stopped.
        results = self._finite_metrics(progress.epochs_done)
        last = {"epoch": progress.epochs_done, **results["test"][self.reported].row()}
        return last, progress.logits | _logits("last", results)

    def _train_logits(self) -> dict[str, np.ndarray]:
        """Return the logits of the training images by key: of the last weights, and of the best and selected ones."""
        arrays = {f"train/last/{k}": found.logits for k, found in self._metrics(["train"])["train"].items()}
        for which in ("best", "selected"):
            # Stacking as published reads the best epoch's logits of the training images.
            if getattr(self.progress, which) is not None:
                with self._saved_weights(which):
                    arrays[f"train/{which}/{self.reported}"] = self.splits["train"].metrics().logits
        return arrays

    @contextmanager
    def _saved_weights(self, which: str) -> Iterator[None]:
        """Let the model have the weights of an earlier epoch for a while."""
        own = {k: v.clone() for k, v in self.model.state_dict().items()}
        if not isinstance(self.run, Follower):
            self.model.load_state_dict(self.run.weights(which))
        self.ranks.broadcast(self.model.state_dict().values())
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


def _logits(which: str, results: dict[str, dict[str, Metrics]]) -> dict[str, np.ndarray]:
    """Return an epoch's logits by key, as those of the ``last``, ``best`` or ``selected`` one."""
    by_split = results.items()
    return {f"{name}/{which}/{kind}": found.logits for name, kinds in by_split for kind, found in kinds.items()}


def progress_name(progress: Progress) -> str:
    """Return the name of the checkpoint of so much progress."""
    name = f"epoch-{progress.epochs_done:05d}"
    return f"{name}-step-{progress.partial['steps']:06d}" if progress.partial else name


def diverged(what: str) -> str:
    """Return the message for training that has left the finite numbers."""
    return (
        f'{what}: lower optimizer.lr, set train.grad_clip = 1.0, engine.precision = "fp32" or '
        'engine.on_nonfinite = "skip"; the last checkpoint is from before it. `--check-nan` finds the first layer; '
        'where it finds none, compiled code is to blame: engine.mode = "graph" does without'
    )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
