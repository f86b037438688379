"""Several runs side by side in one process, on one device: they take turns, a step each.

Each run is what it would be alone, to the bit: a step computes the same whatever other runs do between two of them,
because what torch has only once for a process each run has for itself (`Own`). On a GPU a turn only puts a captured
graph on the run's own stream and does not wait for it, so that the device works on several runs at once: small models
leave most of it idle. The images are there once (`fastcifar.data.shared`).
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastcifar.config.schema import Recipe
from fastcifar.console import err
from fastcifar.device import pick_device
from fastcifar.errors import UserError
from fastcifar.interrupt import Interrupted
from fastcifar.run_directory import RunDirectory
from fastcifar.train.run import training

MOST = 32
"""So many streams torch has; one more run would wait for the first."""


class Own:
    """What torch has once for a process: the generators of random numbers and, on a GPU, the current stream."""

    def __init__(self, device: torch.device):
        self._host = torch.get_rng_state()
        self._default: Any = None
        if device.type == "cuda":
            torch.cuda.init()
            self._stream = torch.cuda.Stream(device)
            self._default = torch.cuda.default_generators[self._stream.device_index]
            self._generator = self._default.clone_state()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let this be what torch uses in the block; afterwards it is what it has become, and the others' are back."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._host)
        try:
            with nullcontext() if self._default is None else self._on_stream():
                yield
        finally:
            self._host = torch.get_rng_state()
            torch.set_rng_state(before)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        # The state itself, not its values: a captured graph reads the seed and the offset in the memory of the state
        # that it was captured with, which another run's replay must not write to.
        before = self._default.graphsafe_get_state()
        self._default.graphsafe_set_state(self._generator)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._default.graphsafe_set_state(before)


class Lane:
    """One of the runs, which goes on by one step when it is its turn.

    Attributes:
        run: its directory.
        summary: what came of it; None before its end, or where it failed.
        error: why it failed, or the signal that stopped it; None where nothing has.
    """

    def __init__(self, run: RunDirectory, steps: Generator[None, None, dict[str, Any]], own: Own):
        self.run, self._steps, self._own = run, steps, own
        self.summary: dict[str, Any] | None = None
        self.error: UserError | Interrupted | None = None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return recipe_of(self.run).seed

    def begin(self) -> None:
        """Prepare everything, up to the first step.

        Raises:
            UserError: as `fastcifar.train.run.train`.
        """
        with self._own.in_use():
            next(self._steps)

    def go_on(self) -> bool:
        """Take a step, with what is due after it; tell whether more are to come."""
        try:
            with self._own.in_use():
                next(self._steps)
            return True
        except StopIteration as end:
            self.summary = end.value
        except Interrupted as stopped:
            self.error = stopped
        except UserError as error:
            self.error = error
            err.print(f"seed {self.seed}: {error}", soft_wrap=True)
        return False

    def close(self) -> None:
        """Leave it where it is."""
        with self._own.in_use():
            self._steps.close()


def train_together(
    runs: Sequence[RunDirectory], *, data: Path | None = None, stop_after: int | None = None, quiet: bool = False
) -> list[Lane]:
    """Train what is left of several runs that differ by their seeds; a run that fails leaves the others going.

    Args:
        runs: their directories, at most `MOST`.
        data: where the images are, before every other place.
        stop_after: end after this many of the planned epochs; the runs can be resumed.
        quiet: show no progress.

    Returns:
        The runs, each with its summary or its error.

    Raises:
        UserError: one of them cannot begin; none of them has trained then.
        Interrupted: a signal came; each has a checkpoint.
    """
    device = pick_device(recipe_of(runs[0]).engine)
    owned = [Own(device) for _ in runs]  # all at once: torch hands out its streams in turn
    lanes = [
        Lane(run, training(recipe_of(run), run, data=data, stop_after=stop_after, quiet=quiet, together=len(runs)), own)
        for run, own in zip(runs, owned, strict=True)
    ]
    try:
        for lane in lanes:
            lane.begin()
        going = lanes
        while going:
            going = [lane for lane in going if lane.go_on()]
    finally:
        for lane in lanes:
            lane.close()
    for lane in lanes:
        if isinstance(lane.error, Interrupted):
            raise lane.error
    return lanes


def recipe_of(run: RunDirectory) -> Recipe:
    """Return a run's recipe."""
    recipe = run.recipe
    assert isinstance(recipe, Recipe)
    return recipe
