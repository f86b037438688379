"""Exponential moving averages of the arena's weights and statistics, and evaluating with them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastcifar.optim.arena import Arena
from fastcifar.optim.flat import Averages
from fastcifar.recipe.models import EmaConfig


def build_averages(arena: Arena, config: EmaConfig | None) -> Averages | None:
    """Make the averages' buffers, which start at the present weights (no warm-up), or return None."""
    if config is None:
        return None
    weights, stats = arena.add("ema"), arena.add("stats_ema", like="stats")
    weights.copy_(arena.weights)
    stats.copy_(arena.stats)
    return Averages(config.decay, weights, arena.stats, stats)


@contextmanager
def averaged(arena: Arena, averages: Averages) -> Iterator[None]:
    """Put the averages into the model for the time of a ``with`` block, in place, whatever happens inside."""
    weights, stats = arena.weights.clone(), arena.stats.clone()
    try:
        with torch.no_grad():
            arena.weights.copy_(averages.weights)
            arena.stats.copy_(averages.stats_average)
        yield
    finally:
        with torch.no_grad():
            arena.weights.copy_(weights)
            arena.stats.copy_(stats)
