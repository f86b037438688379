"""What combinations read: the saved logits of several runs on the same images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.text import stopped_at

WHICH = ("last", "best", "selected")


@dataclass(frozen=True)
class Scores:
    """The logits of M members on the same N images.

    Attributes:
        names: the members, in the order of the first axis.
        logits: float32 (M, N, K).
        labels: int64 (N,), values in 0..K-1.
    """

    names: list[str]
    logits: np.ndarray
    labels: np.ndarray


def open_members(folders: Iterable[Path]) -> dict[str, RunDirectory]:
    """Open run directories, named by their recipe where that tells them apart, else by their folder.

    Raises:
        UserError: fewer than two, the same folder twice, or one that is not a run.
    """
    runs = [RunDirectory.open(folder) for folder in folders]
    resolved = [run.folder.resolve() for run in runs]
    if len(runs) < 2:
        raise UserError("RUN...: a combination needs at least two run directories")
    if len(set(resolved)) < len(resolved):
        raise UserError("RUN...: the same run directory is given twice; weight a member with --weights instead")
    return dict(zip(distinct_names(runs), runs, strict=True))


def distinct_names(runs: list[RunDirectory]) -> list[str]:
    """Return a short name per run, no two the same: recipe name, folder name, or the whole path."""
    for names in ([run.recipe.name for run in runs], [run.folder.name for run in runs]):
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def marked_names(runs: Sequence[RunDirectory]) -> list[str]:
    """Return the names of `distinct_names`, with how far a run has come where it is not finished."""
    return [marked(name, stopped_at(run.summary)) for name, run in zip(distinct_names(list(runs)), runs, strict=True)]


def marked(name: str, stopped: str | None) -> str:
    """Return a name with how far that run has come, as `fastcifar.text.stopped_at` says it."""
    return f"{name}, {stopped}" if stopped else name


def available(members: Mapping[str, RunDirectory], split: str, tta: bool = False) -> list[str]:
    """Return which of ``last``, ``best`` and ``selected`` every member has logits of, for one split."""
    return [w for w in WHICH if all(_key(run, split, w, tta) in run.logits_keys() for run in members.values())]


def collect(members: Mapping[str, RunDirectory], split: str, which: str, tta: bool = False) -> Scores:
    """Read the members' logits on one split and make sure that they belong together.

    Args:
        members: runs by name.
        split: ``test``, ``holdout`` or ``train``.
        which: ``last``, ``best`` or ``selected`` epoch of each member.
        tta: read the logits under test-time augmentation.

    Raises:
        UserError: a member lacks these logits (the message has the fix), or two members differ in classes, images
            or labels (the message names them).
    """
    names = list(members)
    logits = [_read(name, run, split, which, tta) for name, run in members.items()]
    labels = [run.logits(f"{split}/labels") for run in members.values()]
    _agree(names, [array.shape[1:] for array in logits], "number of classes")
    _agree(names, [source_of(run) for run in members.values()], "data set")
    known = {name: run.summary["content"] for name, run in members.items() if "content" in run.summary}
    if known:
        _agree(list(known), list(known.values()), "images")
    if split == "holdout":
        _agree(names, [run.logits("holdout/indices").tobytes() for run in members.values()], "holdout rows")
    _agree(names, [array.tobytes() for array in labels], f"{split} labels")
    return Scores(names, np.stack(logits).astype(np.float32), labels[0].astype(np.int64))


def _read(name: str, run: RunDirectory, split: str, which: str, tta: bool) -> np.ndarray:
    """Return one member's logits float32 (N, K), finite."""
    key, have = _key(run, split, which, tta), run.logits_keys()
    if f"{split}/labels" not in have:
        raise UserError(f"{name} ({run.folder}): {_CURES[split]}")
    if key not in have:
        raise UserError(f"{name} ({run.folder}): has no logits {key}; {_cure_of(which, tta)}")
    logits = run.logits(key)
    if not np.isfinite(logits).all():
        raise UserError(f"{name} ({run.folder}): its logits {key} are not all finite; leave this member out")
    return logits


_CURES = {
    "holdout": "has no holdout to fit on; train it with data.holdout = 5000 "
    "(`fastcifar run RECIPE --set data.holdout=5000`)",
    "train": "has no logits of its training images, which the published protocol fits on; train it with "
    "eval.train_logits = true (`fastcifar run RECIPE --set eval.train_logits=true`)",
    "test": "has no test logits; train the run again",
}


def _cure_of(which: str, tta: bool) -> str:
    if tta:
        return "train it with eval.tta = \"flip\", or leave out --tta"
    return "train it with data.holdout = 5000" if which == "selected" else "train it again to the end"


def _key(run: RunDirectory, split: str, which: str, tta: bool) -> str:
    return f"{split}/{which}/{run.summary['weights']}{'/tta' if tta else ''}"


def same_test_images(a: RunDirectory, b: RunDirectory) -> bool:
    """Return whether two runs were evaluated on the same images.

    Labels alone do not tell it of image folders, which are sorted by class; runs of older versions do not say more.
    """
    contents = [run.summary["content"] for run in (a, b) if "content" in run.summary]
    return len({*contents}) < 2 and np.array_equal(a.logits("test/labels"), b.logits("test/labels"))


def source_of(run: RunDirectory) -> str:
    """Return the name of the data set of a run (``cifar10``); a combination has its members' in its summary."""
    data = getattr(run.recipe, "data", None)
    return data.source if data is not None else str(run.summary.get("source", ""))


def _agree(names: list[str], values: list[object], what: str) -> None:
    """Refuse members that differ in ``values``, by name."""
    odd = [name for name, value in zip(names, values, strict=True) if value != values[0]]
    if odd:
        raise UserError(
            f"{', '.join(odd)}: differs from {names[0]} in its {what}; combine runs with the same [data] table "
            "(source, holdout, subset); seeds of one recipe hold out the same images where they are trained with one "
            "data.holdout_seed, such as --set data.holdout_seed=1"
        )
