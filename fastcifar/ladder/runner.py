"""Execute one row: in a process of its own, which may crash without harm, or in this one, which saves the start."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from fastcifar.config import CombineRecipe, Recipe, to_toml
from fastcifar.errors import UserError
from fastcifar.interrupt import stop_if_requested
from fastcifar.ladder.execute import Deadline, OutOfTime, RowFailed
from fastcifar.ladder.places import Places
from fastcifar.ladder.rows import Job
from fastcifar.ladder.state import DONE, stored_state
from fastcifar.run_directory import AtWorkError, RunDirectory, refuse_disk, write_atomic

POLL_S = 0.2
# A stopped row finishes the checkpoint it is writing; one that does not end by then is killed and loses an epoch.
GRACE_S = 60.0
# How a row failed whose process did not say why.
KILLED, ENDED_WITH = "was killed by", "ended with status"


@dataclass(frozen=True)
class Runner:
    """Executes jobs; callable as the ladder wants it, from as many threads as there are places.

    Attributes:
        out: the ladder's folder; logs go to ``logs/`` in it.
        data: where the images are, as for ``fastcifar run``.
        same_process: train in this process. The deadline then counts between rows only, and a crash ends the ladder.
        places: the threads and the GPU of each process.
    """

    out: Path
    data: Path | None = None
    same_process: bool = False
    places: Places = field(default_factory=Places)

    def __call__(self, job: Job, deadline: Deadline, progress: Callable[[str], None]) -> None:
        """Run, resume or combine; returns when the job is finished.

        Raises:
            RowFailed: the row's process ended with an error; the message is the last line that it wrote.
            OutOfTime: the deadline came first.
            UserError: bad data, members that do not match, a full disk.
        """
        stop_if_requested()
        if isinstance(job.recipe, CombineRecipe):
            return combine(job)
        while True:
            wait_for_worker(job, deadline, progress)
            if stored_state(job) == DONE:
                return None
            # A process that a killed start has left behind may take the lock only now, having imported torch.
            with suppress(AtWorkError):
                return train_here(job, self.data) if self.same_process else self._train_apart(job, deadline, progress)

    def _train_apart(self, job: Job, deadline: Deadline, progress: Callable[[str], None]) -> None:
        """Train or resume a row in a process of its own.

        Raises:
            AtWorkError: another process has the lock of its run.
            RowFailed, OutOfTime: as the call itself does.
        """
        log = self.out / "logs" / f"{job.row.replace('/', '-')}-seed-{job.seed}.log"
        with self.places.place() as share, new_log(log) as file:
            # In a session of its own: Ctrl-C in a terminal reaches this process alone, which then asks it to stop.
            process = subprocess.Popen(
                self._command(job), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env=os.environ | share,
            )
            try:
                watch(lambda: process.poll() is None, job, deadline, progress)
            finally:
                stop(process)
        if process.returncode < 0:  # whatever the log says last, it does not say that
            raise RowFailed(f"{KILLED} {signal.Signals(-process.returncode).name}; see {log}")
        if process.returncode:
            worker = RunDirectory(job.folder).process_at_work()
            if worker and worker.isdecimal() and worker != str(process.pid):  # not what this one has left of itself
                raise AtWorkError(f"{job.folder}: process {worker} is at work on this run")
            raise RowFailed(last_line(log) or f"{ENDED_WITH} {process.returncode}; see {log}")

    def _command(self, job: Job) -> list[str]:
        """Return the command line that starts or resumes; a recipe travels as a file, so that this very one is run."""
        data = ["--data", str(self.data)] if self.data else []
        command = [sys.executable, "-m", "fastcifar", "run", "--quiet", *data]
        if RunDirectory.exists(job.folder):
            return [*command, "--resume", str(job.folder)]
        recipe = self.out / "logs" / f"{job.row.replace('/', '-')}-seed-{job.seed}.toml"
        write_atomic(recipe, to_toml(job.recipe))
        return [*command, str(recipe), "--out", str(job.folder)]


def wait_for_worker(job: Job, deadline: Deadline, progress: Callable[[str], None]) -> None:
    """Wait for the end of a process that is at work on the row's run, and report its epochs.

    A ladder, or a sweep, that was killed leaves the processes of its rows behind. They train on, and lose nothing.

    Raises:
        OutOfTime: the deadline came first.
        Interrupted: a signal came.
    """
    from fastcifar.console import say

    run = RunDirectory(job.folder)
    if worker := run.process_at_work():
        say(f"{job.folder}: process {worker}, of an earlier start, is at work on this run; waiting for its end")
        watch(lambda: run.process_at_work() is not None, job, deadline, progress)


def watch(
    at_work: Callable[[], bool], job: Job, deadline: Deadline, progress: Callable[[str], None]
) -> None:
    """Wait for the end of a row's process and report its epochs.

    Args:
        at_work: whether the process still is.
        job: the row.
        deadline: when to stop waiting.
        progress: told of each new epoch.

    Raises:
        OutOfTime: the deadline came first.
        Interrupted: a signal came.
    """
    said = ""
    while at_work():
        stop_if_requested()
        text = epochs_in_words(job)
        if text != said:
            said = text
            progress(text)
        if deadline.over:
            raise OutOfTime
        time.sleep(POLL_S)


def epochs_in_words(job: Job) -> str:
    """Return ``seed 42, epoch 3/20, 55.10%`` from what the row has recorded so far."""
    assert isinstance(job.recipe, Recipe)
    rows = RunDirectory(job.folder).metrics()
    tests = [row["test"] for row in rows if "test" in row]
    accuracy = f", {list(tests[-1].values())[-1]['accuracy']:.2f}%" if tests else ""
    return f"seed {job.seed}, epoch {len(rows)}/{job.recipe.train.epochs}{accuracy}"


def stop(process: "subprocess.Popen[Any]", grace_s: float | None = None) -> None:
    """End a process that leads a group, such as a row's, and what it has started: ask, wait, kill the group's rest.

    Args:
        process: the group's leader.
        grace_s: how long to wait; None for what a training gets.
    """
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(GRACE_S if grace_s is None else grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def new_log(log: Path) -> TextIO:
    """Return a new log, open for writing.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("w")
    except OSError as error:
        refuse_disk(log, error)


def last_line(log: Path) -> str:
    """Return the last line that is not empty, without the command's own prefix; nothing where the log is gone."""
    text = ""
    with suppress(OSError):
        text = log.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("fastcifar: ") if lines else ""


def train_here(job: Job, data: Path | None) -> None:
    """Train or resume a row in this process.

    Raises:
        RowFailed: anything went wrong inside.
        UserError: as `fastcifar.train.run.train` does.
    """
    from fastcifar.open_run import open_run
    from fastcifar.train.run import train

    assert isinstance(job.recipe, Recipe)
    begun = RunDirectory.exists(job.folder)
    opened = open_run(None, None, str(job.folder)) if begun else open_run(job.recipe, job.folder, None)
    with row_failures(), opened as run:
        train(job.recipe, run, data=data, quiet=True)


@contextmanager
def row_failures() -> Iterator[None]:
    """Let whatever goes wrong within the block be the row's failure: a `RowFailed`, or the `UserError` that it is."""
    try:
        yield
    except (RowFailed, UserError):
        raise
    except Exception as error:
        raise RowFailed(f"{type(error).__name__}: {error}") from error


# Combinations are computed in this process, whose number of threads and random generators they would share.
_COMBINING = threading.Lock()


def combine(job: Job) -> None:
    """Combine the members' saved logits; the summary names the ladder's seed, which the members have.

    Raises:
        UserError: as `fastcifar.analysis.combine.run_combine` does.
    """
    from fastcifar.analysis.combine import run_combine

    assert isinstance(job.recipe, CombineRecipe)
    members = {name: RunDirectory.open(folder) for name, folder in job.members.items()}
    with _COMBINING:
        run_combine(job.recipe, members, job.folder, seed=job.seed)
