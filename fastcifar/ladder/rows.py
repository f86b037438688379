"""What the ladder consists of, and in which order its rows are run: members before combinations, cheapest first."""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from fastcifar.config import CombineRecipe, Recipe, load_recipe, shipped_by_name
from fastcifar.config.load import find_bases
from fastcifar.errors import UserError, nearest

SMOKE = "smoke"


@cache
def catalogue() -> dict[str, Recipe | CombineRecipe]:
    """Return the shipped recipes by name (``lenet5``, ``smoke/lenet5``), the ladder first and in order."""
    files = shipped_by_name()
    recipes = {name: load_recipe(path) for name, path in files.items()}

    def rung(name: str) -> tuple[str, str, int, str]:
        return name.rpartition("/")[0], recipes[name].stage, _depth(files[name]), name

    return {name: recipes[name] for name in sorted(files, key=rung)}


@cache
def _depth(path: Path) -> int:
    """Return the length of the longest chain of ``extends`` below a shipped file."""
    bases = tomllib.loads(path.read_text(encoding="utf-8")).get("extends", [])
    return 1 + max((_depth(base.resolve()) for base in find_bases(path, bases)), default=-1)


def ladder_rows() -> list[str]:
    """Return the names of the ladder's own rows: the recipes at the top level, the smoke test left out."""
    return [name for name in catalogue() if "/" not in name and name != SMOKE]


def choose(only: Sequence[str]) -> list[str]:
    """Return the shipped recipes that any of the patterns matches.

    A pattern without a slash speaks of the top level: ``*`` is the ladder, ``smoke/*`` are the smoke configs.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = list(catalogue())
    for pattern in only:
        if not any(_matches(name, pattern) for name in names):
            raise UserError(f'no recipe matches "{pattern}"{nearest(pattern, names)}; `fastcifar recipes` lists them')
    return [name for name in names if any(_matches(name, pattern) for pattern in only)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


@dataclass(frozen=True)
class Job:
    """One row with one seed.

    Attributes:
        row: the recipe's name among the shipped ones.
        seed: of this run.
        recipe: resolved, with that seed.
        folder: its run directory.
        members: for a combination, the members' run directories by recipe name.
        cost: multiply-accumulates of its forward passes; 0 for a combination.
    """

    row: str
    seed: int
    recipe: Recipe | CombineRecipe
    folder: Path
    members: dict[str, Path]
    cost: int


def jobs_for(rows: Sequence[str], seeds: int, out: Path) -> list[Job]:
    """Return the jobs of these rows and of the rows that they combine, in the order to run them.

    Args:
        rows: names as `catalogue` gives them.
        seeds: how many seeds, counted up from each recipe's own.
        out: the folder of all run directories.
    """
    wanted = with_members(rows)
    jobs = [_job(row, i, out) for row in wanted for i in range(seeds)]
    costs = {job.folder: job.cost for job in jobs}

    def order(job: Job) -> tuple[int, bool, int, int]:
        most = max([job.cost, *(costs[member] for member in job.members.values())])
        return most, bool(job.members), wanted.index(job.row), job.seed

    return sorted(jobs, key=order)


def found_in(out: Path) -> list[Job]:
    """Return the jobs, of any row and seed, whose run directories lie in a ladder's folder already."""
    jobs = []
    for row, recipe in catalogue().items():
        seeds = sorted(
            int(p.parent.name[5:]) for p in (out / row).glob("seed-*/recipe.toml") if p.parent.name[5:].isdigit()
        )
        first = _first_seed(recipe)
        jobs += [_job(row, seed - first, out) for seed in seeds]
    return jobs


def with_members(rows: Iterable[str]) -> list[str]:
    """Return the rows with the members of their combinations added, in the ladder's order."""
    wanted = set(rows)
    for row in list(wanted):
        recipe = catalogue()[row]
        if isinstance(recipe, CombineRecipe):
            wanted |= {_file_of(member) for member in recipe.combine.members}
    return [name for name in catalogue() if name in wanted]


def _file_of(name: str) -> str:
    """Return the shipped file's name for a recipe's own name (``smoke-lenet5`` lies in ``smoke/lenet5``)."""
    return next(file for file, recipe in catalogue().items() if recipe.name == name)


def _job(row: str, number: int, out: Path) -> Job:
    recipe = catalogue()[row]
    if isinstance(recipe, CombineRecipe):
        files = {member: _file_of(member) for member in recipe.combine.members}
        seed = _first_seed(recipe) + number
        members = {member: run_folder(out, file, seed) for member, file in files.items()}
        return Job(row, seed, recipe, run_folder(out, row, seed), members, 0)
    seeded = recipe.model_copy(update={"seed": recipe.seed + number})
    return Job(row, seeded.seed, seeded, run_folder(out, row, seeded.seed), {}, cost(recipe))


def _first_seed(recipe: Recipe | CombineRecipe) -> int:
    """Return the seed of a recipe, or the lowest of a combination's members."""
    if isinstance(recipe, Recipe):
        return recipe.seed
    return min(_first_seed(catalogue()[_file_of(member)]) for member in recipe.combine.members)


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Return the run directory of a row with a seed."""
    return out / row / f"seed-{seed}"


def cost(recipe: Recipe) -> int:
    """Return a run's work: multiply-accumulates of all its forward passes. It puts rows in order, nothing else."""
    from fastcifar.models.budget import images_to_train
    from fastcifar.models.cost import forward_macs

    # What goes backward is in proportion.
    return round(forward_macs(recipe.model) * recipe.passes_per_step * images_to_train(recipe) * recipe.train.epochs)
