"""How the gradient of a step comes about: one pass, or two with a ascend between them, in whole or in micro-batches.

Each class is called as ``(images, target)``, leaves the gradient in the flat buffer, and returns the weights that the
update has to go back to first, or None.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcifar.config.schema import AsamConfig
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.passes import Passes, split
from fastcifar.train.sam import LookBack, Perturbation

Gradient = Callable[[Tensor, Any], Tensor | None]


class OnePass:
    """The plain gradient."""

    def __init__(self, passes: Passes):
        self._passes = passes

    def __call__(self, images: Tensor, target: Any) -> Tensor | None:
        """Leave the gradient at w in the flat parameters."""
        self._passes.record(*self._passes(images, target))
        return None


class TwoPasses:
    """The gradient at w + e, e from the gradient at w on the same batch."""

    def __init__(self, passes: Passes, flat: FlatParameters, perturbation: Perturbation, freeze: bool):
        self._passes, self._arena, self._perturbation = passes, flat, perturbation
        self._stats = flat.stats.clone() if freeze else None

    def __call__(self, images: Tensor, target: Any) -> Tensor | None:
        """Leave the gradient at w + e in the flat parameters, and the weights at w + e."""
        self._passes.record(*self._passes(images, target))
        self.second(images, target)
        return self._perturbation.saved

    def second(self, images: Tensor, target: Any, divide: Any = None) -> None:
        """Ascend by the gradient in the flat parameters and run the second pass."""
        self._passes.observe(self._perturbation.ascend())
        if self._stats is not None:
            self._stats.copy_(self._arena.stats)
        self._passes(images, target, divide)
        if self._stats is not None:
            self._arena.stats.copy_(self._stats)


class MicroBatches:
    """m-sharpness (Foret et al., 2021): each micro-batch has its own e; the gradients at w + e add up."""

    def __init__(self, two: TwoPasses, passes: Passes, flat: FlatParameters, perturbation: Perturbation, size: int):
        self._two, self._passes, self._arena, self._perturbation, self._size = two, passes, flat, perturbation, size
        self._sum = torch.zeros_like(flat.grads)

    def __call__(self, images: Tensor, target: Any) -> Tensor | None:
        """Leave the sum of the micro-batches' gradients in the flat parameters, and the weights at w."""
        divide, results = self._passes.divisors(target), []
        self._sum.zero_()
        for part, labels in split(images, target, self._size):
            results.append(self._passes(part, labels, divide))
            self._two.second(part, labels, divide)
            self._sum.add_(self._arena.grads)
            self._arena.grads.zero_()
            self._perturbation.restore()
        self._arena.grads.copy_(self._sum)
        self._passes.record(*(torch.stack(values).sum() for values in zip(*results, strict=True)))
        return None


class LookTwoPasses:
    """A full step of LookSAM (Liu et al., 2022): two passes, and what the second adds is kept for the steps between."""

    def __init__(self, two: TwoPasses, passes: Passes, look: LookBack, perturbation: Perturbation):
        self._two, self._passes, self._look, self._perturbation = two, passes, look, perturbation

    def __call__(self, images: Tensor, target: Any) -> Tensor | None:
        """Leave the gradient at w + e in the flat parameters, and the weights at w + e."""
        self._passes.record(*self._passes(images, target))
        self._look.before_ascent()
        self._two.second(images, target)
        self._look.after_ascent()
        return self._perturbation.saved


class LookOnePass:
    """A step between LookSAM's full ones: the gradient at w plus the kept direction."""

    def __init__(self, passes: Passes, look: LookBack):
        self._passes, self._look = passes, look

    def __call__(self, images: Tensor, target: Any) -> Tensor | None:
        """Leave the amended gradient in the flat parameters."""
        self._passes.record(*self._passes(images, target))
        self._look.amend()
        return None


def build_gradients(config: AsamConfig | None, passes: Passes, flat: FlatParameters) -> list[Gradient]:
    """Return a recipe's kinds of steps: the full one and, where ``asam.every`` is above 1, the one between."""
    if config is None:
        return [OnePass(passes)]
    perturbation = Perturbation(flat, config)
    two = TwoPasses(passes, flat, perturbation, config.batch_norm == "freeze")
    if config.micro_batch:
        return [MicroBatches(two, passes, flat, perturbation, config.micro_batch)]
    if config.every == 1:
        return [two]
    look = LookBack(flat, config.reuse)
    return [LookTwoPasses(two, passes, look, perturbation), LookOnePass(passes, look)]
