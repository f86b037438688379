"""Where the files that ship with fastcifar are, and what a reader there can type to install what is missing.

In a clone, recipes, records and benchmarks are top-level folders; a wheel holds the same folders inside the package
(see pyproject.toml). Everything that needs one of them asks here.
"""

import sys
from importlib import resources
from importlib.machinery import PathFinder
from pathlib import Path

NOT_LOCKED = ("wandb", "mlflow", "trackio")
"""Extras that the set-up of a clone leaves out, because they are large."""


def package() -> Path:
    """Return the folder of the package itself.

    numba and Triton read kernels as source files, so fastcifar never runs out of a zip file and this is a real folder.
    """
    return Path(str(resources.files("fastcifar"))).resolve()


def clone() -> Path | None:
    """Return the root of the clone that this package is imported from; None for an installed wheel.

    What tells them apart is the set-up script, not ``.git``: a clone may be carried without its history, and a wheel
    may be installed into a folder that happens to be some other repository.
    """
    root = package().parent
    return root if (root / "tools" / "setup.sh").is_file() and (root / "recipes").is_dir() else None


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes."""
    return (clone() or package()) / "recipes"


def benchmarks_folder() -> Path:
    """Return the folder of the benchmarks, with the shipped results in its ``results/``."""
    return (clone() or package()) / "benchmarks"


def records_folder() -> Path:
    """Return the folder of the records; in a wheel it holds each ``record.json`` without logs and recipes."""
    return (clone() or package()) / "records"


def new_results_folder() -> Path:
    """Return where benchmarks put results: the clone's own, else ``benchmarks/results`` in the working directory.

    An installed package is not written to: it may be read-only, and an upgrade would lose what was measured.
    """
    root = clone() or Path()
    return root / "benchmarks" / "results"


def results_folders() -> list[Path]:
    """Return the folders of benchmark results, the shipped ones first; in a clone they are one and the same."""
    return list(dict.fromkeys([benchmarks_folder() / "results", new_results_folder()]))


def install_command(extra: str = "") -> str:
    """Return the shell command that installs fastcifar's dependencies, or those of one extra, where the reader is.

    Args:
        extra: a name of ``project.optional-dependencies`` such as ``ffcv``.
    """
    if clone() and extra in NOT_LOCKED:
        return f"uv pip install --python {sys.executable} --editable '{clone()}[{extra}]'"
    if clone():  # the set-up installs all other extras; its stamp says that it is done, so the stamp goes first
        return "rm -f .venv/.ready-* && make environment"
    wanted = f"'fastcifar[{extra}]'" if extra else "fastcifar"  # quoted, because brackets are a pattern to most shells
    # Environments that uv makes have no pip. Only the path is asked: setuptools hooks into the full search and warns.
    if PathFinder.find_spec("pip") is None:
        return f"uv pip install --python {sys.executable} {wanted}"
    return f"{sys.executable} -m pip install {wanted}"
