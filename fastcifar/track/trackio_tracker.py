"""trackio: a run of the project ``fastcifar``, or of what TRACKIO_PROJECT says, in trackio's local folder."""

import os
import secrets
from typing import Any

from fastcifar.config import Recipe
from fastcifar.run_directory import RunDirectory
from fastcifar.track import Tracker


class Trackio(Tracker):
    """Logs with the epoch as the step; a resumed run goes on under its name."""

    name = "trackio"
    _run: Any = None

    def begin(self, run: RunDirectory, recipe: Recipe, known: str | None, done: int) -> str:
        """Open the run, or go on with it."""
        import trackio

        # trackio finds runs by their names, and folders of two sweeps may have the same.
        name = known or f"{run.folder.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "fastcifar"), name=name, resume="allow" if known else "never",
            config=recipe.model_dump(mode="json"), embed=False,
        )  # fmt: skip
        return name

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Log an epoch."""
        self._run.log(values, step=epoch)

    def end(self, finished: bool) -> None:
        """Write what is left."""
        if self._run is not None:
            self._run.finish()


def make() -> Trackio:
    """Return the tracker."""
    return Trackio()
