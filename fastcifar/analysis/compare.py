"""Runs side by side: means over seeds, and whether two runs differ on the same test images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis.members import WHICH, marked, marked_names, same_test_images
from fastcifar.analysis.published import differs
from fastcifar.analysis.statistics import mcnemar, mean_of
from fastcifar.config import CombineRecipe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.text import resume_command, stopped_at


def group_by_recipe(runs: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """Return one row per recipe (equal but for the seed): mean and standard error over its finished runs.

    Unfinished runs are in no mean: beside finished ones of their recipe they are left out, see `left_out`; without such
    each is a row of its own, whose ``stopped`` says how far it has come. Of runs with one seed the newest counts: they
    are repetitions, and would make the standard error too small.

    Each row has ``name``, ``label`` (the name, with a folder where two rows have the same, and with ``stopped``),
    ``runs`` (folders), ``seeds`` and, for ``last``, ``best``, ``selected``, the mean, its standard error and their
    number in percent, or None where a run has no such metric; ``published`` is the best accuracy published for the
    recipe of that name, and ``recipe_differs`` the keys in which this one is another.
    """
    rows = [_row(group) for group in _groups(runs)]
    names = [row["name"] for row in rows]
    for row, folder in zip(rows, [Path(row["runs"][0]).name for row in rows], strict=True):
        label = f"{row['name']} ({folder})" if names.count(row["name"]) > 1 else row["name"]
        row["label"] = marked(label, row["stopped"])
    return rows


def left_out(runs: Sequence[RunDirectory]) -> list[RunDirectory]:
    """Return the runs that are in no row of `group_by_recipe`: unfinished ones, and older ones of a repeated seed."""
    shown = {id(run) for group in _groups(runs) for run in group}
    return [run for run in runs if id(run) not in shown]


def _groups(runs: Sequence[RunDirectory]) -> list[list[RunDirectory]]:
    """Return the finished runs of each recipe, or, where it has none, its unfinished ones one by one."""
    alike: dict[str, list[RunDirectory]] = {}
    for run in runs:
        alike.setdefault(_key(run), []).append(run)
    groups: list[list[RunDirectory]] = []
    for found in alike.values():
        finished = _one_per_seed([run for run in found if run.finished])
        groups += [finished] if finished else [[run] for run in found]
    return groups


def _one_per_seed(runs: list[RunDirectory]) -> list[RunDirectory]:
    """Return the newest run of each seed, in the given order; combinations, whose members may differ, all of them."""
    newest: dict[int, RunDirectory] = {}
    for run in runs:
        if isinstance(run.recipe, CombineRecipe):
            return runs
        newest[run.recipe.seed] = max(newest.get(run.recipe.seed, run), run, key=lambda run: run.ended_at)
    return [run for run in runs if run in newest.values()]


def note_left_out(runs: Sequence[RunDirectory]) -> str:
    """Return the note for people on runs that are left out of the means, and what to do; nothing where there are none.

    Args:
        runs: from `left_out`.
    """
    if not runs:
        return ""
    stopped, parts = [run for run in runs if not run.finished], []
    if stopped:
        each = ", ".join(f"{run.folder} ({stopped_at(run.summary)})" for run in stopped)
        how = resume_command(stopped[0].folder) if len(stopped) == 1 else "fastcifar run --resume RUN_DIR"
        parts.append(f"{each}; finish {'it' if len(stopped) == 1 else 'each'} with `{how}`")
    if repeated := [run for run in runs if run.finished]:
        each = ", ".join(f"{run.folder} (seed {run.summary['seed']})" for run in repeated)
        parts.append(f"{each}: a newer run has the same recipe and seed; take another seed with `--set seed=N`")
    return "left out of the means: " + "; ".join(parts)


def refuse_twice(runs: Sequence[RunDirectory]) -> None:
    """Refuse a run directory that is given twice.

    Raises:
        UserError: it is.
    """
    seen: set[Path] = set()
    for run in runs:
        if run.folder.resolve() in seen:
            raise UserError(f"RUN...: {run.folder} is given twice")
        seen.add(run.folder.resolve())


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
    published = group[0].recipe.published
    return {
        "name": group[0].recipe.name,
        "stopped": stopped_at(group[0].summary) or None,
        "runs": [str(run.folder) for run in group],
        "seeds": [run.summary["seed"] for run in group],
        **metrics,
        "training_s": training.mean if training else None,
        "published": published.best if published else None,
        "recipe_differs": _differs(group),
    }


def _differs(group: list[RunDirectory]) -> list[str] | None:
    """Return what `differs` does for any of the runs: combinations of one recipe may have other members."""
    known = [found for run in group if (found := differs(run)) is not None]
    return list(dict.fromkeys(key for found in known for key in found)) if known else None


def pairs_against_first(runs: Sequence[RunDirectory], which: str = "last") -> list[dict[str, Any]]:
    """Return McNemar's test of each further run against the first one, on the logits of ``which`` epoch.

    Raises:
        UserError: two runs were not evaluated on the same images.
    """
    first, names = runs[0], marked_names(runs)
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
