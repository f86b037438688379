"""Locks between processes: held on a file until released or the process ends, however it ends."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer, as some network ones do."""


class LockedError(Exception):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is absent, for a ``with`` block; do not wait for it.

    A file system that knows no locks gets the weaker kind whose sign is that a second file is there.

    Raises:
        LockedError: it is held.
        OSError: the file cannot be made.
    """
    lock = _acquire(path)
    try:
        yield
    finally:
        lock.release()


def _acquire(path: Path) -> BaseFileLock:
    lock: BaseFileLock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
                raise
            lock = SoftFileLock(path.with_name(f"{path.name}-soft"), timeout=0)
            lock.acquire()
    except Timeout:  # an OSError too: `TimeoutError`
        raise LockedError(str(path)) from None
    return lock
