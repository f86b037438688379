"""One page that explains runs: a single HTML file without any outside resource, for light and dark screens and paper.

The template (``page/report.html``) writes everything that can be read without a script; ``page/report.js`` adds charts,
pictures and what answers a click, from the values in ``<script id="data">``.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis.comparison import comparison
from fastcifar.analysis.content import Images, content, explained, find_images, of_cells
from fastcifar.analysis.curves import curves
from fastcifar.analysis.members import marked, marked_names
from fastcifar.analysis.page import POLICY, asset
from fastcifar.analysis.sprite import COLUMNS, Sprite
from fastcifar.config import to_toml
from fastcifar.config.shipped import in_words
from fastcifar.data import pixels
from fastcifar.errors import UserError
from fastcifar.locations import install_command
from fastcifar.run_directory import RunDirectory
from fastcifar.text import duration, stopped_at

MOST_CLASSES = 20
"""With more classes the confusion matrix is no table to look at."""
CELL_IMAGES = 18
"""Images of a cell of the confusion matrix on a page of one run; of several runs each has its share."""
SCRIPTS = ("theme.js", "charts.js", "report.js")


def build_report(
    runs: Sequence[RunDirectory], data: Path | None = None
) -> tuple[str, list[dict[str, Any]], dict[str, Any] | None]:
    """Return the page, the plain values per run that it shows, and the comparison of two or more runs.

    Args:
        runs: one or more runs with logits.
        data: the value of ``--data``, for the pictures; without it they are taken from wherever the data is found.

    Raises:
        UserError: a package is missing, a run has no logits, or ``data`` is not the runs' data.
    """
    template = _template()
    images = [find_images(run, data) for run in runs]
    contents = [content(run, found) for run, found in zip(runs, images, strict=True)]
    compared = comparison(runs) if len(runs) > 1 else None
    parts = [_Part(*entry) for entry in zip(runs, contents, images, strict=True)]
    sprite = Sprite(max((split.shape[1] for part in parts for split in part.images.splits.values()), default=32))
    script = {
        "runs": [part.for_script(sprite, max(3, CELL_IMAGES // len(runs))) for part in parts],
        "comparison": compared,
    }
    shown = [part.for_template(sprite) for part in parts]
    page = template.render(
        title=_title(runs), runs=shown, names=marked_names(runs), compared=compared,
        data=_in_script({**script, "tile": sprite.tile_px, "columns": COLUMNS}), sheet=sprite.address(),
        style=asset("style.css"), script="\n".join(asset(name) for name in SCRIPTS), policy=POLICY,
        most_classes=MOST_CLASSES, version=metadata.version("fastcifar"),
    )  # fmt: skip
    return page, contents, compared


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise UserError(f"the report needs jinja2; install it: {install_command('report')}") from None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["duration"] = duration
    environment.filters["in_words"] = in_words
    environment.filters["member"] = lambda entry: marked(entry["name"], stopped_at(entry))
    return environment.from_string(asset("report.html"))


def _title(runs: Sequence[RunDirectory]) -> str:
    if len(runs) == 1:
        return runs[0].recipe.title or runs[0].recipe.name
    return "Comparison of " + ", ".join(dict.fromkeys(run.recipe.name for run in runs))


def _in_script(values: dict[str, Any]) -> str:
    """Return values as JSON that nothing in them can end the script element of, whatever a class is called."""
    text = json.dumps(values, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(frozen=True)
class _Part:
    """One run on the page."""

    run: RunDirectory
    values: dict[str, Any]
    images: Images

    def for_script(self, sprite: Sprite, cell_images: int) -> dict[str, Any]:
        """Return what ``report.js`` needs of the run, and put its pictures on the sheet."""
        values, test = self.values, self.images.splits.get("test")
        return {
            "classes": values["classes"],
            "curves": curves(self.run.metrics(), values["results"]["weights"]),
            "reliability": _reliability_series(values["calibration"]),
            "cells": self._cells(sprite, cell_images),
            "hard": _entries(values["hard_images"], test, sprite),
            "hardByClass": _entries(values["hard_by_class"], test, sprite),
        }

    def _cells(self, sprite: Sprite, count: int) -> dict[str, list[list[Any]]]:
        if len(self.values["classes"]) > MOST_CLASSES:
            return {}
        logits = self.run.logits(f"test/{explained(self.run)}/{self.values['results']['weights']}")
        found = of_cells(logits, self.run.logits("test/labels"), count)
        test = self.images.splits.get("test")
        return {f"{i},{j}": _entries((h._asdict() for h in cell), test, sprite) for (i, j), cell in found.items()}

    def for_template(self, sprite: Sprite) -> dict[str, Any]:
        """Return the run's plain values with what only the template needs: tiles, words, shades."""
        values, splits = self.values, self.images.splits
        tiles = {
            split: sprite.add_rows(splits.get(split), [image["row"] for image in found["images"]])
            for split, found in values["label_errors"].items()
        }
        low = _scale_from(values["confusion"]["recall_interval"])
        votes = values["test_set"]["votes"] if values["test_set"] else []
        return {
            **values,
            "disputed_tiles": sprite.add_rows(splits.get("test"), [entry["row"] for entry in votes]),
            "disputed_predicted": self._predicted([entry["row"] for entry in votes]),
            "environment": _environment_rows(self.run),
            "has_curves": bool(self.run.metrics()),
            "how": {which: _how(values["results"], which) for which in ("last", "best", "selected", "tta")},
            "note": self.images.note,
            "recipe": _lists_in_a_line(to_toml(self.run.recipe)),
            "shades": _shades(np.array(values["confusion"]["counts"])),
            "scale_from": low,
            "on_scale": lambda percent: 100 * (percent - low) / (100 - low),
            "tiles": tiles,
            "weakest": _weakest(values["confusion"]["recall_percent"]),
        }

    def _predicted(self, rows: list[int]) -> list[int]:
        logits = self.run.logits(f"test/{explained(self.run)}/{self.values['results']['weights']}")
        return logits[rows].argmax(1).tolist() if rows else []


def _entries(listed: Iterable[dict[str, Any]], images: pixels.Images | None, sprite: Sprite) -> list[list[Any]]:
    """Return images as short lists for the script: tile, row, label, prediction, loss, the two probabilities."""
    entries = []
    for image in listed:
        (tile,) = sprite.add_rows(images, [image["row"]])
        numbers = [round(image[key], 4) for key in ("loss", "probability", "label_probability")]
        entries.append([tile, image["row"], image["label"], image["predicted"], *numbers])
    return entries


def _reliability_series(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the curves of the reliability diagram, in percent."""
    series = []
    looks = (("as_trained", "as trained", "--test"), ("with_temperature", "with the temperature", "--holdout"))
    for key, name, colour in looks:
        if found[key]:
            bins = found[key]["reliability"]
            most = max(b["images"] for b in bins)
            series.append({
                "name": name, "colour": colour, "marks": True,
                "x": [100 * b["confidence"] for b in bins], "y": [100 * b["accuracy"] for b in bins],
                "labels": [f"{b['images']} images, {name}" for b in bins],
                "sizes": [b["images"] / most for b in bins],
            })  # fmt: skip
    return series


def _lists_in_a_line(toml: str) -> str:
    """Return TOML with each list of single values in one line."""

    def joined(found: re.Match[str]) -> str:
        return "[" + ", ".join(line.strip().removesuffix(",") for line in found[0].splitlines()[1:-1]) + "]"

    return re.sub(r"\[\n(?: +[^\n\[{]*,\n)+\]", joined, toml)


def _how(results: dict[str, Any], which: str) -> str:
    """Say in a few words how a metric came about."""
    entry = results[which]
    if not entry:
        return ""
    if results["members"]:
        return str(entry["protocol"])
    words = {
        "last": f"epoch {entry.get('epoch')}, nothing chosen",
        "best": f"epoch {entry.get('epoch')}, chosen on the test set, as published",
        "selected": f"epoch {entry.get('epoch')}, chosen on the holdout",
        "tta": f"{entry.get('kind')}, last epoch",
    }
    return words[which]


def _shades(counts: np.ndarray) -> list[list[int]]:
    """Return how strongly to colour each cell, 0..60: the diagonal by its share of the row, errors by the largest."""
    off = counts.astype(np.float64)
    np.fill_diagonal(off, 0)
    shades = 60 * np.sqrt(off / max(off.max(), 1))
    np.fill_diagonal(shades, 42 * np.diag(counts) / np.maximum(counts.sum(1), 1))
    return np.round(shades).astype(int).tolist()


def _weakest(recall: list[float | None]) -> list[int]:
    """Return the classes by rising accuracy, at most 20; those without test images last."""
    return sorted(range(len(recall)), key=lambda i: _or_above_all(recall[i]))[:MOST_CLASSES]


def _scale_from(intervals: list[tuple[float, float] | None]) -> int:
    """Return where the axis of the classes' accuracies begins: at the tens below the lowest bound, at most at 90%."""
    return min(90, int(min((interval[0] for interval in intervals if interval), default=0)) // 10 * 10)


def _or_above_all(percent: float | None) -> float:
    return 101.0 if percent is None else percent


def _environment_rows(run: RunDirectory) -> list[tuple[str, str]]:
    """Return the environment as rows of a table, versions in one."""
    known = dict(run.environment)
    packages, resumed = known.pop("packages", {}), known.pop("resumed", [])
    rows = [(key, str(value)) for key, value in known.items() if value is not None and not isinstance(value, dict)]
    if isinstance(packages, dict) and packages:
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    for place in resumed:
        where = f"{place.get('hardware')}, revision {place.get('git')}"
        rows.append((f"went on after epoch {place['epochs_done']}", where))
    return rows
