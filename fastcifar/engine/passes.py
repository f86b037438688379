"""Forward and backward passes of one batch, whole or in portions, and the record of loss and accuracy."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.engine.cursor import DeviceCursor, HostCursor
from fastcifar.optim.loss import class_weights, cross_entropy, divisors
from fastcifar.recipe.models import Recipe

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}


class Passes:
    """Runs the model on a batch and adds the gradient of the mean loss to the arena.

    Attributes:
        counter: int64 (1,), the number of forward passes so far, which random layers draw from.
        losses: float32 (steps_per_epoch,), each step's mean loss in its first pass.
        correct: float32 (steps_per_epoch,), how many samples it got right; mixed labels count by their shares.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, steps_per_epoch: int, device: torch.device):
        self.forward: Callable[[Tensor], Tensor] = model
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(steps_per_epoch, device=device)
        self.correct = torch.zeros(steps_per_epoch, device=device)
        self._loss, self._weights = recipe.loss, class_weights(recipe.loss, _classes(model), device)
        self._portions = recipe.train.accumulate
        self._dtype = AUTOCAST[recipe.engine.precision]
        self._device_type = device.type

    def __call__(
        self, images: Tensor, target: Any, scale: Tensor | None, cursor: HostCursor | DeviceCursor | None
    ) -> None:
        """Add the gradient of scale * loss at the present weights to the parameters' ``grad``.

        Args:
            images: (B, C, H, W), normalized.
            target: int64 (B,) labels, or (labels_a, labels_b, lam).
            scale: float32 (1,) loss scale, or None.
            cursor: where to record loss and accuracy; None for a pass that is not recorded.
        """
        if self._portions == 1:
            loss, correct = self._one(images, target, None, scale, cursor is not None)
        else:
            divide = divisors(target, self._weights)
            parts = split(images, target, -(-len(images) // self._portions))
            results = [self._one(x, y, divide, scale, cursor is not None) for x, y in parts]
            loss = torch.stack([r[0] for r in results]).sum()
            correct = torch.stack([r[1] for r in results]).sum()
        if cursor is not None:
            cursor.record(self.losses, loss)
            cursor.record(self.correct, correct)

    def _one(
        self, images: Tensor, target: Any, divide: Any, scale: Tensor | None, count: bool
    ) -> tuple[Tensor, Tensor]:
        """Run one portion forward and backward; return its loss and the number of right answers, both ()."""
        self.counter.add_(1)
        # Each weight is cast once a pass anyway, and a cache of casts must not outlive one in a captured graph.
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            logits = self.forward(images)
        loss = cross_entropy(logits, target, self._loss, weights=self._weights, divide=divide)
        (loss if scale is None else loss * scale[0]).backward()
        return loss.detach(), right(logits.detach(), target) if count else loss


def _classes(model: nn.Module) -> int:
    """Return the number of outputs: that of the last linear layer."""
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return widths[-1] if widths else 0


def right(logits: Tensor, target: Any) -> Tensor:
    """Return how many of logits (B, K) are highest at their label: (); mixed labels count by their shares."""
    best = logits.argmax(1)
    if isinstance(target, Tensor):
        return (best == target).sum()
    labels_a, labels_b, lam = target
    return (lam * (best == labels_a) + (1 - lam) * (best == labels_b)).sum()


def split(images: Tensor, target: Any, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, target) in portions of ``size`` samples, the last one perhaps smaller."""
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        if isinstance(target, Tensor):
            yield images[part], target[part]
        else:
            labels_a, labels_b, lam = target
            yield images[part], (labels_a[part], labels_b[part], lam[part] if lam.ndim else lam)
