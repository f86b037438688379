"""How much memory this process may use: the machine's, or less where a control group (a container, a job) says so.

The kernel ends a process that goes over its group's limit, without a message, however much the machine has left; so
every question about memory is asked here. Both versions of control groups are read (Linux, "cgroup-v1/memory" and
"cgroup-v2" in the kernel's administrator's guide).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUPS = Path("sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2**63; no machine has this much."""


class _Files(NamedTuple):
    """What a version of control groups calls its limit, its usage, and the parts of usage that can be taken back."""

    limit: str
    usage: str
    reclaimable: tuple[str, str]


V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


class GroupMemory(NamedTuple):
    """One group's limit in bytes, and how much of it is left: unused, or cached file pages that the kernel drops."""

    limit: int
    left: int


def available_bytes(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take without swapping and without being ended.

    Args:
        root: where ``proc`` and ``sys`` lie; another place in tests.
    """
    return min([_available_on_machine(root), *(group.left for group in group_memory(root))])


def total_bytes(root: Path = Path("/")) -> int:
    """Return how many bytes this process could have at most: the machine's memory, or the smallest limit over it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(group.limit for group in group_memory(root))])


def group_memory(root: Path = Path("/")) -> list[GroupMemory]:
    """Return every limit that holds for this process: its own group's and those of the groups around it."""
    found = (_read_group(folder, files) for folder, files in _folders(root))
    return [group for group in found if group is not None]


def _available_on_machine(root: Path) -> int:
    try:
        with open(root / "proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # macOS has no such name
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _folders(root: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folders of this process's groups with the files that they hold, innermost first.

    Within a container the path in /proc/self/cgroup may be the host's, which is not mounted: what can be seen then is
    the container's own group, at the top of the mount.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if number == "0" and not controllers:
            tops, files = [root / GROUPS, root / GROUPS / "unified"], V2
        elif "memory" in controllers.split(","):
            tops, files = [root / GROUPS / "memory"], V1
        else:
            continue
        yield from ((folder, files) for top in tops for folder in _upwards(top, path))


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """Yield a group's folder and those around it, up to the top of the mount."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        yield top.joinpath(*parts[:depth])


def _read_group(folder: Path, files: _Files) -> GroupMemory | None:
    """Return a group's limit and what is left of it; None without a limit, or where nothing can be read."""
    try:
        text = (folder / files.limit).read_text().strip()
        if text == "max" or int(text) >= UNLIMITED:
            return None
        limit, usage = int(text), int((folder / files.usage).read_text())
        return GroupMemory(limit, max(0, limit - max(0, usage - _reclaimable(folder, files))))
    except (OSError, ValueError):
        return None


def _reclaimable(folder: Path, files: _Files) -> int:
    """Return the bytes of cached files in a group's usage, which the kernel drops before it ends a process."""
    lines = (folder / "memory.stat").read_text().splitlines()
    pairs = (line.split() for line in lines)
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in files.reclaimable)
