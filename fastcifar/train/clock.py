"""Three clocks: total, training, and compilation with warm-up, kept apart and carried over a resume."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up seconds under names. Device work is waited for at both ends of a span, so a span holds all of its own.

    Args:
        device: the device whose work the spans hold.
        before: seconds by name that earlier parts of the same run took.
    """

    def __init__(self, device: torch.device, before: dict[str, float] | None = None) -> None:
        self._device = device
        self._spans = {"total_s": 0.0, "training_s": 0.0, "compilation_s": 0.0, **(before or {})}
        self._paused_s = 0.0
        self._started = self._now()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the seconds of the ``with`` block to ``name``."""
        self._wait()
        start = self._now()
        try:
            yield
        finally:
            self._wait()
            self._spans[name] += self._now() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a block in which the host works on something else; a GPU may go on with this run meanwhile."""
        start = time.perf_counter()
        yield
        if self._device.type == "cpu":
            self._paused_s += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far by name; ``total_s`` runs from the making of this clock, earlier parts included."""
        total = self._spans["total_s"] + self._now() - self._started
        return {**self._spans, "total_s": total}

    def _now(self) -> float:
        return time.perf_counter() - self._paused_s

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
