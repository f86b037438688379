"""``fastcifar run RECIPE --seeds N``: several seeds of a recipe side by side in one process."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fastcifar.errors import UserError

if TYPE_CHECKING:
    from fastcifar.config import CombineRecipe, Recipe
    from fastcifar.run_directory import RunDirectory

ONE_RUN_TRACKERS = ("wandb", "trackio")
"""They know one run of a process at a time."""
GO_ON = "the same command with `--resume auto` goes on with every seed"


def run_seeds(
    recipe: "Recipe | CombineRecipe", seeds: int, data: Path | None, out: Path | None, resume: str | None,
    verify: bool, stop_after: int | None, quiet: bool,
) -> "list[RunDirectory]":
    """Open a run directory for each seed and train all of them.

    Args:
        recipe: its seed is the first one; the others count up from there.
        seeds: how many.
        data: where the images are, before every other place.
        out: the folder of the run directories, ``seed-N``; None makes each under ``runs/``.
        resume: ``auto`` goes on with each seed's own run, the newest one under ``runs/`` where ``out`` is None, and
            leaves it as it is where it has finished; None begins all.
        verify: hash every byte of the data first.
        stop_after: end after this many of the planned epochs.
        quiet: show no progress.

    Returns:
        The run directories, each with its summary.

    Raises:
        UserError: the recipe cannot be trained so, or a seed has failed, while the others are trained.
    """
    from fastcifar.cli.run_command import refuse_early
    from fastcifar.interrupt import handled

    first = checked(recipe)
    refuse_early(first, data, verify)
    wanted = [first.model_copy(update={"seed": seed}) for seed in range(first.seed, first.seed + seeds)]
    with ExitStack() as stack:
        runs = open_all(wanted, out, resume, stack)
        stack.enter_context(handled(f"stopped; {GO_ON}"))
        train_unfinished(runs, data, stop_after, quiet)
    return runs


def open_all(
    recipes: "Sequence[Recipe]", out: Path | None, resume: str | None, stack: ExitStack
) -> "list[RunDirectory]":
    """Return the run directory of each recipe, the one to go on with or a new one, with its lock in the stack.

    Folders that are there come first: if one of them is refused, no run is made for the others.

    Raises:
        UserError: as `fastcifar.open_run.open_run` does.
    """
    from fastcifar.open_run import newest_run, open_run

    places: list[tuple[int, Recipe, Path | None]] = []
    for number, recipe in enumerate(recipes):
        folder = None if out is None else out / f"seed-{recipe.seed}"
        if folder is None and (resume == "auto" or recipe.checkpoint.resume == "auto"):
            # A finished one too: it is this seed's, and the others go on beside it.
            found = newest_run(recipe, finished_too=True)
            folder = found.folder if found else None
        places.append((number, recipe, folder))
    places.sort(key=lambda place: place[2] is None or not place[2].exists())
    runs = {number: stack.enter_context(open_run(recipe, folder, resume)) for number, recipe, folder in places}
    return [runs[number] for number in range(len(recipes))]


def train_unfinished(runs: "Sequence[RunDirectory]", data: Path | None, stop_after: int | None, quiet: bool) -> None:
    """Train those of the runs that have not come to their end.

    Raises:
        UserError: one of them has failed.
    """
    unfinished = [run for run in runs if not run.finished]
    if not unfinished:
        return
    if not quiet:
        from fastcifar.console import err

        err.print("importing torch", style="dim")
    from fastcifar.train.together import train_together

    lanes = train_together(unfinished, data=data, stop_after=stop_after, quiet=quiet)
    if failed := [f"seed {lane.seed} ({lane.run.folder})" for lane in lanes if lane.error]:
        raise UserError(f"{len(failed)} of {len(runs)} seeds failed, for the reasons above: {', '.join(failed)}")


def refuse_options(seeds: int, recipe: str | None, given: dict[str, bool]) -> None:
    """Refuse options of a single run beside ``--seeds``.

    Args:
        seeds: the number of seeds.
        recipe: as it was given, or None.
        given: whether an option was given, by its name.

    Raises:
        UserError: one was, or there is no recipe.
    """
    if found := [name for name, there in given.items() if there]:
        raise UserError(f"--seeds {seeds} begins several runs in this process; leave it or {found[0]} away")
    if recipe is None:
        raise UserError("which recipe? `fastcifar run RECIPE --seeds N`")


def checked(recipe: "Recipe | CombineRecipe") -> "Recipe":
    """Return a recipe whose runs can share a process.

    Raises:
        UserError: with what to change.
    """
    from fastcifar.config import Recipe

    if not isinstance(recipe, Recipe):
        raise UserError(f"{recipe.name}: is a combination, which trains nothing; leave --seeds away")
    loader = "torchvision" if recipe.augment.where == "loader" else recipe.data.loader.name
    if loader not in ("auto", "resident"):
        raise UserError(
            f"--seeds: the runs share one resident set, which the {loader} loader does not have: set "
            'data.loader.name = "resident" (and augment.where = "device"), or use `fastcifar ladder --seeds`'
        )
    if found := [name for name in recipe.track if name in ONE_RUN_TRACKERS]:
        raise UserError(
            f"--seeds: {found[0]} knows one run of a process at a time: take it out of track, or use "
            "`fastcifar ladder --seeds`"
        )
    return recipe


def tell_of_all(runs: "Sequence[RunDirectory]", json_: bool, quiet: bool) -> None:
    """Print the runs' summaries, for programs; or for people, a line each and the mean."""
    from fastcifar.analysis.statistics import mean_of
    from fastcifar.console import answer, say
    from fastcifar.console import out as print_json
    from fastcifar.text import stopped_at

    if json_:
        print_json({"runs": [{**run.summary, "run": str(run.folder)} for run in runs]})
    elif not quiet:
        for run in runs:
            last, seed = run.summary["last"], run.summary["seed"]
            before = f"seed {seed}  last {last['accuracy']:.2f}%  " if last else f"seed {seed}  "
            answer(before, (str(run.folder), "bold"))
        accuracies = [run.summary["last"]["accuracy"] for run in runs if run.summary["last"]]
        answer(f"mean    last {mean_of(accuracies)}%, n = {len(accuracies)}" if accuracies else "not evaluated yet")
    if (stopped := [found for run in runs if (found := stopped_at(run.summary))]) and not quiet:
        say(f"{stopped[0]}; {GO_ON}")
