"""``fastcifar run``: train a recipe."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastcifar.cli.options import (
    Data,
    Devices,
    Json,
    OptionalRecipeName,
    Out,
    Profile,
    Resume,
    Seeds,
    Settings,
    StopAfter,
)
from fastcifar.errors import UserError

if TYPE_CHECKING:
    from fastcifar.launch import Place


def run(
    recipe: OptionalRecipeName = None,
    set_: Settings = None,
    data: Data = None,
    out: Out = None,
    resume: Resume = None,
    stop_after: StopAfter = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every byte of the data first.")] = False,
    json_: Json = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    check_nan: Annotated[bool, typer.Option("--check-nan", help="Name the first non-finite layer; slow.")] = False,
    devices: Devices = 1,
    seeds: Seeds = None,
    profile: Profile = None,
) -> None:
    """Train, evaluate and record a recipe: `fastcifar run recipes/lenet5.toml`.

    An interrupted run (Ctrl-C) loses nothing, a killed one the epoch it was in: `fastcifar run --resume RUN_DIR` goes
    on, to the same bits.

    Every number of devices makes the same batches: `--devices 8`, or `torchrun --nproc-per-node 8 -m fastcifar run
    RECIPE`, on several machines with torchrun's own options. A run may go on with another number.

    `--seeds 8` trains eight runs that differ by their seeds, each as it would be alone and in a directory of its own.
    """
    from fastcifar.config import load_recipe
    from fastcifar.launch import launch, one_voice, place

    if profile is not None:
        from fastcifar.train.profile import read_steps

        read_steps(profile)
    here = place()
    if seeds is not None:
        from fastcifar.cli.run_seeds import refuse_options, run_seeds, tell_of_all

        refuse_options(seeds, recipe, {
            "--devices": devices > 1, "torchrun": here.world > 1, "--resume RUN_DIR": resume not in (None, "auto"),
            "--check-nan": check_nan, "--profile": profile is not None,
        })  # fmt: skip
        first = load_recipe(str(recipe), set_ or [])
        tell_of_all(run_seeds(first, seeds, data, out, resume, verify, stop_after, quiet), json_, quiet)
        return
    if devices > 1 and here.world == 1:
        refuse_devices(recipe, set_ or [], devices)
        launch(devices, without_devices(sys.argv[1:]))
        return
    with one_voice(here) as store:
        if here.rank:
            follow(here, store, data, stop_after, check_nan)
            return
        summary, folder = lead(
            load_recipe(recipe, set_ or []) if recipe else None, set_, here, store,
            data=data, out=out, resume=resume, verify=verify, stop_after=stop_after, quiet=quiet, check_nan=check_nan,
            profile=profile,
        )
    tell(summary, folder, json_, quiet, data)


def lead(
    loaded: Any, set_: list[str] | None, here: "Place", store: Any, *, data: Path | None, out: Path | None,
    resume: str | None, verify: bool, stop_after: int | None, quiet: bool, check_nan: bool, profile: str | None,
) -> tuple[dict[str, Any], Path]:
    """Open the run directory and train, as the only process or as rank 0; return summary and folder."""
    from fastcifar.interrupt import handled
    from fastcifar.launch import say_how_to_go_on
    from fastcifar.open_run import open_run

    if resume and resume != "auto" and set_ and loaded is None:
        raise UserError("--set changes the recipe, but a resumed run keeps its own; start a new run instead")
    if here.restarts and not resume:
        resume = "auto"  # torchrun has started the ranks again after a failure: go on with the run that it began
    if loaded is not None:
        refuse_early(loaded, data, verify, here.world)
        refuse_missing_members(loaded, out, resume)
    with open_run(loaded, out, resume) as found, handled(f"stopped; {go_on(found.folder, data)}"):
        say_how_to_go_on(go_on(found.folder, data))
        if loaded is None and verify:
            refuse_early(found.recipe, data, verify, here.world)
        return execute(found, data, stop_after, quiet, check_nan, here, store, profile), found.folder


def go_on(folder: Path, data: Path | None) -> str:
    """Return how to go on with a run."""
    from fastcifar.text import resume_command

    return f"go on with `{resume_command(folder, data)}`"


def follow(here: "Place", store: Any, data: Path | None, stop_after: int | None, check_nan: bool) -> None:
    """Train as one of the ranks after the first, which says what."""
    from fastcifar.interrupt import handled
    from fastcifar.train.follower import Follower
    from fastcifar.train.ranks import join, leave
    from fastcifar.train.run import train

    with handled("stopped"):
        ranks = join(here, store)
        recipe = ranks.from_first(None)
        if recipe is not None:
            train(recipe, Follower(), data=data, stop_after=stop_after, check_nan=check_nan, ranks=ranks)
        leave()


def tell(summary: dict[str, Any], folder: Path, json_: bool, quiet: bool, data: Path | None = None) -> None:
    """Print a run's summary, for programs or for people."""
    from fastcifar.analysis.published import differs
    from fastcifar.console import answer, say
    from fastcifar.console import out as print_json
    from fastcifar.run_directory import RunDirectory
    from fastcifar.text import stopped_at

    keys = differs(RunDirectory.open(folder))
    if json_:
        print_json({**summary, "recipe_differs": keys, "run": str(folder)})
    elif not quiet:
        answer(describe(summary, keys))
        answer((str(folder), "bold"))
    if (stopped := stopped_at(summary)) and not quiet:
        say(f"{stopped}; {go_on(folder, data)}")


def refuse_devices(recipe: str | None, set_: list[str], devices: int) -> None:
    """Refuse what one process can tell before it starts others."""
    from fastcifar.config import CombineRecipe, load_recipe

    if recipe and isinstance(load_recipe(recipe, set_), CombineRecipe):
        raise UserError(f"{recipe}: is a combination, which trains nothing; leave --devices away")
    import torch

    gpus = torch.cuda.device_count()
    if gpus and devices > gpus:
        raise UserError(f"--devices {devices}: this machine has {gpus} GPUs")


def without_devices(words: list[str]) -> list[str]:
    """Return a command's arguments without ``--devices N``."""
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--devices":
            words.pop(0)
        elif not word.startswith("--devices="):
            kept.append(word)
    return kept


def refuse_early(recipe: Any, data: Path | None, verify: bool = False, devices: int = 1) -> None:
    """Refuse what is known to be impossible on so many devices before a run directory is made."""
    from fastcifar.config import Recipe

    if isinstance(recipe, Recipe):
        from fastcifar.device import pick_device, with_precision
        from fastcifar.models.memory import refuse_what_cannot_fit
        from fastcifar.train.checks import check_before

        device, store = pick_device(recipe.engine), check_before(recipe, data, verify)
        facts = {"num_classes": len(store.classes), "image_px": store.image_shape[0]}
        refuse_what_cannot_fit(with_precision(recipe, device), device, devices=devices, **facts)


def refuse_missing_members(recipe: Any, out: Path | None, resume: str | None) -> None:
    """Refuse a combination that lacks members before its run directory is made."""
    from fastcifar.config import CombineRecipe

    if isinstance(recipe, CombineRecipe):
        from fastcifar.analysis import combine

        combine.refuse_missing_members(recipe, out, resume)


def execute(
    run: Any, data: Path | None, stop_after: int | None, quiet: bool, check_nan: bool = False,
    here: "Place | None" = None, store: Any = None, profile: str | None = None,
) -> dict[str, Any]:
    """Train or combine what is left of a run; return its summary, at once where it is finished already."""
    from fastcifar.config import CombineRecipe

    several = here is not None and here.world > 1
    if isinstance(run.recipe, CombineRecipe) and not run.finished:
        if several:
            raise UserError(f"{run.folder}: is a combination, which trains nothing; start it as one process")
        from fastcifar.analysis.combine import combine_run

        return combine_run(run, quiet=quiet)
    if run.finished and not several:
        return dict(run.summary)
    if not quiet:
        from fastcifar.console import err

        # Seconds pass before the first line of the run; a cold machine needs most of them for torch.
        err.print("importing torch", style="dim")
    from fastcifar.launch import Place
    from fastcifar.train.ranks import join, leave
    from fastcifar.train.run import train

    ranks = join(here or Place(), store)
    recipe = ranks.from_first(None if run.finished else run.recipe)
    if recipe is None:
        return dict(run.summary)
    summary = train(
        recipe, run, data=data, stop_after=stop_after, quiet=quiet, check_nan=check_nan, ranks=ranks, profile=profile
    )
    leave()
    return summary


def describe(summary: dict[str, Any], differs: list[str] | None = None) -> str:
    """Return a summary in a few lines for people, each metric with how its epoch was chosen.

    Args:
        summary: of the run.
        differs: the keys in which its recipe is not the one whose accuracies were published.
    """
    from fastcifar.config.shipped import in_words

    lines = []
    last, best, selected, published = (summary.get(k) for k in ("last", "best", "selected", "published"))
    trained = bool(summary["epochs"])  # a combination has no epochs of its own
    if last:
        of = f"  epoch {last['epoch']} of {summary['epochs']}, {summary['weights']} weights" if trained else ""
        lines.append(f"last      {last['accuracy']:.2f}%{of}")
    if best:
        of = f"epoch {best['epoch']}, chosen" if trained else "chosen"
        lines.append(f"best      {best['accuracy']:.2f}%  {of} on the test set, as published")
    if selected:
        of = f"epoch {selected['epoch']}, chosen" if trained else "chosen"
        lines.append(f"selected  {selected['accuracy']:.2f}%  {of} on the holdout")
    if summary.get("tta"):
        lines.append(f"tta       {summary['tta']['accuracy']:.2f}%  last epoch, {summary['tta']['kind']}")
    if published:
        known = f", last {published['last']:.2f}%" if published.get("last") is not None else ""
        lines.append(f"published {published['best']:.2f}% best{known}{in_words(differs)}")
    if summary.get("clocks"):
        from fastcifar.text import duration

        clocks = summary["clocks"]
        speed = f"{summary['images_per_s']:,.0f} images/s" if summary.get("images_per_s") else "speed not measured"
        lines.append(
            f"clocks    training {duration(clocks['training_s'])}, compilation and warm-up "
            f"{duration(clocks['compilation_s'])}, total {duration(clocks['total_s'])}; {speed}"
        )
    return "\n".join(lines)
