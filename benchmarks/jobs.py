"""Seconds for six seeds of LeNet-5 by ``fastcifar ladder``, one after the other and two side by side.

The same runs as ``fastcifar ladder --only lenet5 --seeds 6 --jobs N``, of three epochs each instead of twenty: a
process for each seed, the cores divided among those that run at once. The start of Python, imports, reading the data
and evaluation count. Without CIFAR-10 (``FASTCIFAR_DATA`` or ``./data``) the synthetic images are used.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Row, alternate, main, result
from fastcifar.config import load_recipe
from fastcifar.errors import UserError
from fastcifar.ladder.execute import LadderExecution
from fastcifar.ladder.places import Places
from fastcifar.ladder.rows import Job, jobs_for
from fastcifar.ladder.runner import Runner
from fastcifar.ladder.state import DONE, Ledger
from seeds import source_of

SEEDS, EPOCHS, ROUNDS, SIDE_BY_SIDE = 6, 3, 3, 2


class Nothing:
    """Shows nothing while the ladder is executed."""

    def update(self, rows: Sequence[Any]) -> None:
        """Take the table."""

    def say(self, text: str) -> None:
        """Take an event."""


def shortened(out: Path, quick: bool) -> list[Job]:
    """Return the ladder's jobs for the seeds, of fewer epochs."""
    row, seeds = ("smoke/lenet5", 2) if quick else ("lenet5", SEEDS)
    changes = [f"data.source={source_of(quick)}", f"train.epochs={1 if quick else EPOCHS}"]
    return [
        replace(job, recipe=load_recipe(row, [*changes, f"seed={job.seed}"])) for job in jobs_for([row], seeds, out)
    ]


def seconds_of(jobs: int, quick: bool) -> float:
    """Execute the ladder in a folder that is thrown away and return the seconds.

    Raises:
        UserError: a run failed.
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        ledger = Ledger(shortened(out, quick))
        begin = time.perf_counter()
        LadderExecution(ledger, Runner(out, places=Places(jobs)), out, Nothing(), jobs=jobs).execute()
        seconds = time.perf_counter() - begin
        failed = [row.message for row in ledger.table() if row.state != DONE]
        if failed:
            raise UserError(f"the ladder did not end well: {failed[0]}")
    return seconds


def run(quick: bool) -> list[Row]:
    """Return the seconds of both ways, and how much faster the second is."""
    what = f"ladder, {2 if quick else SEEDS} seeds of LeNet-5, {1 if quick else EPOCHS} epochs"
    names = {jobs: f"{what}, --jobs {jobs}" for jobs in (1, SIDE_BY_SIDE)}
    sides = {name: lambda jobs=jobs: seconds_of(jobs, quick) for jobs, name in names.items()}
    measures = alternate(sides, 1 if quick else ROUNDS, warmup=0)
    one, two = names[1], names[SIDE_BY_SIDE]
    return [
        result(one, measures[one], "s", higher_is_better=False),
        result(two, measures[two], "s", one, measures[one], higher_is_better=False),
    ]


if __name__ == "__main__":
    main("jobs", run)
