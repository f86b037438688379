"""Curves of a run as SVG that takes its colours from the page, so that light and dark need no second picture."""

import io
import re
from collections.abc import Sequence
from typing import Any

from fastcifar.errors import UserError
from fastcifar.locations import install_command

# Placeholder colours in matplotlib's output; each becomes a CSS variable of the page.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--train)",
    "#050505": "var(--test)",
    "#060606": "var(--holdout)",
    "#070707": "var(--raw)",
}
INK, MUTED, LINE, TRAIN, TEST, HOLDOUT, RAW = COLOURS
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, selectable
    "svg.hashsalt": "fastcifar",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.6,
}
DESCRIPTION = "Loss, accuracy and learning rate by epoch"
NEEDS = f"the report needs matplotlib and jinja2; install them: {install_command('report')}"
Series = tuple[str, str, list[int], list[float]]
"""A curve: its name, its placeholder colour, its epochs and its values."""


def curves_svg(metrics: Sequence[dict[str, Any]], weights: str, identity: str) -> str:
    """Return one SVG element with loss, accuracy and learning rate over the epochs; empty without metrics.

    Args:
        metrics: the rows of ``metrics.jsonl``.
        weights: which weights' metrics are reported (``raw`` or ``ema``); the raw ones are drawn too, thinner.
        identity: a prefix that makes the ids in this picture unlike those of another on the same page.

    Raises:
        UserError: matplotlib is missing.
    """
    if not metrics:
        return ""
    figure_class, rc_context = _matplotlib()
    with rc_context(STYLE):
        figure = figure_class(figsize=(10.2, 2.9), layout="constrained")
        loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
        _draw(loss, "Loss, nats", _series(metrics, weights, "loss"))
        _draw(accuracy, "Accuracy, %", _series(metrics, weights, "accuracy"))
        _draw(rate, "Learning rate", [("", TRAIN, _epochs(metrics), [row["lr"] for row in metrics])])
        rate.set_ylim(bottom=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), identity)


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(NEEDS) from None
    return Figure, rc_context


def _series(metrics: Sequence[dict[str, Any]], weights: str, metric: str) -> list[Series]:
    """Return the curves of ``loss`` or ``accuracy``: training, then each split that was evaluated."""
    series = [("train", TRAIN, _epochs(metrics), [row[f"train_{metric}"] for row in metrics])]
    for split, colour in (("holdout", HOLDOUT), ("test", TEST)):
        rows = [row for row in metrics if weights in row.get(split, {})]
        if rows:
            series.append((split, colour, _epochs(rows), [row[split][weights][metric] for row in rows]))
    rows = [row for row in metrics if weights != "raw" and "raw" in row.get("test", {})]
    if rows:
        series.append(("test, raw weights", RAW, _epochs(rows), [row["test"]["raw"][metric] for row in rows]))
    return series


def _epochs(rows: Sequence[dict[str, Any]]) -> list[int]:
    return [row["epoch"] for row in rows]


def _draw(axes: Any, title: str, series: list[Series]) -> None:
    """Draw curves into one panel; a single epoch shows as points."""
    from matplotlib.ticker import MaxNLocator

    for name, colour, epochs, values in series:
        width, marker = 0.9 if colour == RAW else 1.6, "o" if len(epochs) < 3 else None
        axes.plot(epochs, values, color=colour, label=name, linewidth=width, marker=marker, markersize=4)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0.02)
    if len(series) > 1:
        axes.legend(loc="best", handlelength=1.4)


def _for_page(svg: str, identity: str) -> str:
    """Cut out the ``<svg>`` element, put in the page's colours, and make its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for placeholder, variable in COLOURS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'href="#', f'href="#{identity}-', svg)
    svg = svg.replace("url(#", f"url(#{identity}-")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg class="curves" role="img" aria-label="{DESCRIPTION}"', 1)
