"""Processes of their own without a new start of Python: forked from a server that has imported the engine.

For tests of signals, kills and locks, where importing torch would take most of the time. How a program starts, and how
the interpreter ends, is not seen here: a fork leaves by ``os._exit``.
"""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastcifar.cli.run_command", "fastcifar.train.run", "tests.train.test_run"])


class Forked:
    """``fastcifar WORDS`` in a folder, as the leader of a session of its own, with what it prints in a file."""

    def __init__(self, *words: str, cwd: Path):
        self._printed = cwd / "printed.txt"
        self._printed.touch()
        arguments = (words, str(cwd), str(self._printed), dict(os.environ))
        self.process = CONTEXT.Process(target=_main, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        """The process's number, which is its group's and its session's too."""
        assert self.process.pid is not None
        return self.process.pid

    def printed(self) -> str:
        """Return what it has printed so far, to stdout and stderr."""
        return self._printed.read_text(errors="replace")

    def status(self, limit_s: float = 500.0) -> int:
        """Wait for its end and return the exit status, or the negative number of the signal that ended it."""
        self.process.join(limit_s)
        assert self.process.exitcode is not None, f"no end after {limit_s:.0f} s: {self.printed()}"
        return self.process.exitcode

    def wait_for(self, pattern: str, cwd: Path, limit_s: float = 500.0) -> None:
        """Wait until a file of this pattern is there; fail where the process ends before."""
        end = time.monotonic() + limit_s
        while not list(cwd.glob(pattern)):
            assert self.process.exitcode is None, self.printed()
            assert time.monotonic() < end, self.printed()
            time.sleep(0.02)

    def kill(self) -> None:
        """End the whole session at once, if it is still there."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _main(words: tuple[str, ...], cwd: str, printed: str, environment: dict[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):  # a parent may have handed down that they are ignored
        signal.signal(number, signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["fastcifar", *words]
    from fastcifar.__main__ import main

    main()
