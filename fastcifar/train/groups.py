"""Parameters that share a learning rate and a weight decay: ranges of the flat buffers, as few as there can be."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from fastcifar.kernels.sgd_ema import SGDSettings
from fastcifar.train.flat_parameters import FlatParameters, Segment


class Group(NamedTuple):
    """A range of the flat buffers of n elements.

    Attributes:
        part: the elements.
        factor: its learning rate as a multiple of the run's, above 0.
        settings: of its step.
    """

    part: slice
    factor: float
    settings: SGDSettings


def rate_groups(
    flat: FlatParameters, rate: Callable[[Segment], float], lr: float, settings: SGDSettings, start: int = 0
) -> list[Group]:
    """Return neighbouring parameters of one learning rate as one range each, in order, without gaps; maybe none.

    Args:
        flat: where they lie.
        rate: the peak learning rate of a parameter.
        lr: that of the run, which the factors refer to.
        settings: of the step of all of them.
        start: element to begin at, a boundary between two parameters; those before it belong to no group.
    """
    segments = [segment for segment in flat.segments if segment.offset >= start]
    neighbours = [(value, next(same).offset) for value, same in groupby(segments, key=rate)]
    if not neighbours:
        return []
    stops = [offset for _, offset in neighbours[1:]] + [flat.weights.numel()]
    return [
        Group(slice(offset, stop), value / lr, settings)
        for (value, offset), stop in zip(neighbours, stops, strict=True)
    ]


def decay_per_step(groups: Sequence[Group], lr: float) -> list[Group]:
    """Return the groups with each one's weight decay divided by its own peak learning rate.

    At the peak, a step then takes the same share off every weight, whatever its learning rate.
    """

    def divided(group: Group) -> Group:
        decay = group.settings.weight_decay / (group.factor * lr)
        return group._replace(settings=replace(group.settings, weight_decay=decay))

    return [divided(group) for group in groups]
