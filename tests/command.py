"""The command line's own entrance in this process: what it prints and how it ends, without a second start of Python."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from fastcifar.cli.main import main


class Done(NamedTuple):
    """What `subprocess.run` would have said."""

    returncode: int
    stdout: str
    stderr: str


def fastcifar(*words: str, cwd: Path) -> Done:
    """Run ``fastcifar WORDS`` in a folder; what is not the process boundary itself is tested so."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    patched = mock.patch.object(sys, "argv", ["fastcifar", *words])
    with chdir(cwd), redirect_stdout(stdout), redirect_stderr(stderr), patched:
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Done(status, stdout.getvalue(), stderr.getvalue())


@contextmanager
def signals_heard() -> Iterator[None]:
    """Start processes in this block that SIGHUP and SIGINT reach, even where the tests run under ``nohup`` or ``&``.

    A process inherits what is ignored, and a shell's script lets what it starts with ``&`` ignore SIGINT.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
