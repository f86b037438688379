"""``fastcifar run``: train a recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a shipped one (`fastcifar recipes`).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as train.epochs=2. Repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data: a store, or a CIFAR-10 release.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory. Default: a new one under runs/.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="A run directory to go on with, or `auto` for this recipe's newest one.")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many of the planned epochs; resume later.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every byte of the data first.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option(help="Show no progress.")] = False,
    check_nan: Annotated[
        bool, typer.Option("--check-nan", help="Train slowly and name the first layer that is not finite.")
    ] = False,
) -> None:
    """Train, evaluate and record a recipe: `fastcifar run recipes/lenet5.toml`.

    An interrupted run (Ctrl-C) loses nothing, a killed one the epoch it was in: `fastcifar run --resume RUN_DIR` goes
    on, to the same bits.
    """
    from fastcifar.config import load_recipe
    from fastcifar.console import err, say
    from fastcifar.console import out as print_json
    from fastcifar.interrupt import handled
    from fastcifar.open_run import open_run

    loaded = load_recipe(recipe, set_ or []) if recipe else None
    if resume and resume != "auto" and set_ and not recipe:
        from fastcifar.errors import UserError

        raise UserError("--set changes the recipe, but a resumed run keeps its own; start a new run instead")
    if loaded is not None:
        refuse_early(loaded, data, verify)
    with (
        open_run(loaded, out, resume) as found,
        handled(f"stopped; go on with `fastcifar run --resume {found.folder}`"),
    ):
        if loaded is None and verify:
            refuse_early(found.recipe, data, verify)
        summary = execute(found, data, stop_after, quiet, check_nan)
    if json_:
        print_json({**summary, "run": str(found.folder)})
    elif not quiet:
        err.print(describe(summary), soft_wrap=True)
        say((str(found.folder), "bold"))


def refuse_early(recipe: Any, data: Path | None, verify: bool = False) -> None:
    """Refuse what is known to be impossible before a run directory is made."""
    from fastcifar.config import Recipe

    if isinstance(recipe, Recipe):
        from fastcifar.models.memory import refuse_what_cannot_fit
        from fastcifar.train.checks import check_before
        from fastcifar.train.run import pick_device

        refuse_what_cannot_fit(recipe, pick_device(recipe.engine))
        check_before(recipe, data, verify)


def execute(
    run: Any, data: Path | None, stop_after: int | None, quiet: bool, check_nan: bool = False
) -> dict[str, Any]:
    """Train or combine what is left of a run; return its summary, at once where it is finished already."""
    from fastcifar.config import CombineRecipe

    if run.finished:
        return run.summary
    if isinstance(run.recipe, CombineRecipe):
        from fastcifar.analysis.combine import combine_run

        return combine_run(run)
    if not quiet:
        from fastcifar.console import err

        # Seconds pass before the first line of the run; a cold machine needs most of them for torch.
        err.print("importing torch", style="dim")
    from fastcifar.train.run import train

    return train(run.recipe, run, data=data, stop_after=stop_after, quiet=quiet, check_nan=check_nan)


def describe(summary: dict[str, Any]) -> str:
    """Return a summary in a few lines for people, each metric with how its epoch was chosen."""
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
        lines.append(f"published {published['best']:.2f}% best{known}")
    if summary.get("clocks"):
        from fastcifar.text import duration

        clocks = summary["clocks"]
        speed = f"{summary['images_per_s']:,.0f} images/s" if summary.get("images_per_s") else "speed not measured"
        lines.append(
            f"clocks    training {duration(clocks['training_s'])}, compilation and warm-up "
            f"{duration(clocks['compilation_s'])}, total {duration(clocks['total_s'])}; {speed}"
        )
    return "\n".join(lines)
