"""Which directory a run lives in: a new one, the one to resume, or the newest unfinished one of the same recipe."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastcifar.errors import UserError

if TYPE_CHECKING:
    from fastcifar.config import CombineRecipe, Recipe
    from fastcifar.run_directory import RunDirectory


def open_run(recipe: "Recipe | CombineRecipe | None", out: Path | None, resume: str | None) -> "RunDirectory":
    """Return the run directory to train in.

    Args:
        recipe: what to train; None takes the recipe of the run to resume.
        out: the directory; None makes ``runs/<name>-seed<seed>-<date>-<time>``.
        resume: a run directory, or ``auto`` for the newest unfinished run of this recipe (a new one where none is).

    Raises:
        UserError: nothing to resume there, another recipe lies there, or ``out`` holds a run already.
    """
    from fastcifar.environment import describe
    from fastcifar.run_directory import RunDirectory

    automatic = resume == "auto" or (resume is None and recipe is not None and _resumes_by_itself(recipe))
    if resume and resume != "auto":
        return _resumed(RunDirectory.open(resume), recipe)
    if recipe is None:
        raise UserError("which recipe? `fastcifar run RECIPE`, or `fastcifar run --resume RUN_DIR` to go on with a run")
    if automatic:
        found = _newest_unfinished(recipe, out)
        if found is not None:
            return found
    folder = out or _new_folder(recipe)
    if (folder / "recipe.toml").exists():
        raise UserError(f"{folder}: holds a run already; go on with it by --resume {folder}, or choose another --out")
    return RunDirectory.create(folder, recipe, describe())


def _resumes_by_itself(recipe: "Recipe | CombineRecipe") -> bool:
    return getattr(getattr(recipe, "checkpoint", None), "resume", "never") == "auto"


def _resumed(run: "RunDirectory", recipe: "Recipe | CombineRecipe | None") -> "RunDirectory":
    """Return the run if it is of that recipe (or none is named)."""
    if recipe is not None and recipe != run.recipe:
        raise UserError(
            f"{run.folder}: is a run of another recipe or other settings; a resumed run keeps its own: "
            f"leave the recipe and --set away (`fastcifar run --resume {run.folder}`), or start a new run"
        )
    return run


def _newest_unfinished(recipe: "Recipe | CombineRecipe", out: Path | None) -> "RunDirectory | None":
    """Return the run in ``out``, or the newest unfinished run of exactly this recipe under ``runs/``, or None."""
    from fastcifar.run_directory import RunDirectory

    if out is not None:
        return _resumed(RunDirectory.open(out), recipe) if (out / "recipe.toml").exists() else None
    folders = Path("runs").glob("*/recipe.toml")
    for folder in sorted((f.parent for f in folders), key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            run = RunDirectory.open(folder)
            if run.recipe == recipe and not (run.has_summary and run.summary["status"] == "finished"):
                return run
        except UserError:  # a damaged or foreign directory is no candidate
            continue
    return None


def _new_folder(recipe: "Recipe | CombineRecipe") -> Path:
    """Return a directory under ``runs/`` that does not exist yet."""
    seed = f"-seed{recipe.seed}" if hasattr(recipe, "seed") else ""
    stem = f"{recipe.name}{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(Path("runs") / name for name in names if not (Path("runs") / name).exists())
