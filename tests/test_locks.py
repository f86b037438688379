import errno
import os
import subprocess
import sys

import pytest

from fastcifar import locks
from fastcifar.locks import LockedError, locked
from fastcifar.run_directory import RunDirectory


class NoLocks(locks.FileLock):
    """What a network file system without locks answers."""

    def _acquire(self):
        raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("known", [True, False])
def test_a_second_taker_is_refused_until_the_first_lets_go(tmp_path, monkeypatch, known):
    if not known:
        monkeypatch.setattr(locks, "FileLock", NoLocks)
    with locked(tmp_path / ".lock"):
        with pytest.raises(LockedError), locked(tmp_path / ".lock"):
            pass
        with pytest.raises(LockedError), locked(tmp_path / ".lock"):
            pass
    with locked(tmp_path / ".lock"):
        pass


SECOND = """
import sys
from pathlib import Path
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
try:
    with RunDirectory(Path(sys.argv[1])).alone():
        print("taken")
except UserError as error:
    print(error)
"""


def test_a_run_names_the_process_at_work_and_leaves_no_name_behind(tmp_path):
    command = [sys.executable, "-c", SECOND, str(tmp_path)]
    with RunDirectory(tmp_path).alone():
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert f"process {os.getpid()} is at work on this run" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
