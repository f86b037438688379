"""The folder that a store is written into: it knows the SHA-256 of each file, hashed while the file is written."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """A new file that is written from front to back."""

    def __init__(self, path: Path):
        self._file, self._hashing, self._position = path.open("wb"), Hashing(), 0

    def write(self, content: Any) -> int:
        """Append bytes, or an array's memory."""
        size = memoryview(content).nbytes
        self._hashing.update(content)
        self._file.write(content)
        self._position += size
        return size

    def skip_to(self, position: int) -> None:
        """Leave zeros up to a position in bytes, which takes no space where the file system can do so."""
        while gap := min(position - self._position, len(_ZEROS)):
            self._hashing.update(_ZEROS[:gap])
            self._position += gap
        self._file.seek(position)

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def hexdigest(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._hashing.hexdigest()

    def close(self) -> None:
        """Write the rest and close the file."""
        self._hashing.close()
        self._file.close()


class Target:
    """A folder to write files into.

    Attributes:
        folder: where it is.
        hashes: the SHA-256 of each finished file, by name.
    """

    def __init__(self, folder: Path):
        self.folder, self.hashes = folder, dict[str, str]()

    @contextmanager
    def file(self, name: str) -> Iterator[HashedFile]:
        """Open a new file; its hash is known when it is closed."""
        file = HashedFile(self.folder / name)
        try:
            yield file
            self.hashes[name] = file.hexdigest()
        finally:
            file.close()
