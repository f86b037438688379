"""Execute the ladder: run what is missing, resume what was cut, go past what fails, and keep the table up to date."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

from fastcifar.errors import UserError
from fastcifar.ladder.rows import Job, found_in
from fastcifar.ladder.state import BLOCKED, DONE, FAILED, RUNNING, Ledger, Note, Row, content, stored_state
from fastcifar.locks import LockedError, locked
from fastcifar.run_directory import write_json


class RowFailed(Exception):
    """A row could not be executed; the message says why. The rest of the ladder goes on."""


class OutOfTime(Exception):
    """The time that ``--until`` gave is over; the row was stopped and can be resumed."""


@dataclass
class Deadline:
    """When rows are to stop, in terms of ``time.monotonic``; None for never. All rows of an execution share one.

    Attributes:
        at: that moment.
    """

    at: float | None = None

    @classmethod
    def after(cls, seconds: float | None) -> "Deadline":
        """Return the deadline so many seconds from now, or none."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def over(self) -> bool:
        """Whether it has passed."""
        return self.at is not None and time.monotonic() >= self.at

    def end_now(self) -> None:
        """Stop everything that looks at it, with a checkpoint."""
        self.at = time.monotonic()


# Executes a job until it is finished, or stops it at the deadline. Rows side by side call it from several threads.
RunRow = Callable[[Job, Deadline, Callable[[str], None]], None]


class View(Protocol):
    """What shows the table while the ladder is executed."""

    def update(self, rows: Sequence[Row]) -> None:
        """Take in a changed table."""

    def say(self, text: str) -> None:
        """Tell of an event."""


class LadderExecution:
    """One execution of the ladder: what is missing runs, what was cut is resumed, what fails is passed over.

    Args:
        ledger: the jobs, in the order to run them.
        run_row: executes one job; raises `RowFailed`, `UserError` or `OutOfTime`.
        out: where ``ladder.json`` and ``ladder.html`` go.
        view: what to show progress on.
        until_s: stop after so many seconds; None for no limit.
        jobs: how many to execute side by side.
    """

    def __init__(
        self, ledger: Ledger, run_row: RunRow, out: Path, view: View, until_s: float | None = None, jobs: int = 1
    ) -> None:
        self.ledger, self.run_row, self.out, self.view, self.jobs = ledger, run_row, out, view, jobs
        self.others = found_in(out)
        self.deadline = Deadline.after(until_s)
        self._one_at_a_time = threading.RLock()  # whoever changes the table, or writes it to the disk or the terminal

    def execute(self) -> None:
        """Run every job that is not done. Whatever ends it, the table on disk is that of the run directories."""
        with alone_in(self.out):  # else another one's table would be written over
            try:
                with places_for(self.jobs) as places:
                    self._execute_all(places)
            except OutOfTime:
                self.view.say("the time is over; the same command goes on from here")
            finally:
                self._publish()

    def _execute_all(self, places: Executor) -> None:
        """Start each job as soon as its members have ended and a place is free, the first of the ladder first.

        Raises:
            OutOfTime, Interrupted: of whichever job said so first; the others have been told to stop as well.
        """
        jobs = {job.folder: job for job in self.ledger.jobs}
        numbers = {folder: number for number, folder in enumerate(jobs)}
        order = TopologicalSorter({folder: job.members.values() for folder, job in jobs.items()})
        order.prepare()
        ready: list[Path] = []
        running: dict[Future[None], Path] = {}
        try:
            while order.is_active():
                ready = sorted([*ready, *order.get_ready()], key=numbers.__getitem__)
                while ready and len(running) < self.jobs:
                    folder = ready.pop(0)
                    running[places.submit(self._take, jobs[folder])] = folder
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    order.done(running.pop(future))
        except BaseException:
            self.deadline.end_now()  # for those in the other places, whose end the executor waits for
            raise

    def _take(self, job: Job) -> None:
        """Execute one job unless it is done or cannot be."""
        try:
            if stored_state(job) == DONE:
                return
        except UserError as error:
            return self._fail(job, str(error))
        missing = [name for name, folder in job.members.items() if not self.ledger.is_done(folder)]
        if missing:
            self.ledger.notes[job.folder] = Note(BLOCKED, f"needs {', '.join(missing)}")
            return None
        if self.deadline.over:
            raise OutOfTime
        return self._run(job)

    def _run(self, job: Job) -> None:
        self._note(job, "")
        self._publish()
        try:
            self.run_row(job, self.deadline, lambda text: self._note(job, text))
        except (RowFailed, UserError) as error:
            return self._fail(job, str(error))
        finally:
            if self.ledger.notes[job.folder].state == RUNNING:
                del self.ledger.notes[job.folder]
        if stored_state(job) != DONE:
            return self._fail(job, "ended without a result")
        return self._publish(f"{job.row}, seed {job.seed}: done")

    def _note(self, job: Job, text: str) -> None:
        """Remember how far the running job is, and show it."""
        with self._one_at_a_time:
            self.ledger.notes[job.folder] = Note(RUNNING, text)
            self.view.update(self.ledger.table())

    def _fail(self, job: Job, message: str) -> None:
        self.ledger.notes[job.folder] = Note(FAILED, message)
        self._publish(f"{job.row}, seed {job.seed}: failed: {message}")

    def _publish(self, event: str = "") -> None:
        """Write ``ladder.json`` and ``ladder.html``, with the rows and seeds of earlier times, and show the table.

        Args:
            event: what to say of it on a line of its own.
        """
        from fastcifar.ladder.page import write_html

        with self._one_at_a_time:
            rows = self.ledger.table(self.others)
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "ladder.json", content(rows))
            write_html(self.out / "ladder.html", rows)
            self.view.update(self.ledger.table())
            if event:
                self.view.say(event)


class InThisThread(Executor):
    """Executes what it is given at once, in the thread that gives it: where signals arrive and training may run."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> "Future[Any]":
        """Return a future that has its result, or its exception, already."""
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **named))
        except BaseException as error:
            future.set_exception(error)
        return future


def places_for(jobs: int) -> Executor:
    """Return the executor of so many jobs side by side; leaving its ``with`` block waits for all of them."""
    return InThisThread() if jobs == 1 else ThreadPoolExecutor(jobs, thread_name_prefix="row")


@contextmanager
def alone_in(folder: Path, command: str = "ladder") -> Iterator[None]:
    """Make sure that no other ladder, or sweep, works in the folder at the same time.

    Raises:
        UserError: one does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except LockedError:
            raise UserError(f"{folder}: another `fastcifar {command}` is at work there; choose another --out") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --out") from None
        yield
