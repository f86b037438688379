"""A run's curves as plain values, for the charts of the report."""

from collections.abc import Sequence
from typing import Any

# Names of colours in page/style.css.
TRAIN, TEST, HOLDOUT, RAW = "--train", "--test", "--holdout", "--raw"


def curves(metrics: Sequence[dict[str, Any]], weights: str) -> dict[str, list[dict[str, Any]]] | None:
    """Return the series of ``loss``, ``accuracy`` and ``lr`` over the epochs; None without metrics.

    Args:
        metrics: the rows of ``metrics.jsonl``.
        weights: which weights' metrics are reported (``raw`` or ``ema``); the raw ones are drawn too, thinner.
    """
    if not metrics:
        return None
    rate = {"name": "learning rate", "colour": TRAIN, "x": _epochs(metrics), "y": [row["lr"] for row in metrics]}
    return {"loss": _series(metrics, weights, "loss"), "accuracy": _series(metrics, weights, "accuracy"), "lr": [rate]}


def _series(metrics: Sequence[dict[str, Any]], weights: str, metric: str) -> list[dict[str, Any]]:
    """Return the curves of ``loss`` or ``accuracy``: training, then each split that was evaluated."""
    series = [
        {"name": "train", "colour": TRAIN, "x": _epochs(metrics), "y": [row[f"train_{metric}"] for row in metrics]}
    ]
    for split, colour in (("holdout", HOLDOUT), ("test", TEST)):
        series += _evaluated(metrics, split, weights, metric, {"name": split, "colour": colour})
    if weights != "raw":
        series += _evaluated(metrics, "test", "raw", metric, {"name": "test, raw weights", "colour": RAW, "thin": True})
    return series


def _evaluated(
    metrics: Sequence[dict[str, Any]], split: str, weights: str, metric: str, look: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the one series of a split, over the epochs at which it was evaluated; none where it never was."""
    rows = [row for row in metrics if weights in row.get(split, {})]
    if not rows:
        return []
    # Few evaluations are marked, so that nobody reads more from the line between them.
    marks = len(rows) < len(metrics) or len(rows) < 3
    return [{**look, "x": _epochs(rows), "y": [row[split][weights][metric] for row in rows], "marks": marks}]


def _epochs(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["epoch"] for row in rows]
