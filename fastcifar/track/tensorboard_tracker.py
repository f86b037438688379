"""TensorBoard: event files in the run's own ``tensorboard/``; ``tensorboard --logdir runs`` shows all runs."""

import warnings
from typing import Any

from fastcifar.config import Recipe, to_toml
from fastcifar.run_directory import RunDirectory
from fastcifar.track import Tracker


class TensorBoard(Tracker):
    """Writes scalars, float32, and the recipe as text."""

    name = "tensorboard"
    _writer: Any = None

    def begin(self, run: RunDirectory, recipe: Recipe, known: str | None, done: int) -> str:
        """Open a new event file; what earlier files have of epochs after ``done`` is void."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it imports about each other
            from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if known else None)
        if known is None:
            self._writer.add_text("recipe", f"```toml\n{to_toml(recipe)}```", 0)
        return "tensorboard"

    def log(self, values: dict[str, float], epoch: int) -> None:
        """Write an epoch's scalars and flush them."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def end(self, finished: bool) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def make() -> TensorBoard:
    """Return the tracker."""
    return TensorBoard()
