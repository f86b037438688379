"""The metrics of a row over several seeds, with standard errors, beside the published ones.

The published ladder is the article "CIFAR-10 분류 모델 97.78% 달성하기" with its code, github.com/windopper/cifar
(commit 70ec89d).
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastcifar.analysis.statistics import Mean, mean_of

NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Metrics:
    """What a row came to.

    Attributes:
        last, best, selected: accuracies in percent over the seeds that got as far as any.
        tta: the last epochs' with test-time augmentation, or None where a recipe has none.
        best_by_seed: the best of each of them.
        n: those seeds.
        epochs_done, epochs: how far they got.
        complete: whether that is the end.
        training_s: mean training time in seconds.
        images_per_s: median speed.
        hardware, git: of these runs, several joined by "; ".
        date: of the newest.
        precision: of those that say, with how many of the runs that is unless all; empty where none does.
    """

    last: Mean | None
    best: Mean | None
    selected: Mean | None
    tta: Mean | None
    best_by_seed: tuple[float, ...]
    n: int
    epochs_done: int
    epochs: int
    complete: bool
    training_s: float | None
    images_per_s: float | None
    hardware: str
    date: str
    git: str
    precision: str


def metrics_of(rows: Sequence[dict[str, Any]]) -> Metrics | None:
    """Summarize one row's results, one object a seed.

    Complete runs leave incomplete ones out of account, and of complete ones those count that have as many epochs as the
    newest, for a recipe may have been given fewer.
    """
    if not rows:
        return None
    newest = max(rows, key=lambda row: (row["complete"], 0 if row["complete"] else row["epochs_done"], row["date"]))
    furthest = newest["complete"], newest["epochs_done"]
    used = [row for row in rows if (row["complete"], row["epochs_done"]) == furthest]
    return Metrics(
        last=mean_of(row["last"] for row in used),
        best=mean_of(row["best"] for row in used),
        selected=mean_of(row["selected"] for row in used),
        tta=mean_of(row.get("tta") for row in used),
        best_by_seed=tuple(row["best"] for row in used if row["best"] is not None),
        n=len(used),
        epochs_done=furthest[1],
        epochs=used[0]["epochs"],
        complete=furthest[0],
        training_s=_average(statistics.fmean, [row["training_s"] for row in used]),
        images_per_s=_average(statistics.median, [row["images_per_s"] for row in used]),
        hardware=_joined(row["hardware"] for row in used),
        date=max(str(row["date"]) for row in used),
        git=_joined(row["git"] for row in used),
        precision=_said([row.get("precision") for row in used]),
    )


def _average(how: Any, values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(how(known)) if known else None


def _joined(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(str(v) for v in values if v))


def _said(precisions: list[str | None]) -> str:
    counts = Counter(p for p in precisions if p)
    return "; ".join(p if n == len(precisions) else f"{p} ({n} of {len(precisions)})" for p, n in counts.items())


def recorded(name: str, results: list[dict[str, Any]]) -> list[Metrics]:
    """Return the recorded metrics of the recipe of that name, one per hardware, those of the most seeds first.

    Where it was trained to the end these are the complete ones, of as many epochs as the newest of them, for a recipe
    may have been given fewer; elsewhere that which got furthest is the only one.
    """
    rows = [row for row in results if row["id"] == name]
    by_hardware = [[row for row in rows if row["hardware"] == on] for on in dict.fromkeys(r["hardware"] for r in rows)]
    found = [metrics for group in by_hardware if (metrics := metrics_of(group))]
    complete = sorted((metrics for metrics in found if metrics.complete), key=lambda metrics: metrics.date)
    if not complete:
        return sorted(found, key=lambda metrics: metrics.epochs_done)[-1:]
    return sorted((m for m in complete if m.epochs == complete[-1].epochs), key=lambda m: m.n, reverse=True)


def ours_in_words(found: Sequence[Metrics]) -> str:
    """Return the text behind ``# ours:`` in a recipe's head, and in lists of recipes, from what `recorded` gives."""
    return "; ".join(_in_words(metrics) for metrics in found) or NOT_MEASURED


def _in_words(metrics: Metrics) -> str:
    where = f"{metrics.hardware}, {metrics.date}"
    precision = f" in {metrics.precision}" if metrics.precision else ""
    if not metrics.complete:
        return f"{NOT_MEASURED} ({metrics.last} last after {metrics.epochs_done} of {metrics.epochs} epochs; {where})"
    parts = [f"{value} {which}" for which, value in _known(metrics)]
    return f"{', '.join(parts)} (n = {metrics.n}{precision}; {where})"


def ours_in_short(found: Sequence[Metrics]) -> str:
    """Return the last epoch's accuracy on the first hardware, with how many seeds it is of; nothing if not measured."""
    if not found or found[0].last is None:
        return ""
    metrics = found[0]
    if not metrics.complete:
        return f"{metrics.last} at epoch {metrics.epochs_done}"
    return f"{metrics.last} ({metrics.n})"


def _known(metrics: Metrics) -> list[tuple[str, Mean]]:
    pairs = (
        ("last", metrics.last), ("best", metrics.best), ("selected", metrics.selected), ("last with TTA", metrics.tta)
    )  # fmt: skip
    return [(which, value) for which, value in pairs if value is not None]
