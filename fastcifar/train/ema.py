"""Exponential moving averages of the flat parameters' weights and statistics, and evaluating with them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastcifar.config.schema import EmaConfig
from fastcifar.kernels.sgd_ema import Averages
from fastcifar.train.flat_parameters import FlatParameters


def build_averages(flat: FlatParameters, config: EmaConfig | None) -> Averages | None:
    """Make the averages' buffers, which start at the present weights (no warm-up), or return None."""
    if config is None:
        return None
    weights, stats = flat.add("ema"), flat.add("stats_ema", like="stats")
    weights.copy_(flat.weights)
    stats.copy_(flat.stats)
    return Averages(config.decay, weights, flat.stats, stats)


@contextmanager
def averaged(flat: FlatParameters, averages: Averages) -> Iterator[None]:
    """Put the averages into the model for the time of a ``with`` block, in place, whatever happens inside."""
    # In place and back, so that compiled models and captured graphs see the averages without being made anew.
    weights, stats = flat.weights.clone(), flat.stats.clone()
    try:
        with torch.no_grad():
            flat.weights.copy_(averages.weights)
            flat.stats.copy_(averages.stats_average)
        yield
    finally:
        with torch.no_grad():
            flat.weights.copy_(weights)
            flat.stats.copy_(stats)
