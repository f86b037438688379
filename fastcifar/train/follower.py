"""What stands for the run directory on every rank but the first: nothing is there, and nothing is kept.

The other ranks compute the same results as rank 0, because the collectives among them need all ranks, and hand them to
this. So a run on several machines needs no folder that they share.
"""

from collections.abc import Iterable
from typing import Any


class Follower:
    """The part of `fastcifar.run_directory.RunDirectory` that training writes to; see there."""

    def __init__(self) -> None:
        self.environment: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return no rows."""
        return []

    def checkpoints(self) -> list[str]:
        """Return no names."""
        return []

    def metrics_file(self, rows: Iterable[dict[str, Any]]) -> dict[str, str]:
        """Return no files."""
        return {}

    def checkpoint_files(self, name: str, tensors: dict[str, Any], state: dict[str, Any]) -> dict[str, bytes | str]:
        """Return no files."""
        return {}

    def outdated(self, name: str, keep: int) -> list[str]:
        """Return no files."""
        return []

    def commit(self, files: dict[str, Any], remove: Iterable[str] = ()) -> None:
        """Write nothing."""

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write nothing."""
