"""The library behind the storm counts operations, and kills, signals or fails a process at the one that is meant."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storm import file_operations

pytestmark = pytest.mark.skipif(bool(file_operations.missing()), reason=str(file_operations.missing()))

WRITES = """
import os, sys
try:
    os.mkdir("folder")
    with open("folder/part", "wb", buffering=0) as file:
        file.write(b"0123456789")
        os.fsync(file.fileno())
    os.replace("folder/part", "folder/whole")
except OSError as error:
    sys.exit(error.errno)
"""


def run(folder: Path, plans: str) -> int:
    """Run the writing process under the library, and return its exit status; its log is in the folder."""
    environment = file_operations.environment(plans, folder / "log")
    return subprocess.run([sys.executable, "-I", "-S", "-c", WRITES], cwd=folder, env=environment).returncode


def plan(tmp_path: Path, name: str, action: str) -> str:
    """Return the plan for the operation of that name, by a look at an undisturbed process."""
    looked_at = tmp_path / "looked-at"
    looked_at.mkdir()
    assert run(looked_at, "0:kill:0") == 0
    operations = file_operations.operations(looked_at / "log")
    names = [op.name for op in operations if not op.name.startswith("open") or "folder" in op.what]
    assert names[-5:] == ["mkdir", "open64", "write", "fsync", "rename"]
    return f"{next(op.number for op in operations if op.name == name)}:{action}"


@pytest.mark.parametrize(
    ("name", "action", "status", "left"),
    [
        ("mkdir", "kill:0", -9, None),
        ("write", "kill:0", -9, {"part": b""}),
        ("write", "kill:1", -9, {"part": b"01234"}),
        ("rename", "kill:0", -9, {"part": b"0123456789"}),
        ("rename", "kill:2", -9, {"whole": b"0123456789"}),
        ("fsync", "signal:15", -15, {"part": b"0123456789"}),
        ("mkdir", f"fail:{errno.EROFS}", errno.EROFS, None),
        ("rename", f"fail:{errno.ENOSPC}", errno.ENOSPC, {"part": b"0123456789"}),
    ],
)
def test_it_happens_at_the_operation_that_is_meant(tmp_path, name, action, status, left):
    planned = plan(tmp_path, name, action)
    assert run(tmp_path, planned) == status
    folder = tmp_path / "folder"
    assert left == ({path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None)
