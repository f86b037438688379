"""Metrics and names as people read them."""

import re


def duration(seconds: float) -> str:
    """Return ``1 h 05 min``, ``3 min 20 s`` or ``12.3 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def slug(hardware: str) -> str:
    """Return a short name of hardware in lower-case letters, digits and hyphens, such as ``amd-epyc-2-cores``."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
