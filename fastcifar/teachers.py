"""Which trained models a recipe learns from: one run, or the members of a combination with their weights."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from fastcifar.config.schema import CombineRecipe, DistillConfig
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory

MIXED = ("soft", "weighted")
"""Combinations whose prediction is a mean of their members' probabilities."""


class TeacherRun(NamedTuple):
    """A teacher.

    Attributes:
        run: the finished training run.
        which: which of its weights: ``last``, ``best`` or ``selected``.
        weight: its share of what is taught, in 0..1; those of all teachers add up to 1.
    """

    run: RunDirectory
    which: str
    weight: float


def teacher_runs(config: DistillConfig) -> list[TeacherRun]:
    """Return the teachers that a ``distill`` table names.

    Raises:
        UserError: there is no finished run, a member of the combination is gone, or the combination is no mean of
            probabilities.
    """
    run = _finished(config.teacher)
    recipe = run.recipe
    if not isinstance(recipe, CombineRecipe):
        return [TeacherRun(run, config.weights or run.default_weights(), 1.0)]
    if recipe.combine.how not in MIXED:
        raise UserError(
            f"distill.teacher: {run.folder} combines by {recipe.combine.how}, which gives no mean of its members' "
            f"probabilities to learn; name a combination with how = {' or '.join(MIXED)}"
        )
    members = [_finished(member_folder(run, member)) for member in run.summary["members"]]
    given = _weights(run, config.weights) or [1.0] * len(members)
    total = sum(given)
    return [
        TeacherRun(member, config.weights or member.default_weights(), weight / total)
        for member, weight in zip(members, given, strict=True)
        if weight
    ]


def _finished(folder: str | Path) -> RunDirectory:
    run = RunDirectory.open(folder)
    if not run.finished:
        raise UserError(f"distill.teacher: {run.folder} is not finished; `fastcifar run --resume {run.folder}` first")
    return run


def member_folder(combination: RunDirectory, member: dict[str, Any]) -> Path:
    """Return where a member is: as the combination wrote it down or, where both were moved together, near it.

    Near it means beside it or, as a ladder lays its rows out, in ``<row>/seed-<n>`` beside the combination's own row.

    Args:
        combination: its directory.
        member: its entry in the combination's summary.

    Raises:
        UserError: it is at none of these places.
    """
    written, own = Path(member["run"]), Path(os.path.abspath(combination.folder))
    places = [written, own.parent.parent / written.parent.name / written.name, own.parent / written.name]
    for place in places:
        if _is_member(place, member["name"]) and place.resolve() != own.resolve():
            return place
    raise UserError(
        f"{combination.folder}: its member {member['name']} is neither at {written} nor beside it ({places[1]}, "
        f"{places[2]}); move it to one of these places, or combine the runs that you have"
    )


def _is_member(place: Path, name: str) -> bool:
    """Whether a run lies there that a combination calls so: by its recipe's name, else by its folder's or its path."""
    try:
        there = RunDirectory.exists(place)
    except UserError:  # where somebody else's runs lie nobody else may look
        return False
    return there and (Path(name).name == place.name or RunDirectory.open(place).recipe.name == name)


def _weights(combination: RunDirectory, which: str | None) -> list[float] | None:
    """Return the weights that a combination gave its members, of the epochs asked for; None for equal ones."""
    combined = combination.summary["combined"]
    kind = which or ("selected" if "selected" in combined else "last")
    if kind not in combined:
        raise UserError(f"distill.weights: {combination.folder} has no {kind} weights; it has {', '.join(combined)}")
    return combined[kind].get("weights")


def teachers_digest(config: DistillConfig) -> str:
    """Return a SHA-256 of all that the teachers teach by: of one run, that of its weights' file.

    Raises:
        UserError: see `teacher_runs`.
    """
    teachers = teacher_runs(config)
    digests = [hashlib.sha256(each.run.read(f"weights/{each.which}.safetensors")).hexdigest() for each in teachers]
    if len(digests) == 1:
        return digests[0]
    parts = [f"{each.weight!r} {digest}" for each, digest in zip(teachers, digests, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
