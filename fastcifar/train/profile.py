"""``--profile 10:20``: a torch.profiler trace of some steps of a run."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

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
    """

    def __init__(self, loader: Loader, steps: tuple[int, int], out: Path) -> None:
        self._loader, self._steps, self._out, self._count = loader, steps, out, 0
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
        self._profiler.stop()
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._out))
        self._profiler = None

    def close(self) -> None:
        """Write the trace of a run that was shorter, and close the loader."""
        with suppress(RuntimeError):  # a profiler that an error has left half done
            self._end()
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
    return ProfiledLoader(loader, read_steps(steps), run.folder / "profile" / "trace.json")
