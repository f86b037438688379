"""The table on a terminal and as a page: every cell says something, nothing unescaped, the running row in sight."""

import xml.etree.ElementTree as ET
from io import StringIO

import pytest
from rich.console import Console

from fastcifar.ladder.execute import LadderExecution, RowFailed
from fastcifar.ladder.metrics import NOT_MEASURED
from fastcifar.ladder.page import page
from fastcifar.ladder.rows import jobs_for, ladder_rows
from fastcifar.ladder.state import Ledger, Note
from fastcifar.ladder.view import COLUMNS, LadderView, cells, render, window
from tests.ladder.fakes import FakeRows

ROWS = ["lenet5", "deep", "stacking"]


@pytest.fixture
def rows(tmp_path, view):
    """Return a table with a done, a failed and a blocked row."""
    ledger = Ledger(jobs_for(ROWS, 2, tmp_path))
    bad = {"wrn-200": RowFailed("<b>a & b</b>")}
    LadderExecution(ledger, FakeRows(bad=bad), tmp_path, view).execute()
    return ledger.table()


def text_of(rows, width):
    console = Console(file=StringIO(), width=width)
    console.print(render(rows, width))
    return console.file.getvalue()


def test_no_cell_is_empty(rows):
    for row in rows:
        assert all(cells(row))
        assert len(cells(row)) == len(COLUMNS) - 1


def test_an_unmeasured_ladder_says_not_measured_yet(tmp_path):
    rows = Ledger(jobs_for(ladder_rows(), 1, tmp_path)).table()
    assert len(rows) == 36
    assert all(cells(row).count(NOT_MEASURED) == 5 for row in rows)


def test_a_done_row_shows_mean_error_and_difference(rows):
    row = next(row for row in rows if row.name == "lenet5")
    shown = text_of(rows, 140)
    assert str(row.best) in shown
    assert str(row.difference_best) in shown
    assert row.best.n == 2
    assert row.difference_best.points == pytest.approx(row.best.mean - 59.48)


def test_a_narrow_terminal_shows_the_first_columns_whole(rows):
    lines = text_of(rows, 90).splitlines()
    assert "difference" in lines[0]
    assert "images/s" not in lines[0]
    assert "…" not in "".join(lines)


def test_the_window_follows_the_running_row(tmp_path):
    ledger = Ledger(jobs_for(ladder_rows(), 1, tmp_path))
    for row in ("lenet5", "wrn-asam", "pyramid400"):
        ledger.notes = {job.folder: Note("running") for job in ledger.jobs if job.row == row}
        shown = window(ledger.table(), 10)
        assert len(shown) == 10
        assert row in [r.name for r in shown]
    assert len(window(ledger.table(), 100)) == 36


def test_a_terminal_gets_the_live_table_and_a_pipe_only_the_events(rows):
    terminal = Console(file=StringIO(), force_terminal=True, width=140, height=50)
    with LadderView(terminal) as view:
        view.update(rows)
        view.say("lenet5, seed 42: done [1/3]")
    assert "wall-clock" in terminal.file.getvalue()
    pipe = Console(file=StringIO(), width=140)
    with LadderView(pipe) as view:
        view.update(rows)
        view.say("lenet5, seed 42: done [1/3]")
    assert pipe.file.getvalue() == "lenet5, seed 42: done [1/3]\n"


def test_the_page_is_whole_and_escaped(rows):
    text = page(rows)
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
    assert "<b>a" not in text
    assert text.count("<tr>") == 1 + len(rows)
    assert "<td></td>" not in text
    assert "published protocol" in text
    svg = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    rings = [c for c in svg.iter("circle") if c.get("class") == "published"]
    dots = [c for c in svg.iter("circle") if c.get("class") == "ours"]
    assert (len(rings), len(dots)) == (len(rows), sum(row.state == "done" for row in rows))
    assert all(0 <= float(c.get("cx").removesuffix("%")) <= 100 for c in rings + dots)


def test_a_page_of_rows_without_published_metrics_has_no_picture(tmp_path):
    text = page(Ledger(jobs_for(["smoke/lenet5"], 1, tmp_path)).table())
    assert "<svg" not in text
    assert NOT_MEASURED in text
