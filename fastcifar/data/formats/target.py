"""The folder that a store is written into: it knows the SHA-256 of each file, hashed while the file is written.

Where a killed conversion left the first pieces of a file, the writer still hands over all of it from the beginning;
what is there already is hashed, compared, and not written again.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastcifar.data.formats.journal import Journal, Kept
from fastcifar.errors import UserError

PIECE_BYTES = 64 << 20
"""How much of a file is written between two lines of the journal, at least."""
_ZEROS = bytes(1 << 20)


class Hashing:
    """A SHA-256 that is computed on a thread of its own, one piece behind whoever hands over the pieces."""

    def __init__(self) -> None:
        self._digest, self._pool = hashlib.sha256(), ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def update(self, content: Any) -> None:
        """Take the next piece, whose bytes must not change any more; wait until the piece before is hashed."""
        self._wait()
        self._last = self._pool.submit(self._digest.update, content)

    def hexdigest(self) -> str:
        """Return the hash of all pieces in hexadecimal."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


class HashedFile:
    """A file that is written from front to back.

    Args:
        path: of the file.
        kept: what is there already.
        note: called with how many bytes have been written, and their SHA-256, after each piece and at the end.

    Raises:
        UserError: what is there already is not what is written now.
    """

    def __init__(self, path: Path, kept: Kept | None = None, note: Callable[[int, str], None] | None = None):
        self._path, self._note = path, note
        self._kept = kept or Kept(0, "")
        self._file = path.open("r+b" if kept else "wb")
        self._file.truncate(self._kept.end)
        self._file.seek(self._kept.end)
        self._hashing, self._position, self._noted = Hashing(), 0, self._kept.end

    def write(self, content: Any) -> int:
        """Append bytes, or an array's memory."""
        view = memoryview(content)
        size = view.nbytes
        there = max(self._kept.end - self._position, 0)
        if not there:
            self._hashing.update(content)
            self._file.write(content)
        elif size:
            view = view.cast("B")
            self._compare(view[:there])
            self._hashing.update(view[there:])
            self._file.write(view[there:])
        self._position += size
        if self._position - self._noted >= PIECE_BYTES:
            self._write_down()
        return size

    def skip_to(self, position: int) -> None:
        """Leave zeros up to a position in bytes, which takes no space where the file system can do so."""
        while gap := min(position - self._position, len(_ZEROS)):
            there = max(self._kept.end - self._position, 0)
            self._compare(_ZEROS[: min(gap, there)])
            self._hashing.update(_ZEROS[min(gap, there) : gap])
            self._position += gap
        if position > self._kept.end:
            self._file.seek(position)

    def _compare(self, content: Any) -> None:
        """Take the next bytes, or none, of what is there already."""
        if not len(content):
            return
        self._hashing.update(content)
        reached = min(self._position + len(content), self._kept.end)
        if reached == self._kept.end and self._hashing.hexdigest() != self._kept.sha256:
            raise self._other()

    def _other(self) -> UserError:
        return UserError(f"{self._path}: another conversion left other bytes here; convert again")

    def _write_down(self) -> None:
        if self._note is not None and self._position > self._kept.end:
            self._file.flush()
            self._note(self._position, self._hashing.hexdigest())
        self._noted = self._position

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def finish(self) -> str:
        """Note the end of the file, and return the SHA-256 of all of it.

        Raises:
            UserError: there were more bytes than were written now.
        """
        if self._position < self._kept.end:
            raise self._other()
        self._write_down()
        return self._hashing.hexdigest()

    def close(self) -> None:
        """Write the rest and close the file."""
        self._hashing.close()
        self._file.close()


class Target:
    """A folder to write files into.

    Args:
        folder: where it is.
        journal: of the folder; None where nothing is to be gone on with.

    Attributes:
        folder: where it is.
        hashes: the SHA-256 of each finished file, by name.
    """

    def __init__(self, folder: Path, journal: Journal | None = None):
        self.folder, self.hashes, self._journal = folder, dict[str, str](), journal

    @contextmanager
    def file(self, name: str) -> Iterator[HashedFile]:
        """Open a file, new or begun; its hash is known when it is closed."""
        journal = self._journal
        kept = journal.kept.get(name) if journal else None
        file = HashedFile(self.folder / name, kept, partial(journal.note, name) if journal else None)
        try:
            yield file
            self.hashes[name] = file.finish()
        finally:
            file.close()
