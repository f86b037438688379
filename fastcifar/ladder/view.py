"""The ladder's table on the terminal: live where there is one, one line per event where there is none."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastcifar.ladder.metrics import NOT_MEASURED
from fastcifar.ladder.state import BLOCKED, CUT, DONE, FAILED, RUNNING, WAITING, Row
from fastcifar.text import duration

STYLES = {DONE: "green", RUNNING: "bold cyan", CUT: "yellow", FAILED: "red", BLOCKED: "magenta", WAITING: "dim"}
COLUMNS = ("row", "state", "best", "published", "difference", "last", "wall-clock", "images/s", "n")
# How many of the columns a terminal of so many characters has room for.
WIDE, WIDE_COLUMNS, NARROW_COLUMNS = 130, len(COLUMNS), 5
# Lines around the table: header, footer and the prompt.
MARGIN = 4


class LadderView:
    """Shows the table; use it as a context manager.

    Args:
        console: where to.
        quiet: show nothing at all.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal and not quiet else None

    def __enter__(self) -> "LadderView":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Show the table anew; a terminal that is too low shows the part around the running row."""
        if self.live:
            self.live.update(render(window(rows, self.console.height - MARGIN), self.console.width), refresh=True)

    def say(self, text: str) -> None:
        """Tell of an event on a line of its own."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)


def window(rows: Sequence[Row], height: int) -> Sequence[Row]:
    """Return at most ``height`` neighbouring rows, the running one in their middle."""
    if len(rows) <= height:
        return rows
    running = next((i for i, row in enumerate(rows) if row.state == RUNNING), 0)
    start = min(max(running - height // 2, 0), len(rows) - height)
    return rows[start : start + height]


def render(rows: Sequence[Row], width: int) -> Table:
    """Return the table for a terminal of so many characters; a narrow one shows the first columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = WIDE_COLUMNS if width >= WIDE else NARROW_COLUMNS
    for column in COLUMNS[:shown]:
        table.add_column(column, no_wrap=True, justify="left" if column in ("row", "state") else "right")
    for row in rows:
        state, *others = cells(row)
        shown_cells: list[str | Text] = [row.name, Text(state, style=STYLES[row.state]), *others]
        table.add_row(*shown_cells[:shown])
    return table


def cells(row: Row) -> list[str]:
    """Return the texts of a row after its name; accuracies in percent, differences in points."""
    metrics = row.metrics
    measured = metrics is not None and metrics.complete
    published = row.published_best
    return [
        f"{row.state} {row.message}".strip() if row.state == RUNNING else row.state,
        str(row.best) if measured else NOT_MEASURED,
        f"{published:.2f}" if published is not None else "none",
        str(row.difference_best or NOT_MEASURED) if published is not None else "none",
        str(row.last) if measured else NOT_MEASURED,
        duration(row.wall_clock_s) if row.wall_clock_s is not None else NOT_MEASURED,
        f"{metrics.images_per_s:,.0f}" if metrics and metrics.images_per_s else NOT_MEASURED,
        str(metrics.n if metrics and measured else 0),
    ]
