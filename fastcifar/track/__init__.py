"""Callbacks of a run, and the trackers that are made of them: TensorBoard, Weights & Biases, MLflow, trackio.

Nothing here is called within a step. What a tracker gets are the lines of ``metrics.jsonl`` under the same keys, those
of nested tables joined by slashes (``test/ema/accuracy``), with the epoch as their step.
"""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fastcifar.config import Recipe
from fastcifar.console import err
from fastcifar.errors import UserError, root_cause
from fastcifar.locations import install_command
from fastcifar.run_directory import RunDirectory, write_json
from fastcifar.run_records import flat_metrics

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""The module that a tracker needs; the extra that installs it has the tracker's own name."""


class Callback:
    """What a run calls; override what you need. It is told after the fact: nothing that it does changes the run.

    An error in a callback ends the run, with the epochs so far on disk.
    """

    def on_run_begin(self, run: RunDirectory, recipe: Recipe) -> None:
        """A run begins or goes on: ``run.metrics()`` has the epochs before, if there are any."""

    def on_epoch_end(self, run: RunDirectory, row: dict[str, Any]) -> None:
        """An epoch is over, evaluated and on disk; ``row`` is its line of ``metrics.jsonl``."""

    def on_run_end(self, run: RunDirectory, summary: dict[str, Any] | None) -> None:
        """The run is over or stops here; ``summary`` is None where an error or a signal ended it."""


class Tracker(Callback):
    """Hands a run's metrics to a program elsewhere, each epoch once, also over resumed and killed runs.

    ``track/NAME.json`` in the run directory says under which id the program knows the run and which epoch it has got
    last; a process that is killed between handing an epoch over and writing this hands the same one over again. A
    failure of the program, such as a lost connection, is said once and does not end the training.

    Attributes:
        name: as a recipe writes it.
    """

    name = ""

    def __init__(self) -> None:
        self._done, self._failed = 0, False

    def begin(self, run: RunDirectory, recipe: Recipe, known: str | None, done: int) -> str:
        """Open the run in the program.

        Args:
            run: the run directory.
            recipe: its recipe.
            known: the id that an earlier call returned, or None.
            done: the last epoch that the program has got.

        Returns:
            The id under which a resumed run is found again.
        """
        raise NotImplementedError

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Hand over an epoch's metrics."""
        raise NotImplementedError

    def end(self, finished: bool) -> None:
        """Close the run in the program."""
        raise NotImplementedError

    def on_run_begin(self, run: RunDirectory, recipe: Recipe) -> None:
        """Open the run and hand over the epochs that it has not got yet."""
        self._try(lambda: self._begin(run, recipe))

    def _begin(self, run: RunDirectory, recipe: Recipe) -> None:
        state, rows = self._read(run), run.metrics()
        self._done = min(int(state.get("epoch", 0)), len(rows))
        self._id = self.begin(run, recipe, state.get("id"), self._done)
        for row in rows[self._done :]:
            self.log(flat_metrics(row), row["epoch"])
            self._done = row["epoch"]
        self._write(run)

    def on_epoch_end(self, run: RunDirectory, row: dict[str, Any]) -> None:
        """Hand over an epoch."""
        self._try(lambda: self._log(run, row))

    def _log(self, run: RunDirectory, row: dict[str, Any]) -> None:
        self.log(flat_metrics(row), row["epoch"])
        self._done = row["epoch"]
        self._write(run)

    def on_run_end(self, run: RunDirectory, summary: dict[str, Any] | None) -> None:
        """Close the run."""
        self._try(lambda: self.end(summary is not None and summary["status"] == "finished"))

    def _try(self, do: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            do()
        except Exception as error:
            self._failed = True
            err.print(f"track: {self.name}: {root_cause(error)}; training goes on without it", soft_wrap=True)

    def _read(self, run: RunDirectory) -> dict[str, Any]:
        path = run.folder / "track" / f"{self.name}.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, run: RunDirectory) -> None:
        folder = run.folder / "track"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{self.name}.json", {"id": self._id, "epoch": self._done})


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UserError: it names the extra.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise UserError(f'track: "{name}" is not installed; install it with `{install_command(name)}`')


def make_trackers(names: Sequence[str]) -> list[Callback]:
    """Return the trackers of a recipe's ``track``.

    Raises:
        UserError: the package of one is not installed.
    """
    check_trackers(names)
    return [import_module(f"fastcifar.track.{name}_tracker").make() for name in dict.fromkeys(names)]


class Callbacks:
    """All of a run's callbacks, as one; without a run there are none."""

    def __init__(self, run: RunDirectory | None, callbacks: Sequence[Callback]) -> None:
        self._calls = [] if run is None else [(callback, run) for callback in callbacks]
        self._summary: dict[str, Any] | None = None

    def begin(self, recipe: Recipe) -> None:
        """Tell them that the run begins or goes on."""
        for callback, run in self._calls:
            callback.on_run_begin(run, recipe)

    def epoch(self, row: dict[str, Any]) -> None:
        """Tell them of an epoch that is over."""
        for callback, run in self._calls:
            callback.on_epoch_end(run, row)

    def summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Keep the summary for `close` and return it."""
        self._summary = summary
        return summary

    def close(self) -> None:
        """Tell them that the run is over, whatever ended it."""
        for callback, run in self._calls:
            callback.on_run_end(run, self._summary)
