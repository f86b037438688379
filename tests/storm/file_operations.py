"""Build the library that stops or fails a process at one of its file operations; see ``file_operations.c``."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "storm"
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC")


@dataclass(frozen=True)
class Operation:
    """One file operation of a process: its number from 1 on, its name, and its path or descriptor."""

    number: int
    name: str
    what: str

    @property
    def changes(self) -> bool:
        """Whether it may change a file, and so fail on a full disk or leave a half of something."""
        return self.name not in ("fsync", "fdatasync", "flock")

    @property
    def reads_perhaps(self) -> bool:
        """Whether its name leaves open if it changes anything."""
        return "open" in self.name

    def __str__(self) -> str:
        return f"{self.name} {self.what} (operation {self.number})"


def missing() -> str | None:
    """Return why the library cannot be used here, or None where it can."""
    if platform.system() != "Linux":
        return "LD_PRELOAD and these functions are those of Linux"
    return None if shutil.which("cc") else "a C compiler named cc is needed"


def library(cache: Path = CACHE) -> Path:
    """Return the compiled library, named by its source, compiling it where the source is new."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    path = cache / f"file_operations-{digest}.so"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        subprocess.run(["cc", *FLAGS, "-o", str(part), str(SOURCE), "-ldl"], check=True)
        part.replace(path)
    return path


def environment(plans: str = "", log: Path | None = None) -> dict[str, str]:
    """Return the environment of a process to be started under the library; ``plans`` as in the C file."""
    found = {**os.environ, "LD_PRELOAD": str(library()), "PYTHONDONTWRITEBYTECODE": "1"}
    return found | ({"STORM_PLANS": plans} if plans else {}) | ({"STORM_LOG": str(log)} if log else {})


def arm(plans: str, log: str) -> None:
    """Plan within this process, which was started under the library."""
    ctypes.CDLL(None).storm_arm(plans.encode(), log.encode())


def operations(log: Path) -> list[Operation]:
    """Return what a process has logged; its end may be a line that was cut."""
    lines = log.read_bytes().decode(errors="replace").splitlines() if log.is_file() else []
    words = [line.split(" ", 2) for line in lines]
    return [Operation(int(number), name, what) for number, name, what in (w for w in words if len(w) == 3)]
