"""The training engine for small images: a recipe in; a trained, evaluated and explained model out.

What is public here is imported when it is first used, so that ``import fastcifar`` costs nothing. See
``docs/python-api.md``.
"""

from importlib import import_module

# typing's own constant, which type checkers know by its name. Nothing is imported before the signal handlers are there
# (`fastcifar.__main__`) that takes time, and typing does.
TYPE_CHECKING = False
__version__ = "0.1.0"  # the only place that says it: the build reads it from here

if TYPE_CHECKING:
    from fastcifar import augment, optim
    from fastcifar.api import load_recipe, train
    from fastcifar.api.loader import Loader
    from fastcifar.config import Recipe
    from fastcifar.errors import UserError
    from fastcifar.run_directory import RunDirectory
    from fastcifar.track import Callback

__all__ = [
    "Callback",
    "Loader",
    "Recipe",
    "RunDirectory",
    "UserError",
    "__version__",
    "augment",
    "load_recipe",
    "optim",
    "train",
]

_HOMES = {
    "Callback": "fastcifar.track",
    "Loader": "fastcifar.api.loader",
    "Recipe": "fastcifar.config",
    "RunDirectory": "fastcifar.run_directory",
    "UserError": "fastcifar.errors",
    "load_recipe": "fastcifar.api",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name in ("augment", "optim", "train"):
        return import_module(f"fastcifar.{name}")  # the package `train` can be called: see there
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcifar' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
