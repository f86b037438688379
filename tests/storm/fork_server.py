"""A process that has imported everything and forks a ``fastcifar`` for each request: thousands of starts in minutes.

A start of Python with torch takes seconds, a fork of one that has started a fraction of one. What the start itself
does under signals is storm's too, with fewer processes; see `tests.storm.signals`.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tests.storm import file_operations
from tests.storm.file_operations import Operation
from tests.storm.tally import Hang

LIMIT_S = 30
FAR_LIMIT_S = 600
FORKABLE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""One thread, and no GPU: a process that has used more of either cannot be forked."""


@dataclass(frozen=True)
class Ended:
    """How a forked process ended: its exit status (minus the signal that killed it), and what it printed."""

    status: int
    said: str
    log: Path

    @property
    def operations(self) -> list[Operation]:
        """Its file operations, in order."""
        return file_operations.operations(self.log)

    def must_be(self, *statuses: int) -> None:
        """Check that it ended in one of these ways, and without a traceback.

        Raises:
            AssertionError: with what it said.
        """
        assert "Traceback" not in self.said, self.said[-800:]
        assert self.status in statuses, f"status {self.status}: {self.said[-600:]}"


class Server:
    """The process that forks; see `server`."""

    def __init__(self, process: subprocess.Popen, folder: Path, limit_s: int = LIMIT_S) -> None:
        self._process, self._folder, self._limit_s, self._number = process, folder, limit_s, 0

    def run(
        self, *words: str, cwd: Path, plans: str = "0:kill:0", limits: dict[str, int] | None = None,
        environment: dict[str, str] | None = None, dies_after_s: float = 0,
    ) -> Ended:
        """Run ``fastcifar WORDS`` and wait for its end.

        Args:
            words: the command line.
            cwd: its working directory.
            plans: what is to happen at which file operation; see ``file_operations.c``.
            limits: resource limits by their names, such as ``RLIMIT_FSIZE``; there is no log of operations then, which
                a limit would hit too.
            environment: variables that differ from this process's.
            dies_after_s: the process ends itself after this time, wherever it is, as by SIGKILL; 0: never.

        Raises:
            Hang: it did not end within the server's limit.
        """
        self._number += 1
        log, output = (self._folder / f"{self._number}.{kind}" for kind in ("log", "txt"))
        request = {
            "words": words, "cwd": str(cwd), "plans": plans, "log": "" if limits else str(log), "output": str(output),
            "environment": environment or {}, "limits": limits or {}, "dies_after_s": dies_after_s,
            "limit_s": self._limit_s,
        }  # fmt: skip
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        said = output.read_text(errors="replace")
        if status is None:
            raise Hang(f"no end within {self._limit_s} s: {' '.join(words)}: {said[-300:]}")
        return Ended(status, said, log)


@contextmanager
def server(
    *warm_up: str, cwd: Path, environment: dict[str, str] | None = None, limit_s: int = LIMIT_S
) -> Iterator[Server]:
    """Start the process for a ``with`` block.

    Args:
        warm_up: a command line that it executes once before it forks, so that no fork has to import or compile.
        cwd: where.
        environment: variables that differ from this process's.
        limit_s: a process that has not ended after this time hangs.
    """
    with tempfile.TemporaryDirectory(prefix="fastcifar-storm-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.storm.fork_server", str(cwd), *warm_up], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=file_operations.environment() | FORKABLE | (environment or {}),
        )  # fmt: skip
        assert process.stdin
        try:
            yield Server(process, Path(folder), limit_s)
        finally:
            process.stdin.close()
            process.wait(FAR_LIMIT_S)


# ------------------------------------------------------------------------------------------------ within the process


def serve(cwd: Path, warm_up: list[str]) -> dict[str, Any] | None:
    """Fork for each request until there are no more; return, in the forked process, its request."""
    import fastcifar.train.run
    from tests.command import fastcifar

    answers = os.dup(1)
    os.dup2(2, 1)
    if warm_up:
        done = fastcifar(*warm_up, cwd=cwd)
        assert done.returncode == 0, done.stderr
    gc.collect()
    gc.freeze()  # what lies in memory already is not looked through, and so not copied, by any fork
    for line in sys.stdin:
        request = json.loads(line)
        # A pipe: what is said must arrive on a full disk too.
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(answers)
            return request | {"descriptor": write}
        os.close(write)
        with open(request["output"], "wb") as output:
            status = _wait(child, read, output, request["limit_s"])
        os.close(read)
        os.write(answers, (json.dumps(status) + "\n").encode())
    return None


def _wait(child: int, said: int, output: BinaryIO, limit_s: int) -> int | None:
    """Wait for a child and copy what it says; return its exit status, or None where it had to be killed."""
    os.set_blocking(said, False)
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        with suppress(BlockingIOError):
            while part := os.read(said, 1 << 16):
                output.write(part)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def become(request: dict[str, Any]) -> None:
    """Be the process that was asked for, from its entry point on."""
    import resource

    from fastcifar import __main__ as entry

    for descriptor in (1, 2):
        os.dup2(request["descriptor"], descriptor)
    os.close(request["descriptor"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()  # a process group of its own, for signals to the whole of it
    if request["dies_after_s"]:
        signal.setitimer(signal.ITIMER_REAL, request["dies_after_s"])
    sys.argv = ["fastcifar", *request["words"]]
    file_operations.arm(request["plans"], request["log"])
    try:
        entry.main()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through Python's own end, which would copy all that was imported only to free it.
    os._exit(status)


if __name__ == "__main__":
    wanted = serve(Path(sys.argv[1]), sys.argv[2:])
    if wanted is not None:
        become(wanted)
