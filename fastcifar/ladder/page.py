"""``ladder.html``: the ladder's table and a picture of it, in one file that needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastcifar.analysis.page import POLICY, asset
from fastcifar.analysis.statistics import Mean
from fastcifar.ladder.metrics import NOT_MEASURED
from fastcifar.ladder.state import Row
from fastcifar.run_directory import write_atomic
from fastcifar.text import duration

STYLE = """
main { max-width: 90rem; }
.ladder td, .ladder th { padding: .25rem .7rem .25rem 0; white-space: nowrap; }
.ladder td.number, .ladder th.number { text-align: right; }
.ladder { width: 100%; }
.ladder tr > * { border-bottom: 1px solid var(--line); }
.ladder thead th { color: var(--muted); }
.ladder tbody td:first-child { position: sticky; left: 0; background: var(--ground); }
.unmeasured { color: var(--muted); }
.picture { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .6rem; max-width: 62rem;
  margin: 1.2rem 0 2rem; padding-right: .8rem; font-size: 12px; }
.picture span { display: block; height: 18px; line-height: 18px; text-align: right; }
.picture svg { width: 100%; overflow: visible; }
circle.ours { fill: var(--c2); } circle.published { fill: none; stroke: var(--c0); stroke-width: 2; }
line.error { stroke: var(--c2); stroke-width: 2; } line.grid { stroke: var(--line); }
.picture text { fill: var(--ink); }
"""
LEGEND = (
    "Best: the highest test accuracy over all epochs, the published protocol (the epoch is chosen on the test set). "
    "Last: the last epoch, chosen by nobody. Both in percent, mean ± standard error over n seeds. The difference is "
    "ours minus published, best to best, in points; its standard error joins ours with the binomial one of the "
    "single published run. In the picture a ring is the published accuracy, a dot ours with its standard error. "
    "The published ladder is the article “CIFAR-10 분류 모델 97.78% 달성하기” with its code, "
    "github.com/windopper/cifar (commit 70ec89d)."
)
HEADER = ("row", "stage", "state", "best", "published", "difference", "last", "n", "wall-clock", "images/s", "hardware")
NUMBERS = {"best", "published", "difference", "last", "n", "wall-clock", "images/s"}
ROW_PX = 18
"""The height of a row of the picture, as its style has it."""


def write_html(path: Path, rows: Sequence[Row]) -> None:
    """Write the page, atomically."""
    write_atomic(path, page(rows))


def page(rows: Sequence[Row]) -> str:
    """Return the page as HTML."""
    done = sum(row.state == "done" for row in rows)
    title = '<header class="page"><h1>The ladder</h1><button class="theme" type="button">Colours</button></header>'
    text = f'<p>{done} of {len(rows)} rows are done.</p><p class="quiet">{escape(LEGEND)}</p>'
    body = f'<main>{title}{text}{picture(rows)}{_table(rows)}</main>'
    return f"{_head()}<body>{body}<script>{{{asset('theme.js')}}}</script></body></html>\n"


def _head() -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<title>The ladder</title><link rel="icon" href="data:,">'
        f"<style>{asset('style.css')}{STYLE}</style></head>"
    )


def _table(rows: Sequence[Row]) -> str:
    header = "".join(f"<th{_kind(name)}>{name}</th>" for name in HEADER)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    table = f'<table class="ladder"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _kind(name: str) -> str:
    return ' class="number"' if name in NUMBERS else ""


def _cells(row: Row) -> str:
    metrics = row.metrics
    measured = metrics is not None and metrics.complete
    values = [
        f'<span title="{escape(row.title, quote=True)}">{escape(row.name)}</span>',
        escape(row.stage),
        f'<span class="{row.state}">{escape(f"{row.state} {row.message}".strip())}</span>',
        str(row.best) if measured else NOT_MEASURED,
        f"{row.published_best:.2f}" if row.published_best is not None else "none",
        str(row.difference_best) if row.difference_best else NOT_MEASURED if row.published_best is not None else "none",
        str(row.last) if measured else NOT_MEASURED,
        str(metrics.n if metrics else 0),
        duration(row.wall_clock_s) if row.wall_clock_s is not None else NOT_MEASURED,
        f"{metrics.images_per_s:,.0f}" if metrics and metrics.images_per_s else NOT_MEASURED,
        escape(metrics.hardware) if metrics else NOT_MEASURED,
    ]
    shown = [_faint(name) if value == NOT_MEASURED else value for name, value in zip(HEADER, values, strict=True)]
    return "".join(f"<td{_kind(name)}>{value}</td>" for name, value in zip(HEADER, shown, strict=True))


def _faint(name: str) -> str:
    """Return what stands for a value that is not measured: the words once a row, dashes in the cells after them."""
    return f'<span class="unmeasured" title="{NOT_MEASURED}">{NOT_MEASURED if name == "best" else "&ndash;"}</span>'


def picture(rows: Sequence[Row]) -> str:
    """Return the names and an SVG as wide as the page: the published best as a ring, ours as a dot with its error."""
    shown = [row for row in rows if row.published_best is not None]
    if not shown:
        return ""
    known = [v for row in shown for v in (row.published_best, _of(row)) if v is not None]
    low = 5 * (min(known) // 5)
    height = ROW_PX * len(shown) + 30
    parts = [_grid(low, height), *(_dots(row, i, low) for i, row in enumerate(shown))]
    label = "Published and own best accuracy per row, in percent"
    svg = f'<svg height="{height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    names = "".join(f"<span>{escape(row.name)}</span>" for row in shown)
    return f'<div class="picture"><div aria-hidden="true">{names}</div>{svg}</div>'


def _of(row: Row) -> float | None:
    return row.best.mean if row.best and row.metrics and row.metrics.complete else None


def _x(accuracy: float, low: float) -> str:
    """Return a horizontal place in percent of the SVG's width, so that lettering keeps its size on any screen."""
    return f"{100 * (accuracy - low) / (100 - low):.2f}%"


def _grid(low: float, height: int) -> str:
    step = 5 if low >= 50 else 10
    marks = range(int(low), 101, step)
    return "".join(
        f'<line class="grid" x1="{_x(m, low)}" x2="{_x(m, low)}" y1="0" y2="{height - 20}"/>'
        f'<text x="{_x(m, low)}" y="{height - 5}" text-anchor="middle">{m}</text>'
        for m in marks
    )


def _dots(row: Row, index: int, low: float) -> str:
    y = ROW_PX * index + ROW_PX / 2
    told = f"<title>{escape(row.name)}: published {row.published_best:.2f}%</title>"
    ring = f'<circle class="published" cx="{_x(row.published_best or low, low)}" cy="{y}" r="5">{told}</circle>'
    return ring + (_dot(row.best, y, low) if row.best and _of(row) is not None else "")


def _dot(ours: Mean, y: float, low: float) -> str:
    error = ours.error or 0.0
    ends = [_x(ours.mean + sign * error, low) for sign in (-1, 1)]
    bar = f'<line class="error" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>'
    told = f"<title>ours {ours}%, n = {ours.n}</title>"
    return f'{bar}<circle class="ours" cx="{_x(ours.mean, low)}" cy="{y}" r="3">{told}</circle>'
