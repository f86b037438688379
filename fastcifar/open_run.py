"""Which directory a run lives in: a new one, the one to resume, or the newest unfinished one of the same recipe."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcifar.errors import UserError

if TYPE_CHECKING:
    from fastcifar.config import CombineRecipe, Recipe
    from fastcifar.run_directory import RunDirectory

OWN_NAME = re.compile(r"-\d{8}-\d{6}(-\d+)?$")
"""How the name of a folder ends that `_new_folder` made."""


@contextmanager
def open_run(
    recipe: "Recipe | CombineRecipe | None", out: Path | None, resume: str | None
) -> "Iterator[RunDirectory]":
    """Return the run directory to train in, with its lock, which the ``with`` block keeps.

    Args:
        recipe: what to train; None takes the recipe of the run to resume.
        out: the directory; None makes ``runs/<name>-seed<seed>-<date>-<time>``.
        resume: a run directory, or ``auto`` for the newest unfinished run of this recipe (a new one where none is).

    Raises:
        UserError: nothing to resume there, another recipe lies there, ``out`` holds a run already or is another folder
            than the named run's, or another process is at work there.
    """
    run = _existing(recipe, out, resume)
    if run is not None:
        with run.alone():
            yield run
        return
    assert recipe is not None
    environment = environment_of(recipe)  # takes seconds: before the folder is there
    with ExitStack() as stack:
        run = _made(recipe, out, stack)
        run.begin(recipe, environment)
        yield run


def environment_of(recipe: "Recipe | CombineRecipe") -> dict[str, Any]:
    """Return what a run of a recipe begins with, here and now: the content of its ``environment.json``."""
    from fastcifar.config.user_code import record
    from fastcifar.environment import describe

    known = {"user_code": record(recipe), "teacher": teacher_digest(recipe), "precision": _precision(recipe)}
    return describe() | {name: value for name, value in known.items() if value}


def teacher_digest(recipe: "Recipe | CombineRecipe") -> str | None:
    """Return a SHA-256 of the weights of the models that a recipe distills; None where it names none.

    Raises:
        UserError: the teacher is no finished run or combination, or has no such weights.
    """
    distill = getattr(recipe, "distill", None)
    if distill is None:
        return None
    from fastcifar.teachers import teachers_digest

    return teachers_digest(distill)


def _precision(recipe: "Recipe | CombineRecipe") -> str | None:
    """Return what this recipe's ``engine.precision = "auto"`` means here; None where it says one or trains nothing."""
    from fastcifar.config import Recipe

    if not isinstance(recipe, Recipe) or recipe.engine.precision != "auto":
        return None
    from fastcifar.device import auto_precision, pick_device

    return auto_precision(pick_device(recipe.engine))


def _existing(
    recipe: "Recipe | CombineRecipe | None", out: Path | None, resume: str | None
) -> "RunDirectory | None":
    """Return the run to go on with, or None where a new one is to be made."""
    from fastcifar.run_directory import RunDirectory

    if resume and resume != "auto":
        run = RunDirectory.open(resume)
        if out is not None and out.resolve() != run.folder.resolve():
            raise UserError(
                f"--out {out}: a resumed run stays in its folder, {run.folder}; leave --out away, or --resume to begin "
                "a new run"
            )
        return _resumed(run, recipe)
    if recipe is None:
        raise UserError("which recipe? `fastcifar run RECIPE`, or `fastcifar run --resume RUN_DIR` to go on with a run")
    if resume == "auto" or _resumes_by_itself(recipe):
        return _newest_unfinished(recipe, out)
    return None


def _resumes_by_itself(recipe: "Recipe | CombineRecipe") -> bool:
    return getattr(getattr(recipe, "checkpoint", None), "resume", "never") == "auto"


def _resumed(run: "RunDirectory", recipe: "Recipe | CombineRecipe | None") -> "RunDirectory":
    """Return the run if it is of that recipe (or none is named)."""
    if recipe is not None and recipe != run.recipe:
        raise UserError(
            f"{run.folder}: is a run of another recipe or other settings; a resumed run keeps its own: "
            f"leave the recipe and --set away (`fastcifar run --resume {run.folder}`), or start a new run"
        )
    if run.manifest() is None and not run.finished:
        raise UserError(
            f"{run.folder}: was begun by a version of fastcifar that kept no hashes, or its manifest.json is gone; "
            f"start a new run: `fastcifar run {run.folder / 'recipe.toml'}`"
        )
    return run


def _newest_unfinished(recipe: "Recipe | CombineRecipe", out: Path | None) -> "RunDirectory | None":
    """Return the run in ``out``, or the newest unfinished run of exactly this recipe under ``runs/``, or None."""
    from fastcifar.run_directory import RunDirectory

    if out is not None:
        return _resumed(RunDirectory.open(out), recipe) if RunDirectory.exists(out) else None
    return newest_run(recipe)


def newest_run(recipe: "Recipe | CombineRecipe", finished_too: bool = False) -> "RunDirectory | None":
    """Return the newest run of exactly this recipe under ``runs/`` that has not finished, or may have; else None."""
    from fastcifar.run_directory import RunDirectory

    folders = Path("runs").glob("*/recipe.toml")
    for folder in sorted((f.parent for f in folders), key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            run = RunDirectory.open(folder)
            if run.recipe == recipe and (finished_too or not run.finished):
                return _resumed(run, recipe)
        except UserError:  # a damaged or foreign directory is no candidate
            continue
    return None


def _made(recipe: "Recipe | CombineRecipe", out: Path | None, stack: ExitStack) -> "RunDirectory":
    """Make the folder of a new run and take its lock, which ``stack`` keeps.

    One that is not named by ``out`` is this process's own, whoever starts at once.
    """
    from fastcifar.run_directory import RunDirectory, refuse_disk

    folder = out or Path("runs")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if out is None:
            remove_empty_runs(folder)
        for _ in range(100):
            run = RunDirectory(out if out is not None else _new_folder(recipe))
            if _taken(run, stack, own=out is None):
                return run
    except OSError as error:
        refuse_disk(folder, error)
    raise UserError(f"{folder}: other processes keep removing what is made here; name a folder with --out")


def _taken(run: "RunDirectory", stack: ExitStack, own: bool) -> bool:
    """Take the lock of a new folder; False where another process took an ``own`` one for a left-over.

    That process saw it in the moment between its making and its lock, and is removing it.
    """
    from fastcifar.run_directory import AtWorkError

    try:
        stack.enter_context(run.alone())
    except AtWorkError:
        if not own:
            raise
        return False
    except UserError:
        if not own or run.folder.exists():
            raise
        return False
    return True


def remove_empty_runs(folder: Path) -> None:
    """Remove the folders under ``runs/`` in which a process was killed before its run had begun.

    Only a folder with the name of a run, without a recipe and with nothing in it that a run does not write before its
    recipe; and none whose lock a living process holds. What cannot be removed stays.
    """
    from fastcifar.locks import LockedError, locked
    from fastcifar.run_directory import BEFORE_RECIPE, OWNER

    known = {".lock", OWNER, *BEFORE_RECIPE}
    for found in folder.glob("*"):
        with suppress(OSError, LockedError):
            if not OWN_NAME.search(found.name) or found.is_symlink() or not found.is_dir():
                continue
            names = {path.name for path in found.iterdir()}
            if not all(name in known or re.fullmatch(r"\..+\.tmp", name) for name in names):
                continue
            if ".lock" not in names:
                found.rmdir()  # fails, as it should, where another process has put something there meanwhile
                continue
            with locked(found / ".lock"):
                _remove_unless_begun(found)


def _remove_unless_begun(folder: Path) -> None:
    """Remove a folder whose lock is held, the lock last, so that nobody begins in what is left of it."""
    names = [path for path in folder.iterdir() if path.name != ".lock"]
    if any(path.name == "recipe.toml" for path in names):
        return
    for path in names:
        path.unlink()
    (folder / ".lock").unlink()
    folder.rmdir()


def _new_folder(recipe: "Recipe | CombineRecipe") -> Path:
    """Make a folder under ``runs/`` that did not exist, and return it."""
    seed = f"-seed{recipe.seed}" if hasattr(recipe, "seed") else ""
    stem = f"{recipe.name}{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in [stem, *(f"{stem}-{i}" for i in range(2, 1000))]:
        try:
            (Path("runs") / name).mkdir()
        except FileExistsError:
            continue
        return Path("runs") / name
    raise UserError(f"runs/{stem}: a thousand runs of this name began within a second; name a folder with --out")
