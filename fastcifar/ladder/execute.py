"""Execute the ladder: run what is missing, resume what was cut, go past what fails, and keep the table up to date."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from fastcifar.errors import UserError
from fastcifar.ladder.rows import Job, found_in
from fastcifar.ladder.state import BLOCKED, DONE, FAILED, RUNNING, Ledger, Note, Row, content, stored_state
from fastcifar.locks import LockedError, locked
from fastcifar.run_directory import write_json


class RowFailed(Exception):
    """A row could not be executed; the message says why. The rest of the ladder goes on."""


class OutOfTime(Exception):
    """The time that ``--until`` gave is over; the row was stopped and can be resumed."""


# Executes a job until it is finished, or stops it at the deadline (in terms of ``time.monotonic``).
RunRow = Callable[[Job, float | None, Callable[[str], None]], None]


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
    """

    def __init__(
        self, ledger: Ledger, run_row: RunRow, out: Path, view: View, until_s: float | None = None
    ) -> None:
        self.ledger, self.run_row, self.out, self.view = ledger, run_row, out, view
        self.others = found_in(out)
        self.deadline = None if until_s is None else time.monotonic() + until_s

    def execute(self) -> None:
        """Run every job that is not done. Whatever ends it, the table on disk is that of the run directories."""
        try:
            with alone_in(self.out):
                for job in self.ledger.jobs:
                    self._take(job)
        except OutOfTime:
            self.view.say("the time is over; the same command goes on from here")
        finally:
            self._publish()

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
        if self.deadline is not None and time.monotonic() >= self.deadline:
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
        self._publish()
        return self.view.say(f"{job.row}, seed {job.seed}: done")

    def _note(self, job: Job, text: str) -> None:
        """Remember how far the running job is, and show it."""
        self.ledger.notes[job.folder] = Note(RUNNING, text)
        self.view.update(self.ledger.table())

    def _fail(self, job: Job, message: str) -> None:
        self.ledger.notes[job.folder] = Note(FAILED, message)
        self._publish()
        self.view.say(f"{job.row}, seed {job.seed}: failed: {message}")

    def _publish(self) -> None:
        """Write ``ladder.json`` and ``ladder.html``, with the rows and seeds of earlier times, and show the table."""
        from fastcifar.ladder.page import write_html

        rows = self.ledger.table(self.others)
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "ladder.json", content(rows))
        write_html(self.out / "ladder.html", rows)
        self.view.update(self.ledger.table())


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make sure that no other ladder works in the folder at the same time.

    Raises:
        UserError: one does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except LockedError:
            raise UserError(f"{folder}: another `fastcifar ladder` is at work there; choose another --out") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --out") from None
        yield
