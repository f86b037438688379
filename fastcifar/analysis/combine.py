"""Execute a combination recipe and record it as a run directory, so that tables and reports treat it as a run."""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis import ensemble
from fastcifar.analysis.members import Scores, available, collect, source_of
from fastcifar.analysis.published import member_differs
from fastcifar.analysis.statistics import accuracy
from fastcifar.config.schema import CombineConfig, CombineRecipe
from fastcifar.console import say
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory

# The logarithm of a class without votes stays finite, in float32 too.
TINY = float(np.finfo(np.float32).tiny)
PROTOCOLS = {
    "last": "members at their last epoch",
    "best": "members at their best epochs on the test set, as published",
    "selected": "members at the epochs chosen on their holdout",
}
WITH_TTA = ", under test-time augmentation"


@dataclass(frozen=True)
class Combined:
    """One combined prediction of the test images.

    Attributes:
        log_probabilities: float64 (N, K).
        metrics: ``accuracy`` in percent, ``loss`` in nats, ``protocol`` in words.
        details: what was fitted or chosen.
    """

    log_probabilities: np.ndarray
    metrics: dict[str, Any]
    details: dict[str, Any]


def run_combine(
    recipe: CombineRecipe, members: Mapping[str, RunDirectory], folder: Path | None = None, *, tta: bool = False,
    seed: int | None = None,
) -> dict[str, Any]:
    """Combine runs as a recipe says, write the result as a run directory and return its summary.

    Args:
        recipe: its ``combine.members`` are keys of ``members``.
        members: finished runs by recipe name.
        folder: where to write; None writes beside the first member, under the recipe's name.
        tta: combine the logits under test-time augmentation.
        seed: of the members, where they share one, for the summary; None names that of the meta-model.

    Raises:
        UserError: a member is missing, lacks the logits that the protocol needs, or does not match the others.
    """
    done = replace(results_of(recipe, members, tta=tta), seed=seed)
    return record(done, folder or next(iter(done.members.values())).folder.parent / recipe.name).summary


@dataclass(frozen=True)
class Done:
    """A combination that has been executed.

    Attributes:
        recipe: what was wanted.
        members: its runs, in its order.
        results: by ``last``, ``best`` and ``selected``, as far as there are such.
        seconds: how long it took.
        environment: hardware and versions.
        seed: for the summary; None names that of the meta-model.
    """

    recipe: CombineRecipe
    members: dict[str, RunDirectory]
    results: dict[str, Combined]
    seconds: float
    environment: dict[str, Any]
    seed: int | None = None

    def summary(self) -> dict[str, Any]:
        """Return the content of ``summary.json``."""
        first = next(iter(self.members.values()))
        recipe, clocks = self.recipe, {"total_s": self.seconds, "training_s": self.seconds, "compilation_s": 0.0}
        return {
            "name": recipe.name,
            "stage": recipe.stage,
            "published": recipe.published.model_dump() if recipe.published else None,
            "status": "finished",
            "how": recipe.combine.how,
            "members": [_entry(name, run) for name, run in self.members.items()],
            "epochs": 0,
            "epochs_done": 0,
            "weights": "raw",
            **{which: self.results[which].metrics if which in self.results else None for which in PROTOCOLS},
            "tta": None,
            "combined": {which: result.details for which, result in self.results.items()},
            "clocks": clocks,
            "images_per_s": None,
            "seed": recipe.combine.meta_seed if self.seed is None else self.seed,
            "source": source_of(first),
            **{key: first.summary[key] for key in ("classes", "image_px", "content") if key in first.summary},
            "loader": None,
            "environment": self.environment,
            "git": self.environment.get("git"),
        }


def results_of(recipe: CombineRecipe, members: Mapping[str, RunDirectory], *, tta: bool = False) -> Done:
    """Combine runs as a recipe says, without writing anything; see `run_combine`."""
    from fastcifar.environment import describe

    start = time.perf_counter()
    chosen = _in_order(recipe, members)
    results = combine(recipe.combine, chosen, tta=tta)
    return Done(recipe, chosen, results, time.perf_counter() - start, describe())


def record(done: Done, folder: Path) -> RunDirectory:
    """Write the run directory of a combination: recipe, environment, logits, and last of all the summary."""
    run = RunDirectory(folder)
    if not RunDirectory.exists(folder) or run.recipe != done.recipe:
        run = RunDirectory.create(folder, done.recipe, done.environment)
    first = next(iter(done.members.values()))
    arrays = {f"test/{which}/raw": r.log_probabilities.astype(np.float32) for which, r in done.results.items()}
    with run.alone():
        run.write_logits({**arrays, "test/labels": first.logits("test/labels")})
        run.write_summary(done.summary())
    return run


def combine_run(run: RunDirectory, *, quiet: bool = False) -> dict[str, Any]:
    """Execute the combination recipe of a run directory and return the summary.

    The members are the newest finished runs of the named recipes, looked for beside the directory, then in ``runs/``.

    Args:
        run: its directory.
        quiet: do not say on stderr which runs were taken.

    Raises:
        UserError: no finished run of a member is there, or see `run_combine`.
    """
    recipe = run.recipe
    if not isinstance(recipe, CombineRecipe):
        raise UserError(f"{run.folder}: is a training run; only a recipe with a [combine] table combines runs")
    members = find_members(recipe, run.folder)
    if not quiet:
        tell_members(members)
    return run_combine(recipe, members, run.folder)


def find_members(recipe: CombineRecipe, folder: Path) -> dict[str, RunDirectory]:
    """Return the newest finished runs of a recipe's members beside its own run directory, else in ``runs/``.

    Raises:
        UserError: there is none of a member.
    """
    return _in_order(recipe, newest_finished(recipe.combine.members, (folder.parent, Path("runs"))))


def refuse_missing_members(recipe: CombineRecipe, out: Path | None, resume: str | None) -> None:
    """Refuse a combination whose members are missing before its run directory is made.

    Args:
        recipe: what is to run.
        out: the run directory, or None for one under ``runs/``.
        resume: a run directory that is there already, ``auto``, or None.

    Raises:
        UserError: there is no finished run of a member.
    """
    if resume in (None, "auto") and (out is None or not RunDirectory.exists(out)):
        find_members(recipe, out or Path("runs") / recipe.name)


def tell_members(members: Mapping[str, RunDirectory]) -> None:
    """Say on stderr which run each member is, and where its recipe is another than the shipped one of its name."""
    for name, run in members.items():
        last = run.summary["last"]
        say(f"member {name}: {run.folder}, " + (f"{last['accuracy']:.2f}%" if last else "not evaluated"))
    for name, run in members.items():
        if keys := member_differs(run):
            say(f"note: member {name} ({run.folder}) differs from the shipped recipe: {', '.join(keys)}")


def newest_finished(names: Iterable[str], folders: Iterable[Path]) -> dict[str, RunDirectory]:
    """Return the newest finished run of each recipe name, from the first of the folders that has one."""
    found: dict[str, RunDirectory] = {}
    for folder in folders:
        newest = _newest_in(folder)
        found = {name: newest[name] for name in names if name in newest} | found
    return found


def _newest_in(folder: Path) -> dict[str, RunDirectory]:
    """Return the newest finished run of each recipe name in a folder."""
    newest: dict[str, RunDirectory] = {}
    for path in folder.glob("*"):
        with suppress(UserError):  # what is no run, damaged or may not be read is no candidate
            run = RunDirectory.open(path)
            if run.finished:
                newest[run.recipe.name] = max(newest.get(run.recipe.name, run), run, key=lambda run: run.ended_at)
    return newest


def _in_order(recipe: CombineRecipe, members: Mapping[str, RunDirectory]) -> dict[str, RunDirectory]:
    missing = [name for name in recipe.combine.members if name not in members]
    if missing:
        raise UserError(
            f"{recipe.name}: combine.members: there is no run of {', '.join(missing)}; train it first "
            f"(`fastcifar run {missing[0]}`)"
        )
    return {name: members[name] for name in recipe.combine.members}


def combine(config: CombineConfig, members: Mapping[str, RunDirectory], *, tta: bool = False) -> dict[str, Combined]:
    """Return the combined predictions under ``last``, ``best`` and ``selected``, as far as there are such.

    Voting gives one for each kind of epoch that all members have. Published stacking gives ``last`` and ``best``,
    honest stacking ``last`` and ``selected``, which are the same single look at the test set.
    """
    if config.how == "stacking":
        return _stack(config, members, tta)
    return {which: _vote(config, members, which, tta) for which in _kinds(members, tta)}


def _kinds(members: Mapping[str, RunDirectory], tta: bool) -> list[str]:
    """Return the kinds of epochs that all members have; reading the missing ``last`` gives the error to show."""
    found = available(members, "test", tta)
    if not found:
        collect(members, "test", "last", tta)
    return found


def _vote(config: CombineConfig, members: Mapping[str, RunDirectory], which: str, tta: bool) -> Combined:
    test = collect(members, "test", which, tta)
    probabilities = ensemble.softmax(test.logits)
    weights, details = _weights(config, members, which)
    vote = ensemble.hard_vote if config.how == "hard" else ensemble.soft_vote
    details = {"protocol": PROTOCOLS[which], **details}
    return _combined(np.log(np.maximum(vote(probabilities, weights), TINY)), test, details, tta)


def _weights(
    config: CombineConfig, members: Mapping[str, RunDirectory], which: str
) -> tuple[list[float] | None, dict[str, Any]]:
    """Return the members' weights: none, the given ones, or those fitted on the holdout."""
    if config.weights is not None or config.how != "weighted":
        given = config.weights
        return given, {"weights": given} if given is not None else {}
    holdout = collect(members, "holdout", which)
    fitted = ensemble.fit_weights(ensemble.softmax(holdout.logits), holdout.labels, config.meta_seed)
    weights = [float(w) for w in fitted.weights]
    return weights, {
        "weights": weights,
        "fitted_on": "holdout, five-fold cross-validation",
        "shrinkage": fitted.shrinkage,
        "cv_loss": fitted.cv_loss,
        "cv_accuracy": fitted.cv_accuracy,
        "equal_weights_cv_loss": fitted.equal_loss,
    }


def _stack(config: CombineConfig, members: Mapping[str, RunDirectory], tta: bool) -> dict[str, Combined]:
    from fastcifar.analysis import stacking

    if config.protocol == "published":
        # The same epoch in both splits; the last one's logits alone are there with test-time augmentation.
        which = "best" if "best" in available(members, "train") and not tta else "last"
        test, train = collect(members, "test", which, tta), collect(members, "train", which)
        stacked = stacking.stack_published(train, test, config.meta, config.meta_seed)
        counts = "best"
    else:
        which = "last" if tta else "selected"
        test, holdout = collect(members, "test", which, tta), collect(members, "holdout", which)
        stacked = stacking.stack_honest(holdout, test, config.meta, config.meta_seed)
        counts = "selected"
    return {
        "last": _combined(ensemble.log_softmax(stacked.last_logits), test, stacked.last_details, tta),
        counts: _combined(ensemble.log_softmax(stacked.logits), test, stacked.details, tta),
    }


def _combined(log_probabilities: np.ndarray, test: Scores, details: dict[str, Any], tta: bool) -> Combined:
    """Score a combined prediction; where its test logits are under test-time augmentation, its protocol says so."""
    chosen = log_probabilities[np.arange(len(test.labels)), test.labels]
    details = {**details, "protocol": details["protocol"] + (WITH_TTA if tta else ""), "tta": tta}
    metrics = {
        "epoch": details.get("meta_epoch", 0),
        "accuracy": accuracy(log_probabilities, test.labels),
        "loss": -float(chosen.mean()),
        "protocol": details["protocol"],
    }
    return Combined(log_probabilities, metrics, details)


def _entry(name: str, run: RunDirectory) -> dict[str, Any]:
    """Return what a combination's summary says of a member: where it is, how far it has come, its own accuracies."""
    entries = {which: run.summary.get(which) for which in (*PROTOCOLS, "tta")}
    return {
        "name": name,
        "run": str(run.folder),
        **{key: run.summary[key] for key in ("status", "epochs_done", "epochs")},
        "recipe_differs": member_differs(run),
        **{which: entry["accuracy"] if entry else None for which, entry in entries.items()},
    }
