"""How a recipe differs from the shipped one that it was made of: published accuracies are of the shipped one."""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from fastcifar.config.load import load_recipe, shipped_by_name
from fastcifar.config.schema import CombineRecipe, Recipe

# What may differ without making a run one of other settings: texts, the seed, and how a run is executed and recorded.
EXECUTION = {"name", "title", "stage", "published", "target", "seed", "engine", "eval", "checkpoint", "track"}
# The loader decides how images arrive, not which.
LOADER = "data.loader"


def differences(one: Recipe | CombineRecipe, other: Recipe | CombineRecipe) -> list[str]:
    """Return the key paths in which two recipes differ in what is trained, two levels deep.

    Of tables with another ``name`` (another model, another optimizer) that key alone is told.
    """
    a, b = one.model_dump(exclude=EXECUTION), other.model_dump(exclude=EXECUTION)
    found = []
    for key in {**a, **b}:
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            found += [f"{key}.{inner}" for inner in _different(x, y)]
        elif x != y:
            found.append(key)
    return [key for key in found if key != LOADER]


def _different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the keys in which two tables differ."""
    if one.get("name") != other.get("name"):
        return ["name"]
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def recipe_differs(recipe: Recipe | CombineRecipe, ignoring: Collection[str] = ()) -> list[str] | None:
    """Return the keys in which a recipe differs from the shipped one of its name in what is trained.

    A recipe under another name is held against the shipped one with the same published accuracies.

    Args:
        recipe: a run's own.
        ignoring: further keys that may differ.

    Returns:
        Key paths such as ``train.epochs``, none where nothing differs; None where there is no such shipped recipe.
    """
    found = [differences(recipe, shipped) for shipped in _shipped_of(recipe)]
    return [key for key in min(found, key=len) if key not in ignoring] if found else None


def _shipped_of(recipe: Recipe | CombineRecipe) -> list[Recipe | CombineRecipe]:
    """Return the shipped recipe of the same name, else those with the same published accuracies."""
    files = shipped_by_name()
    # Names hold no slash: that of smoke/lenet5 is smoke-lenet5.
    near = [path for name, path in files.items() if recipe.name in (name.rpartition("/")[2], name.replace("/", "-"))]
    if named := [found for path in near if (found := _loaded(path)).name == recipe.name]:
        return named
    if recipe.published is None:
        return []
    return [found for path in files.values() if (found := _loaded(path)).published == recipe.published]


@cache
def _loaded(path: Path) -> Recipe | CombineRecipe:
    return load_recipe(path)


def in_words(keys: list[str] | None) -> str:
    """Return what to add to published accuracies: nothing, or `` (this recipe differs: train.epochs, data.subset)``."""
    return f" (this recipe differs: {', '.join(keys)})" if keys else ""
