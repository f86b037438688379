"""Ctrl-C and SIGTERM as one exception with a message, so that files are closed and workers end on the way out."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The run was asked to stop. Not an `Exception`, so that no ``except Exception`` on the way swallows it."""


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise `Interrupted` with ``message``, which says how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"{signal.Signals(number).name}: {message}")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
