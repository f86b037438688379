"""What a person sees of a run: a live display in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastcifar.console import err
from fastcifar.text import duration

REFRESH_S = 0.5


class Display:
    """Shows epoch, step, loss, accuracy, images/s and the time left.

    Args:
        name: the run's.
        epochs: planned.
        steps: a whole epoch's.
        batch_size: images a step.
        quiet: show nothing but messages.
    """

    def __init__(self, name: str, epochs: int, steps: int, batch_size: int, quiet: bool = False) -> None:
        self._epochs, self._steps, self._batch_size = epochs, steps, batch_size
        self._live = err.is_terminal and not quiet
        self._quiet = quiet
        self._progress = Progress(
            TextColumn(f"[bold]{name}[/]"),
            TextColumn("{task.fields[where]}"),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            console=err,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._last = ""
        self._mark = (time.perf_counter(), 0)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, epochs_done: int) -> None:
        """Start, or go on after ``epochs_done`` epochs."""
        total = self._epochs * self._steps
        self._task = self._progress.add_task(
            "", total=total, completed=epochs_done * self._steps, where="", metrics="starting"
        )

    def step(self, epoch: int, step: int) -> None:
        """Show the step (from 1) of an epoch (from 1), at most every half second, without asking the device."""
        now, count = time.perf_counter(), (epoch - 1) * self._steps + step
        if not self._live or self._task is None or now - self._mark[0] < REFRESH_S:
            return
        speed = (count - self._mark[1]) * self._batch_size / (now - self._mark[0])
        self._mark = (now, count)
        where = f"epoch {epoch}/{self._epochs} step {step}/{self._steps}"
        self._progress.update(self._task, completed=count, where=where, metrics=f"{speed:,.0f} images/s  {self._last}")

    def epoch(self, row: dict[str, Any]) -> None:
        """Show a finished epoch, a row of ``metrics.jsonl``."""
        self._mark = (time.perf_counter(), row["epoch"] * self._steps)
        self._last = f"loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2f}%"
        if "test" in row:
            self._last += "  test " + " ".join(f"{k} {v['accuracy']:.2f}%" for k, v in row["test"].items())
        if "holdout" in row:
            self._last += "  holdout " + " ".join(f"{k} {v['accuracy']:.2f}%" for k, v in row["holdout"].items())
        left_s = row["seconds"] * (self._epochs - row["epoch"])
        if not self._live and not self._quiet:
            err.print(
                f"epoch {row['epoch']}/{self._epochs}  {self._last}  {row['images_per_s']:,.0f} images/s"
                f"  {duration(left_s)} left",
                soft_wrap=True,
            )
        elif self._task is not None:
            self._progress.update(self._task, completed=row["epoch"] * self._steps)

    def say(self, text: str) -> None:
        """Print one line above the display."""
        if not self._quiet:
            err.print(text, soft_wrap=True, markup=False)
