"""The folder that a store is written into before it appears: whole or not at all, and gone on with after a kill.

It lies beside the store's place, locked for as long as its process lives. What a killed conversion left is taken over
by the next one that would write the same bytes, and swept away by any other.
"""

import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastcifar.data import manifest
from fastcifar.data.formats.journal import key_of
from fastcifar.errors import UserError

STALE_S = 24 * 3600


@contextmanager
def whole_or_nothing(out: Path, key: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside ``out``; on success synchronize it and give it the name ``out``.

    Args:
        out: the folder that is to appear.
        key: names what is written; a folder of the same key that a killed process left is yielded with what is in it.
            Nothing is taken over where it is empty.

    Raises:
        UserError: a folder cannot be made, or the disk is full.
    """
    place = Path(os.path.realpath(out))  # a folder cannot be renamed to what is a link
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder, lock = _left(place, key) or _locked_folder(place)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        yield folder
        folder.chmod(0o755)
        for path in [*folder.rglob("*"), folder]:
            _sync(path)
        _rename(folder, place)
        _sync(place.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """Make a temporary folder beside ``out`` and lock it: the lock ends with the process, however that ends.

    Returns:
        The folder, and the descriptor that holds its lock.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        lock = os.open(folder, os.O_RDONLY)
        if _lock(lock) is not False and folder.exists():
            return folder, lock
        os.close(lock)  # another process took it for a left-over, in the moment before it was locked


def _lock(descriptor: int) -> bool | None:
    """Try to lock a folder: True where it is ours now, False where another process has it, None without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _left(out: Path, key: str) -> tuple[Path, int] | None:
    """Return what a killed conversion of this key to ``out`` left, locked, and remove what others left.

    Nobody holds their locks any more. On a file system without locks they are known by their age, and not taken over.
    """
    found = None
    for folder in sorted(out.parent.glob(f".{glob.escape(out.name)}.*.part")):
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        free = _lock(lock)
        if free and found is None and key and key_of(folder) == key and folder.exists():
            found = folder, lock
            continue
        old = time.time() - os.fstat(lock).st_mtime > STALE_S
        if free or (free is None and old):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
    return found


def _rename(folder: Path, out: Path) -> None:
    """Rename; when another process made the same store meanwhile, keep that one."""
    try:
        os.replace(folder, out)
    except OSError:
        if not (out / manifest.NAME).is_file():
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
