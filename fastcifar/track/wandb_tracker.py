"""Weights & Biases: a run of the project ``fastcifar``, or of what WANDB_PROJECT and its other variables say.

``WANDB_MODE=offline`` writes into the run's ``track/`` for a later ``wandb sync``.
"""

import os
from typing import Any

from fastcifar.config import Recipe
from fastcifar.run_directory import RunDirectory
from fastcifar.track import Tracker


class WeightsAndBiases(Tracker):
    """Logs with the epoch as the step; a resumed run goes on under its id."""

    name = "wandb"
    _run: Any = None

    def begin(self, run: RunDirectory, recipe: Recipe, known: str | None, done: int) -> str:
        """Open the run, or go on with it."""
        import wandb

        folder = run.folder / "track"
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastcifar"), name=run.folder.name, id=known, resume="allow",
            config=recipe.model_dump(mode="json"), dir=str(folder),
        )  # fmt: skip
        return str(self._run.id)

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Log an epoch."""
        self._run.log(values, step=epoch)

    def end(self, finished: bool) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish(exit_code=0)


def make() -> WeightsAndBiases:
    """Return the tracker."""
    return WeightsAndBiases()
