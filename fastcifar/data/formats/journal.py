"""How far the files of a store have been written, so that a conversion that was killed can go on.

The journal lies beside the files for as long as they are written: a line with the key of the conversion, then a line
for each piece of a file, with the SHA-256 of the file from its beginning to the end of the piece. What a killed process
left is believed as far as these hashes say.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAME = ".journal"
READ_BYTES = 8 << 20


class Kept(NamedTuple):
    """What is right in a file that was left: its first bytes, up to the end of a piece.

    Attributes:
        end: how many bytes.
        sha256: of these bytes, in hexadecimal.
    """

    end: int
    sha256: str


class Journal:
    """The journal of a folder; one that is there is read, and what it says of the files is checked against them.

    Args:
        folder: where the files are.
        key: names what is written: equal keys are equal bytes.
        progress: told of the check.

    Attributes:
        kept: what is right in each file that was left, by name.
    """

    def __init__(self, folder: Path, key: str, progress: Callable[[str, int, int], None]):
        self._path = folder / NAME
        noted = _noted(self._path) if key_of(folder) == key else {}
        self.kept: dict[str, Kept] = {}
        for done, (name, ends) in enumerate(noted.items()):
            progress("check what a killed conversion left", done, len(noted))
            if (right := _right(folder / name, ends)) is not None:
                self.kept[name] = right
        lines = [json.dumps({"key": key}), *(_line(name, kept) for name, kept in self.kept.items())]
        self._path.write_text("\n".join([*lines, ""]))
        self._file = self._path.open("a")

    def note(self, name: str, end: int, sha256: str) -> None:
        """Write down that a file is right up to here, of which the file system has been told."""
        self._file.write(_line(name, Kept(end, sha256)) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """End the journal: the files are whole."""
        self.close()
        self._path.unlink()

    def close(self) -> None:
        """Close the journal's own file."""
        self._file.close()


def key_of(folder: Path) -> str | None:
    """Return the key of a folder's journal; None where there is none."""
    try:
        with (folder / NAME).open() as lines:
            key = json.loads(lines.readline())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def _line(name: str, kept: Kept) -> str:
    return json.dumps({"file": name, "end": kept.end, "sha256": kept.sha256})


def _noted(path: Path) -> dict[str, list[Kept]]:
    """Return the pieces of each file, in ascending order; lines that are damaged or cut off say nothing."""
    noted: dict[str, list[Kept]] = {}
    for line in path.read_text(errors="replace").splitlines()[1:]:
        try:
            entry = json.loads(line)
            name, kept = Path(entry["file"]).name, Kept(int(entry["end"]), str(entry["sha256"]))
        except (ValueError, KeyError, TypeError):
            continue
        ends = noted.setdefault(name, [])
        if kept.end > (ends[-1].end if ends else 0):
            ends.append(kept)
    return noted


def _right(path: Path, noted: list[Kept]) -> Kept | None:
    """Return the last piece up to which a file is what was noted."""
    digest, right = hashlib.sha256(), None
    try:
        with path.open("rb") as file:
            for kept in noted:
                while left := kept.end - file.tell():
                    content = file.read(min(left, READ_BYTES))
                    if not content:
                        return right
                    digest.update(content)
                if digest.hexdigest() != kept.sha256:
                    return right
                right = kept
    except OSError:
        pass
    return right
