"""What a person sees of a run: one line per epoch, and in a terminal a live bar below them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastcifar.console import err, progress_bar
from fastcifar.text import duration

REFRESH_S = 0.5
BAR_WIDTH = 40
WARM_UP = "warming up"
BESIDE_BAR = 66
"""Columns that the live line's words need beside the bar: epoch, images/s, accuracy, time left."""


def tell(text: str) -> None:
    """Say what a cold start is busy with, before there is a display."""
    err.print(text, soft_wrap=True, markup=False, style="dim")


class Steps:
    """Told of a conversion's steps, says each kind of step once."""

    def __init__(self, quiet: bool = False) -> None:
        self._said: set[str] = set()
        self._quiet = quiet

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note of a step; ``done`` of ``total`` are over."""
        if what not in self._said and not self._quiet:
            tell(f"converting the data: {what}")
        self._said.add(what)


@contextmanager
def conversion_steps(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what a conversion tells of its steps: a bar in a terminal, else a line for each kind of step."""
    if quiet or not err.is_terminal:
        yield Steps(quiet)
        return
    with progress_bar("converting the data: ") as show:
        yield show


class Display:
    """Shows epoch, step, loss, accuracy, images/s and the time left.

    Args:
        name: the run's.
        epochs: planned.
        steps: a whole epoch's.
        batch_size: images a step.
        quiet: show nothing but messages.
        console: where to; stderr by default.
        label: before each line, where several runs share the terminal; there is no live line then.
    """

    def __init__(
        self, name: str, epochs: int, steps: int, batch_size: int, quiet: bool = False, console: Console = err,
        label: str | None = None,
    ) -> None:
        self._epochs, self._steps, self._batch_size = epochs, steps, batch_size
        self._console, self._live, self._quiet = console, console.is_terminal and not quiet and label is None, quiet
        self._before = "" if label is None else f"{label}: "
        # The name stands in the first line; at 80 columns the bar, the accuracy and the time left need the room.
        self._progress = Progress(
            TextColumn("{task.fields[where]}", markup=False),
            BarColumn(bar_width=max(10, min(BAR_WIDTH, console.width - BESIDE_BAR))),
            TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._accuracy = ""
        self._mark: tuple[float, int] | None = None
        self._epoch_at: float | None = None
        self._epoch_s: float | None = None

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, epochs_done: int) -> None:
        """Start, or go on after ``epochs_done`` epochs; until the first step the live line says what is waited for."""
        total, done = self._epochs * self._steps, epochs_done * self._steps
        where = f"epoch {epochs_done + 1}/{self._epochs}"
        self._task = self._progress.add_task("", total=total, completed=done, where=where, metrics=WARM_UP, left="")

    def step(self, epoch: int, step: int) -> None:
        """Show the step (from 1) of an epoch (from 1), at most every half second, without asking the device.

        The first call starts the measurement of speed: what came before it was compilation and warm-up.
        """
        now, count = time.perf_counter(), (epoch - 1) * self._steps + step
        if self._mark is None:
            self._mark = (now, count)
        if not self._live or self._task is None or now - self._mark[0] < REFRESH_S:
            return
        steps_per_s = (count - self._mark[1]) / (now - self._mark[0])
        self._mark = (now, count)
        speed = f"{steps_per_s * self._batch_size:,.0f} images/s"
        epoch_s = self._epoch_s if self._epoch_s is not None else self._steps / steps_per_s
        left = self._left(epoch_s, self._epochs - count / self._steps)
        metrics = f"{speed} {self._accuracy}".rstrip()
        self._progress.update(
            self._task, completed=count, where=f"epoch {epoch}/{self._epochs}", metrics=metrics, left=left
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch, a row of ``metrics.jsonl``; in a terminal the bar goes on below it."""
        epoch_s = self._measure_epoch(row)
        self._mark = (time.perf_counter(), row["epoch"] * self._steps)
        left = self._left(epoch_s, self._epochs - row["epoch"])
        if not self._quiet:
            words = f"epoch {row['epoch']}/{self._epochs}  {metrics_in_words(row)}  {row['images_per_s']:,.0f} images/s"
            self.say(f"{words}  {left}".rstrip())
        if self._task is not None:
            self._accuracy = accuracy_in_words(row)
            # The speed of the last refresh would be stale: accuracy and time left are what changes here.
            self._progress.update(self._task, completed=row["epoch"] * self._steps, metrics=self._accuracy, left=left)

    def say(self, text: str) -> None:
        """Print one line above the display."""
        if not self._quiet:
            self._console.print(self._before + text, soft_wrap=True, markup=False)

    def _measure_epoch(self, row: dict[str, Any]) -> float | None:
        """Return the seconds an epoch takes from here on, None where that is not known yet.

        A process's first epoch holds compilation and warm-up, so it counts by its images/s, which leave them out; each
        later one counts as it took, evaluation included.
        """
        now = time.perf_counter()
        if self._epoch_at is not None:
            self._epoch_s = now - self._epoch_at
        elif row["images_per_s"] > 0:
            self._epoch_s = row["images"] / row["images_per_s"]
        self._epoch_at = now
        return self._epoch_s

    @staticmethod
    def _left(epoch_s: float | None, epochs: float) -> str:
        return "" if epoch_s is None else f"{duration(epoch_s * epochs)} left"


def metrics_in_words(row: dict[str, Any]) -> str:
    """Return a row's loss and accuracies, in percent."""
    words = f"loss {row['train_loss']:.4f}  train {row['train_accuracy']:.2f}%"
    for split in ("test", "holdout"):
        if split in row:
            words += f"  {split} " + " ".join(f"{k} {v['accuracy']:.2f}%" for k, v in row[split].items())
    return words


def accuracy_in_words(row: dict[str, Any]) -> str:
    """Return the accuracy that fits the live line: on the test set, of the best kind of weights; else in training."""
    if "test" in row:
        return f"test {max(entry['accuracy'] for entry in row['test'].values()):.2f}%"
    return f"train {row['train_accuracy']:.2f}%"
