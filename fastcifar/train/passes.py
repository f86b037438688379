"""Forward and backward passes of one batch, whole or in portions, and the record of loss and accuracy."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.train.cursor import DeviceCursor, HostCursor
from fastcifar.train.loss import Divisors, class_weights, cross_entropy, divisors
from fastcifar.train.scaler import Scaler

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}


class Passes:
    """Runs the model on a batch and adds the gradient of the mean loss to the parameters' ``grad``.

    Attributes:
        forward: the model, or what stands for it (compiled, with working_copy weights).
        counter: int64 (1,), the number of forward passes so far, which random layers draw from.
        losses: float32 (steps_per_epoch,), each step's mean loss in its first pass.
        correct: float32 (steps_per_epoch,), how many samples it got right; mixed labels count by their shares.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        cursor: HostCursor | DeviceCursor,
        scaler: Scaler | None,
    ):
        device = next(model.parameters()).device
        self.forward, self._cursor, self._scaler = forward, cursor, scaler
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(cursor.steps_per_epoch, device=device)
        self.correct = torch.zeros(cursor.steps_per_epoch, device=device)
        self._loss, self._weights = recipe.loss, class_weights(recipe.loss, _classes(model), device)
        self._portions = recipe.train.accumulate
        self._device_type, self._dtype = device.type, AUTOCAST[recipe.engine.precision]

    def __call__(self, images: Tensor, target: Any, divide: Divisors | None = None) -> tuple[Tensor, Tensor]:
        """Add the gradient of the (scaled) loss at the present weights to the parameters' ``grad``.

        Args:
            images: (B, C, H, W), normalized.
            target: int64 (B,) labels, or (labels_a, labels_b, lam).
            divide: what the loss is divided by, where these images are but a part of the batch.

        Returns:
            The loss and the number of right answers, both () on the device.
        """
        if self._portions == 1 or divide is not None:
            return self._one(images, target, divide)
        divide = self.divisors(target)
        results = [self._one(x, y, divide) for x, y in split(images, target, -(-len(images) // self._portions))]
        losses, correct = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _one(self, images: Tensor, target: Any, divide: Divisors | None) -> tuple[Tensor, Tensor]:
        self.counter.add_(1)
        # Each weight is cast once a pass anyway, and a cache of casts must not outlive one in a captured graph.
        with torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=False):
            logits = self.forward(images)
        loss = cross_entropy(logits, target, self._loss, weights=self._weights, divide=divide)
        (loss if self._scaler is None else loss * self._scaler.scale[0]).backward()
        return loss.detach(), right(logits.detach(), target)

    def divisors(self, target: Any) -> Divisors:
        """Return what a whole batch's loss is divided by; see `fastcifar.train.loss.divisors`."""
        return divisors(target, self._weights)

    def record(self, loss: Tensor, correct: Tensor) -> None:
        """Keep a step's loss and number of right answers, on the device."""
        self._cursor.record(self.losses, loss)
        self._cursor.record(self.correct, correct)

    def observe(self, partials: Tensor) -> None:
        """Tell the loss scaler, where there is one, of a pass's squared gradient norm (partial sums)."""
        if self._scaler is not None:
            self._scaler.observe(partials)


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
