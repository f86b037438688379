"""Limits of control groups, read from made-up trees of /proc and /sys/fs/cgroup."""

import os
from pathlib import Path

import pytest
import torch

from fastcifar import host_memory
from fastcifar.config.schema import LoaderConfig
from fastcifar.data.loaders import choose_backend
from fastcifar.errors import UserError
from fastcifar.host_memory import GroupMemory, available_bytes, group_memory, total_bytes
from fastcifar.models.memory import check_memory

GIB, MIB = 1 << 30, 1 << 20
MACHINE = 64 * GIB


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Return what writes a made-up machine of 64 GiB: the lines of /proc/self/cgroup, and files by folder."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": MACHINE >> 12, "SC_PAGE_SIZE": 4096}[name])

    def make(groups: str, folders: dict[str, dict[str, str]]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: {MACHINE >> 10} kB\nMemAvailable: {48 * MIB} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for folder, files in folders.items():
            place = tmp_path / "sys/fs/cgroup" / folder
            place.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(text + "\n")
        return tmp_path

    return make


def v1(limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    # The figures without "total_" are of the group alone, without the groups in it; usage is with them.
    stat = f"cache 7\ninactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(usage), "memory.stat": stat}


def v2(limit: int | str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile 9\ninactive_file {inactive}\nactive_file {active}\nslab 3"
    return {"memory.max": str(limit), "memory.current": str(usage), "memory.stat": stat}


V1_LINES = "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n"
V2_LINES = "0::/user.slice/job:1\n"
NO_LIMIT = 2**63 - 4096


@pytest.mark.parametrize(
    ("lines", "folders", "limits"),
    [
        ("", {}, []),
        ("not a line\n4:memory\n", {}, []),
        (V1_LINES, {"memory/job": v1(2 * GIB, GIB)}, [(2 * GIB, GIB)]),
        (V1_LINES, {"memory/job": v1(2 * GIB, 2 * GIB, 5 * MIB, 7 * MIB)}, [(2 * GIB, 12 * MIB)]),
        (V1_LINES, {"memory/job": v1(NO_LIMIT, GIB), "memory": v1(NO_LIMIT, GIB)}, []),
        # The host's path, seen from within a container: only the container's own group is mounted.
        (V1_LINES, {"memory": v1(3 * GIB, GIB)}, [(3 * GIB, 2 * GIB)]),
        (V1_LINES, {"memory/job": v1(4 * GIB, 0), "memory": v1(GIB, 0)}, [(4 * GIB, 4 * GIB), (GIB, GIB)]),
        (V2_LINES, {"user.slice/job:1": v2("max", GIB)}, []),
        (V2_LINES, {"user.slice/job:1": v2(2 * GIB, GIB, MIB, MIB)}, [(2 * GIB, GIB + 2 * MIB)]),
        (V2_LINES, {"user.slice/job:1": v2("max", 0), "user.slice": v2(GIB, 2 * GIB)}, [(GIB, 0)]),
        (V2_LINES, {"user.slice/job:1": v2(GIB, 10, 20, 30)}, [(GIB, GIB)]),
        ("0::/\n", {"": v2(5 * GIB, 0)}, [(5 * GIB, 5 * GIB)]),
        ("0::/job\n", {"unified/job": v2(5 * GIB, 0)}, [(5 * GIB, 5 * GIB)]),
        ("0::/../../other\n", {"": v2(GIB, 0)}, [(GIB, GIB)]),
        (V2_LINES, {"user.slice/job:1": {"memory.max": str(GIB)}}, []),
        (V2_LINES, {"user.slice/job:1": v2("nonsense", 0)}, []),
    ],
)
def test_every_limit_over_a_process_is_found(tree, lines, folders, limits):
    root = tree(lines, folders)
    assert group_memory(root) == [GroupMemory(*limit) for limit in limits]
    assert available_bytes(root) == min([48 * GIB, *(left for _, left in limits)])
    assert total_bytes(root) == min([MACHINE, *(limit for limit, _ in limits)])


def test_a_machine_that_says_nothing(tmp_path, monkeypatch):
    pages = {"SC_PHYS_PAGES": 1000, "SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert (group_memory(tmp_path), available_bytes(tmp_path), total_bytes(tmp_path)) == ([], 40_960, 4_096_000)


def test_loader_and_plan_keep_to_the_limit(tree, synthetic_store, monkeypatch):
    """A set of 6 MB: too much for a group of 4 MB, whatever the machine has."""
    root = tree(V2_LINES, {"user.slice/job:1": v2(4 * MIB, 0)})
    read = host_memory._folders
    monkeypatch.setattr(host_memory, "_folders", lambda _: read(root))
    cpu = torch.device("cpu")
    name, reason = choose_backend(LoaderConfig(), synthetic_store, 2000, cpu)
    assert name != "resident"
    assert "6 MiB of images, 4 MiB free on cpu" in reason
    assert choose_backend(LoaderConfig(name="resident"), synthetic_store, 2000, cpu)[0] != "resident"
    with pytest.raises(UserError, match="cpu has 0 GiB"):
        check_memory("mine", {"weights_and_state": 5.0, "total": 6.0}, cpu)
