"""The count behind `make storm`: how many inputs were tried, refused with a clear message, survived, or failed."""

import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastcifar.errors import UserError

LIMIT_S = 30
KEPT_FAILURES = 20


class Hang(BaseException):
    """One input took longer than `LIMIT_S`; a BaseException, so that no `except Exception` on the way swallows it."""


@dataclass
class Tally:
    """What became of the inputs of one subject.

    Attributes:
        subject: the row's name, such as ``recipes``.
        refused: inputs that were answered with a `UserError`, as bad input should be.
        survived: inputs that were taken, with everything as it should be afterwards.
        failed: everything else: another exception, a hang, a wrong result.
        failures: what failed, the first `KEPT_FAILURES` in words.
        reached: how often something worth knowing happened, such as a signal that was answered; see `note`.
    """

    subject: str
    refused: int = 0
    survived: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """How many inputs there were."""
        return self.refused + self.survived + self.failed

    def check(self, what: str, action: Callable[[], Any], limit_s: int = LIMIT_S) -> None:
        """Execute one action and count what became of it.

        Args:
            what: the input in words, for the list of failures (its seed, say).
            action: raises `UserError` where it refuses its input, and anything else where something is wrong.
            limit_s: after this many seconds it counts as a hang; main thread only.
        """
        previous = signal.signal(signal.SIGALRM, _hang)
        signal.alarm(limit_s)
        try:
            action()
        except UserError:
            self.refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.fail(f"{what}: {_in_words(error)}")
        else:
            self.survived += 1
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    def fail(self, what: str) -> None:
        """Count one failure that was found in another way than by `check`."""
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(what)
            print(f"{self.subject}: {what}", file=sys.stderr, flush=True)

    def note(self, what: str, times: int = 1) -> None:
        """Count that something happened, to show that the storm reached what it is meant to reach."""
        self.reached[what] = self.reached.get(what, 0) + times


def _hang(number: int, frame: Any) -> None:
    raise Hang(f"no end within the limit, at {frame.f_code.co_filename}:{frame.f_lineno}")


def _in_words(error: BaseException) -> str:
    """Return an exception's type, message and innermost place, in one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:300]!r} at {place.filename}:{place.lineno}"


def table(tallies: list[Tally]) -> str:
    """Return the table of all subjects as aligned text, valid as Markdown."""
    rows = [["subject", "tried", "refused", "survived", "failed"]]
    rows += [[t.subject, *(f"{n:,}" for n in (t.tried, t.refused, t.survived, t.failed))] for t in tallies]
    return aligned(rows, numbers=range(1, 5))


def aligned(rows: list[list[str]], numbers: range) -> str:
    """Return rows, the first of which is the head, as a Markdown table; columns ``numbers`` are set to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rules = ["-" * (w - 1) + ":" if k in numbers else "-" * w for k, w in enumerate(widths)]
    return "\n".join([lines[0], "| " + " | ".join(rules) + " |", *lines[1:]])


def report(tallies: list[Tally]) -> None:
    """Print the table to stdout and what was reached to stderr, where what failed stands already."""
    for tally in tallies:
        if tally.reached:
            reached = ", ".join(f"{what} {count:,}" for what, count in sorted(tally.reached.items()))
            print(f"{tally.subject}: reached: {reached}", file=sys.stderr)
    print(table(tallies))
