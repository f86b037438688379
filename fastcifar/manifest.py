"""The manifest of a run directory: a SHA-256 of every file, so that a damaged or edited one is never used unnoticed.

A file and its hash cannot change in one operation. So the manifest is written first, with both the hash that the file
has and the one that it is about to have; then the file is replaced; a later manifest drops the old hash. A process
that is killed in between leaves a file that has one of the two.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcifar.errors import UserError

NAME = "manifest.json"
FORMAT = 2


@dataclass
class Manifest:
    """What the files of a run directory hash to.

    Attributes:
        recipe: the resolved recipe that the run was made with, as plain values; names a key that was edited later.
        files: by name within the directory, the hashes that the file may have; None stands for no file.
    """

    recipe: dict[str, Any]
    files: dict[str, list[str | None]] = field(default_factory=dict)

    def expect(self, name: str, digest: str | None) -> None:
        """Allow a file to get another hash (None: to be removed) beside what it may have already."""
        allowed = self.files.get(name, [None])
        self.files[name] = [*allowed, *([] if digest in allowed else [digest])]

    def settle(self, name: str, digest: str | None) -> None:
        """Take note that a file has got its new hash, or is gone."""
        self.files[name] = [digest]
        if digest is None:
            del self.files[name]

    def dump(self) -> bytes:
        """Return the file's content, which ends with a hash of itself."""
        content = {"format": FORMAT, "recipe": self.recipe, "files": self.files}
        return (json.dumps({**content, "sha256": _own_hash(content)}, indent=1, ensure_ascii=False) + "\n").encode()


def _own_hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, allow_nan=True).encode())


def sha256(data: bytes) -> str:
    """Return the hash of some bytes in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, path: Path) -> Manifest:
    """Read a manifest.

    Args:
        data: the file's content.
        path: where it comes from, for the message.

    Raises:
        UserError: it is damaged, or a later version of fastcifar wrote it.
    """
    try:
        content = json.loads(data)
        own = content.pop("sha256")
        intact = own == _own_hash(content)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(
            f"{path}: is damaged, so that no file of this run can be checked; restore the file from a copy, "
            "or train the run again"
        )
    if content.get("format") != FORMAT:
        raise UserError(f"{path.parent}: was written by another version of fastcifar; read it with that version")
    return _typed(content, path)


def _typed(content: dict[str, Any], path: Path) -> Manifest:
    """Check the kinds of what the hash says is intact: whoever makes a run directory can hash it too."""
    recipe, files = content.get("recipe"), content.get("files")
    good = isinstance(recipe, dict) and isinstance(files, dict) and all(_good_entry(*item) for item in files.items())
    if not good or recipe is None or files is None:
        raise UserError(f"{path}: is not a manifest of fastcifar; train the run again")
    return Manifest(recipe, files)


def _good_entry(name: str, allowed: Any) -> bool:
    """Tell whether an entry names a file inside the directory and holds hashes."""
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(allowed, list) and all(h is None or isinstance(h, str) for h in allowed)
