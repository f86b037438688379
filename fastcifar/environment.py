"""Where something was measured: hardware, versions and revision, as one JSON object."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "triton", "numba", "numpy", "ffcv", "nvidia-dali-cuda120", "fastcifar")


def environment() -> dict[str, Any]:
    """Return the hardware, the versions and the git revision of this process; it imports torch.

    Returns:
        ``{"date", "python", "system", "cpu", "cpu_cores", "threads", "gpu", "gpu_memory_gb", "cuda", "packages",
        "git"}``; what is absent (a GPU, a package, a clone) is None. ``date`` is ISO 8601 with its time zone.
    """
    import datetime

    import torch

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gb": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "packages": {name: version(name) for name in PACKAGES},
        "git": git_revision(),
    }


def version(package: str) -> str | None:
    """Return the version of an installed distribution, without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Return the processor's marketing name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_revision() -> str | None:
    """Return the revision of the clone that this package is in, ``+changes`` behind it when files differ from it."""
    root = clone()
    if root is None:
        return None
    try:
        revision = _git(root, "rev-parse", "--short=12", "HEAD")
        return revision + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None


def clone() -> Path | None:
    """Return the root of the clone that this package is in, or None for an installed package."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / ".git").exists() and (root / "pyproject.toml").exists() else None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout.strip()
