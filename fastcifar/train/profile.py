"""``--profile 10:20``: a torch.profiler trace of some steps of a run."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastcifar.console import say
from fastcifar.data.batch import Batch, Share
from fastcifar.data.loaders import Loader
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train.follower import Follower

MOST_STEPS = 1000
"""A trace of a step is megabytes, and no viewer opens gigabytes."""


def read_steps(text: str) -> tuple[int, int]:
    """Return the first step and the one after the last of ``10:20``, counted from 0 in this process.

    Raises:
        UserError: not of that form, or too many.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isascii() and last.isascii() and first.isdigit() and last.isdigit()):
        raise UserError(f'--profile "{text}": expected FIRST:LAST, such as 10:20 for the ten steps after the tenth')
    steps = int(first[:9]), int(last[:9])
    if not 0 < steps[1] - steps[0] <= MOST_STEPS:
        raise UserError(f'--profile "{text}": between 1 and {MOST_STEPS:,} steps')
    return steps


class ProfiledLoader:
    """A loader that traces the steps taken between handing out two of its batches.

    Args:
        loader: yields the batches.
        steps: the first step to trace, and the one after the last, counted over all epochs of this process.
        out: where the trace goes: Chrome's format, for Perfetto or ``chrome://tracing``.
        done: steps of the first epoch that an earlier process has taken; their batches are handed out, not trained on.
    """

    def __init__(self, loader: Loader, steps: tuple[int, int], out: Path, done: int = 0) -> None:
        self._loader, self._steps, self._out = loader, steps, out
        self._count = -done
        self.name, self.samples, self.reason = loader.name, loader.samples, loader.reason
        self.augmented = loader.augmented
        self._profiler: Any = None

    def __len__(self) -> int:
        return len(self._loader)

    def share(self, batch: int) -> Share | None:
        """Return this rank's place in a batch."""
        return self._loader.share(batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch; the trace begins and ends where one is asked for."""
        for batch in self._loader.epoch(epoch):
            if self._count == self._steps[0]:
                self._begin()
            elif self._count == self._steps[1]:
                self._end()
            self._count += 1
            yield batch

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self._profiler.start()

    def _end(self) -> None:
        if self._profiler is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._out.parent.parent.is_dir():  # else the run was moved away, as its next write says
            self._out.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._out))

    def close(self) -> None:
        """Write the trace of a run that was shorter, or say that there is none, and close the loader."""
        with suppress(RuntimeError):  # a profiler that an error has left half done
            self._end()
        if self._count <= self._steps[0]:
            first, last = self._steps
            taken = max(0, self._count)
            say(f"--profile {first}:{last}: no trace was written, for this process took only {taken} steps")
        self._loader.close()


def profiled(loader: Loader, steps: str | None, run: RunDirectory | Follower) -> Loader:
    """Return the loader with the tracing that ``--profile`` asks for around it, or itself.

    Args:
        loader: yields the batches.
        steps: such as ``10:20``, or None.
        run: the run directory; of several ranks only the first is traced.
    """
    if steps is None or isinstance(run, Follower):
        return loader
    return ProfiledLoader(loader, read_steps(steps), run.folder / "profile" / "trace.json", _steps_done(run))


def _steps_done(run: RunDirectory) -> int:
    """Return how many steps of the epoch at hand a run that was interrupted in it has done: its checkpoint says so."""
    newest = max(run.checkpoints(), default="")
    return int(newest.partition("-step-")[2] or 0)
