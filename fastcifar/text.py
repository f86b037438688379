"""Metrics and names as people read them."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def duration(seconds: float) -> str:
    """Return ``1 h 05 min``, ``3 min 20 s`` or ``12.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def stopped_at(summary: Mapping[str, Any]) -> str:
    """Return how far a run has come that is not finished (``stopped at epoch 1 of 2``); nothing where it is.

    Args:
        summary: of a run, or a combination's entry of a member: ``status``, ``epochs_done`` and ``epochs``.
    """
    if summary.get("status", "finished") == "finished":
        return ""
    return f"stopped at epoch {summary['epochs_done']} of {summary['epochs']}"


def resume_command(folder: Path, data: Path | None = None) -> str:
    """Return the command, as a shell takes it, that goes on with a run; the directory does not say where data is."""
    words = ["fastcifar", "run", "--resume", str(folder), *([] if data is None else ["--data", str(data)])]
    return shlex.join(words)


def slug(hardware: str) -> str:
    """Return a short name of hardware in lower-case letters, digits and hyphens, such as ``amd-epyc-2-cores``."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
