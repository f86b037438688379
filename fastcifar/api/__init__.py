"""The Python API: recipes and runs, without the command line.

`fastcifar.load_recipe` and `fastcifar.train` do what ``fastcifar show`` and ``fastcifar run`` do.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcifar.config import CombineRecipe, Recipe
from fastcifar.config import load_recipe as read_recipe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory

if TYPE_CHECKING:
    from fastcifar.track import Callback

__all__ = ["load_recipe", "train"]


def load_recipe(name: str | Path, set: Iterable[str] | dict[str, Any] = ()) -> Recipe | CombineRecipe:
    """Read and check a recipe.

    Example:
        >>> recipe = fastcifar.load_recipe("wrn-asam", set={"train.epochs": 2, "asam.rho": 0.5})

    Args:
        name: a file, or the name of a shipped recipe.
        set: keys to override: a dict of key path to value, or texts such as ``"train.epochs=2"``.

    Raises:
        UserError: with the file, the key, what is wrong and what is allowed.
    """
    if isinstance(set, str):
        raise UserError(f'set: "{set}" is a text; give a list of them, or a dict such as {{"train.epochs": 2}}')
    if not isinstance(name, str | Path):
        raise UserError(f"load_recipe: {name!r}: give a file, or the name of a shipped recipe such as \"lenet5\"")
    texts = [f"{key}={as_toml(value)}" for key, value in set.items()] if isinstance(set, dict) else list(set)
    return read_recipe(name, texts)


def as_toml(value: Any) -> str:
    """Return a Python value as TOML writes it on one line.

    Raises:
        UserError: TOML has no such value.
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(str(key))} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    import tomli_w

    try:
        return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    except TypeError:
        raise UserError(f"{value!r} is not a value of a recipe: a number, a text, a list or a table") from None


def train(
    recipe: "Recipe | CombineRecipe | str | Path | None" = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    stop_after: int | None = None,
    callbacks: "Sequence[Callback]" = (),
    profile: str | None = None,
    quiet: bool = False,
) -> RunDirectory:
    """Train, evaluate and record a recipe, or go on with a run, and return its directory.

    Example:
        >>> run = fastcifar.train("lenet5", data="data", out="runs/lenet5")
        >>> run.summary["last"]["accuracy"]

    Args:
        recipe: from `load_recipe`, or what it takes; None takes the recipe of the run to resume.
        data: where the images are: a store, or a CIFAR-10 release; see ``fastcifar data``.
        out: the run directory; a new one under ``runs/`` by default.
        resume: a run directory to go on with, or ``"auto"`` for the recipe's newest one.
        stop_after: end after this many of the planned epochs, 1 or more; the run can be resumed. An epoch that was
            interrupted is finished, also one after these.
        callbacks: told of the run's begin, of each epoch, and of the end; see `fastcifar.Callback`.
        profile: ``"10:20"`` traces these steps with torch.profiler into the run's ``profile/``.
        quiet: show no progress.

    Returns:
        The run; ``run.summary``, ``run.metrics_arrays()`` and ``run.logits(key)`` are its results.

    Raises:
        UserError: bad input of any kind.
        KeyboardInterrupt: Ctrl-C, after the step at hand and a checkpoint: ``resume`` goes on from there.
    """
    from fastcifar.interrupt import Interrupted, handled
    from fastcifar.open_run import open_run

    if recipe is None and resume in (None, "auto"):
        raise UserError('train: which recipe? Give recipe="lenet5", or resume=RUN_DIR to go on with a run')
    if stop_after is not None and stop_after < 1:
        raise UserError(f"stop_after: {stop_after} is below 1")
    if profile is not None:
        from fastcifar.train.profile import read_steps

        read_steps(profile)
    loaded = load_recipe(recipe) if isinstance(recipe, str | Path) else recipe
    place = None if data is None else Path(data)
    folder, resumed = None if out is None else Path(out), None if resume is None else str(resume)
    if isinstance(loaded, Recipe):
        _check(loaded, place)
    elif loaded is not None:
        _check_members(loaded, folder, resumed)
    with open_run(loaded, folder, resumed) as run:
        try:
            with handled(f'stopped; fastcifar.train(resume="{run.folder}") goes on'):
                _execute(run, place, stop_after, callbacks, profile, quiet)
        except Interrupted as error:
            raise KeyboardInterrupt(str(error)) from None
    return run


def _check(recipe: Recipe, data: Path | None) -> None:
    """Refuse what is known to be impossible before a run directory is made."""
    from fastcifar.device import pick_device, with_precision
    from fastcifar.models.memory import refuse_what_cannot_fit
    from fastcifar.train.checks import check_before

    device, store = pick_device(recipe.engine), check_before(recipe, data)
    facts = {"num_classes": len(store.classes), "image_px": store.image_shape[0]}
    refuse_what_cannot_fit(with_precision(recipe, device), device, **facts)


def _check_members(recipe: CombineRecipe, out: Path | None, resume: str | None) -> None:
    from fastcifar.analysis.combine import refuse_missing_members

    refuse_missing_members(recipe, out, resume)


def _execute(
    run: RunDirectory, data: Path | None, stop_after: int | None, callbacks: "Sequence[Callback]", profile: str | None,
    quiet: bool,
) -> None:
    if run.finished:
        return
    if isinstance(run.recipe, CombineRecipe):
        from fastcifar.analysis.combine import combine_run

        combine_run(run, quiet=quiet)
        return
    from fastcifar.train.run import train as train_run

    train_run(run.recipe, run, data=data, stop_after=stop_after, quiet=quiet, callbacks=callbacks, profile=profile)
