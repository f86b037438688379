"""One page that explains runs: a single HTML file without any outside resource, for light and dark screens."""

import base64
import io
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np

from fastcifar.analysis.content import Images, content, find_images
from fastcifar.analysis.curves import NEEDS, curves_svg
from fastcifar.config import to_toml
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.text import duration


def build_report(runs: Sequence[RunDirectory], data: Path | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Return the page and, per run, the plain values that it shows.

    Args:
        runs: one or more runs with logits.
        data: the value of ``--data``, for the pictures; without it they are taken from wherever the data is found.

    Raises:
        UserError: a package is missing, a run has no logits, or ``data`` is not the runs' data.
    """
    template = _template()
    images = [find_images(run, data) for run in runs]
    contents = [content(run, found) for run, found in zip(runs, images, strict=True)]
    parts = [_for_page(*entry, str(i)) for i, entry in enumerate(zip(runs, contents, images, strict=True))]
    title = contents[0]["title"] or contents[0]["name"] if len(runs) == 1 else "Runs"
    return template.render(title=title, runs=parts, version=metadata.version("fastcifar")), contents


def _template() -> Any:
    try:
        from jinja2 import Environment
    except ImportError:
        raise UserError(NEEDS) from None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(resources.files("fastcifar.analysis").joinpath("page.html").read_text("utf-8"))


def _for_page(run: RunDirectory, values: dict[str, Any], images: Images, identity: str) -> dict[str, Any]:
    """Add to a run's plain values what only the page needs: pictures, curves, words."""
    from markupsafe import Markup

    results, recall = values["results"], values["confusion"]["recall_percent"]
    thumbs = {"hard": _thumbnails(values["hard_images"], images.splits.get("test"))}
    for split, found in values["label_errors"].items():
        thumbs[split] = _thumbnails(found["images"], images.splits.get(split))
    return {
        **values,
        "clocks": {k.removesuffix("_s"): duration(v) for k, v in results["clocks"].items()},
        "curves": Markup(curves_svg(run.metrics(), results["weights"], f"c{identity}")),
        "environment": _environment_rows(run),
        "how": {which: _how(results, which) for which in ("last", "best", "selected", "tta")},
        "note": images.note,
        "recipe": to_toml(run.recipe),
        "shades": _shades(np.array(values["confusion"]["counts"])),
        "thumbs": thumbs,
        "weakest": sorted(range(len(recall)), key=lambda i: 101.0 if recall[i] is None else recall[i])[:10],
    }


def _how(results: dict[str, Any], which: str) -> str:
    """Say in a few words how a metric came about."""
    entry = results[which]
    if not entry:
        return ""
    if results["members"]:
        return entry["protocol"]
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


def _thumbnails(listed: list[dict[str, Any]], images: np.ndarray | None) -> list[str]:
    """Return a PNG per listed image as a data address; empty texts where there are no images."""
    if images is None:
        return [""] * len(listed)
    return [png_address(images[image["row"]]) for image in listed]


def png_address(image: np.ndarray) -> str:
    """Return an image, uint8 (H, W, C) with 1 or 3 channels, as the ``data:`` address of a PNG of the same size.

    The page enlarges it, smoothly: blocks of single pixels are harder to recognize.
    """
    from PIL import Image

    pixels = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _environment_rows(run: RunDirectory) -> list[tuple[str, str]]:
    """Return the environment as rows of a table, versions in one."""
    known = dict(run.environment)
    packages = known.pop("packages", {})
    rows = [(key, str(value)) for key, value in known.items() if value is not None and not isinstance(value, dict)]
    if isinstance(packages, dict) and packages:
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    return rows
