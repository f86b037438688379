"""What a result depends on beside the recipe: hardware, versions, git revision."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from fastcifar import __version__
from fastcifar.host_memory import total_bytes
from fastcifar.locations import clone

PACKAGES = ("torch", "torchvision", "triton", "numba", "numpy", "ffcv", "nvidia-dali-cuda120", "pillow")
RESULTS = ("benchmarks/results", "records")
"""What benchmarks and records write into a clone; no code runs differently for it."""


def describe() -> dict[str, Any]:
    """Return the environment as plain values: ``hardware`` names the GPU, or the processor where there is none."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "hardware": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_bytes(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"fastcifar": __version__}
        | {name: version for name in PACKAGES if (version := installed_version(name))},
        "git": git_revision(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's name with its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores"


def git_revision() -> str | None:
    """Return the clone's short revision, with ``+`` where files differ from it; None outside a clone.

    Results do not count: with them the first benchmark that wrote some would make every later result one of unknown
    code, which is neither gone on with nor taken as a record.

    What ``git archive`` wrote has no history to compare with: its revision is the one it was written from.
    """
    folder = clone()
    if folder is None or not (folder / ".git").exists():
        return None if folder is None else archived_revision(folder)
    try:
        head = _git(folder, "rev-parse", "--short=10", "HEAD")
        others = [f":(exclude){path}" for path in RESULTS]
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def archived_revision(folder: Path) -> str | None:
    """Return the short revision that ``git archive`` put into ``.git_archival.txt``; None in any other folder.

    The file's name and form are those of setuptools-scm. Elsewhere it holds the placeholder that git replaces.
    """
    try:
        node = (folder / ".git_archival.txt").read_text().partition("node:")[2].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return node[:10] if re.fullmatch("[0-9a-f]{40}", node) else None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
