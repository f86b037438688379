"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: training finishes its step and saves; everything else ends at once.

A handler that raised an exception would raise it wherever Python happens to be: within a callback of numba or
logging it is lost, within a worker's start it becomes another error. So the handler either sets a flag that the
training loop looks at after every step, or ends the process itself. All files are written so that a process may end
at any moment. A second signal always ends at once. The exit status is 128 + the signal's number, as a shell has it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(BaseException):
    """The process was asked to stop and has saved its work; not an `Exception`, so that nothing swallows it.

    Attributes:
        status: the exit status to end with.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.status = 128 + number


class _State:
    """What the handler needs to know; not a dataclass, whose import would keep the handlers waiting.

    Attributes:
        process: whose handler it is; a forked worker inherits it.
        message: what to say, such as how to go on.
        deferring: how many blocks want a flag instead of an end.
        first: what such a block does after a signal.
        requested: the signal that came within such a block, or None.
        silent: say nothing, because another process does.
    """

    process: int = 0
    message: str = "stopped"
    deferring: int = 0
    first: str = ""
    requested: int | None = None
    silent: bool = False


_state = _State()


def install() -> None:
    """Handle the signals from here on; only in the main thread.

    SIGHUP stays ignored where it is, because that is what ``nohup`` asks for.
    """
    _state.process = os.getpid()
    for number in SIGNALS:
        if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:
        # A worker that was just forked: the main process ends it, or its own termination was asked for.
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if _state.deferring and _state.requested is None:
        _state.requested = number
        _say(f"{signal.Signals(number).name}: {_state.first}; the same again ends at once")
        return
    _say(f"{signal.Signals(number).name}: {_state.message}")
    os._exit(128 + number)


def _say(text: str) -> None:
    """Write a line to stderr without Python's buffers, which the interrupted code may be in the middle of using."""
    if _state.silent:
        return
    with suppress(OSError):
        os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + f"fastcifar: {text}\n".encode())


@contextmanager
def handled(message: str) -> Iterator[None]:
    """Handle the signals within the block; what is said has ``message``, which tells how to go on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    told, _state.message, _state.requested = _state.message, message, None
    with suppress(ValueError):  # in a thread, the handlers are those of the main thread
        install()
    try:
        yield
    finally:
        _state.message, _state.requested = told, None
        with suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def deferred(first: str = "finishing this step, then saving") -> Iterator[None]:
    """Within the block, the first signal only sets the flag that `requested` reads.

    Args:
        first: what the block does then, for people.

    Raises:
        Interrupted: a signal came that the block did not look at any more.
    """
    before, _state.first = _state.first, first
    _state.deferring += 1
    try:
        yield
    finally:
        _state.deferring -= 1
        _state.first = before
    # A signal from here on ends the process itself; one from before is not forgotten.
    stop_if_requested()


def be_silent() -> None:
    """Say nothing about signals from here on: of the processes that train one model together, one speaks."""
    _state.silent = True


def request(number: int) -> None:
    """Ask for a stop as if the signal had come to this process; one that came before counts."""
    _state.requested = _state.requested or number


def requested() -> int | None:
    """Return the number of the signal that asks to stop, or None."""
    return _state.requested


def stop_if_requested() -> None:
    """End the work here if that was asked for.

    Raises:
        Interrupted: a signal came.
    """
    if _state.requested is not None:
        raise Interrupted(f"{signal.Signals(_state.requested).name}: {_state.message}", _state.requested)
