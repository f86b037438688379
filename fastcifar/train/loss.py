"""Cross entropy of plain and mixed labels, without one-hot targets.

Shapes in the docstrings: B samples, K classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcifar.config.schema import LossConfig
from fastcifar.errors import UserError
from fastcifar.train.ranks import ALONE, Ranks

Divisors = tuple[Tensor | float, Tensor | float]


def cross_entropy(
    logits: Tensor, target: Any, config: LossConfig, *, weights: Tensor | None = None, divide: Divisors | None = None
) -> Tensor:
    """Return the mean cross entropy, as ``torch.nn.functional.cross_entropy`` defines it.

    For mixed labels it is the sum of both labels' cross entropies, weighted by ``lam`` and ``1 - lam`` (Zhang et
    al., 2018; Yun et al., 2019), each with label smoothing (Szegedy et al., 2016) and class weights.

    Args:
        logits: float (B, K); computed in float32 (float64 stays).
        target: int64 (B,) labels, or a tuple (labels_a int64 (B,), labels_b int64 (B,), lam float () or (B,)).
        config: label smoothing; its class weights come in as ``weights``.
        weights: float (K,), made once by `class_weights`; None where the recipe has none.
        divide: what the sums over the samples are divided by, when they are not this batch's own `divisors`: a
            batch that goes through the model in micro-batches hands each of them the whole batch's.

    Returns:
        Scalar, float32 (or float64).
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    smoothing = config.label_smoothing
    # The common case takes torch's own fused kernel, which divides by 0 where no label of a batch has a weight.
    if isinstance(target, Tensor) and divide is None and 0 not in (config.class_weights or []):
        return F.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing)
    by_a, by_b = divisors(target, weights) if divide is None else divide
    log_p = F.log_softmax(logits, dim=1)
    if isinstance(target, Tensor):
        return _losses(log_p, target, weights, smoothing).sum() / by_a
    labels_a, labels_b, lam = target
    loss_a = (lam * _losses(log_p, labels_a, weights, smoothing)).sum() / by_a
    return loss_a + ((1 - lam) * _losses(log_p, labels_b, weights, smoothing)).sum() / by_b


def _losses(log_p: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Return each sample's (class-weighted, smoothed) cross entropy: (B,) from log_p (B, K)."""
    loss = -log_p.gather(1, labels[:, None])[:, 0]
    if weights is not None:
        loss = loss * weights[labels]
    if smoothing:
        spread = -(log_p if weights is None else log_p * weights).sum(1)
        loss = (1 - smoothing) * loss + smoothing / log_p.shape[1] * spread
    return loss


def divisors(target: Any, weights: Tensor | None, total: int | None = None, ranks: Ranks = ALONE) -> Divisors:
    """Return what the loss of each of a mixed target's labels is divided by (twice the same for plain labels).

    It is the batch size or, with class weights, the sum of the labels' weights, over all ranks. Where that sum is 0 it
    is infinite: a batch whose labels all have a weight of 0 has a loss of 0.

    Args:
        target: labels int64 (B,), or mixed labels.
        weights: float (K,), or None.
        total: samples of the whole batch; B by default.
        ranks: those that divide it.
    """
    labels_a, labels_b = (target, target) if isinstance(target, Tensor) else target[:2]
    if weights is None:
        size = float(len(labels_a) if total is None else total)
        return size, size
    sums = ranks.sum(torch.stack([weights[labels_a].sum(), weights[labels_b].sum()]))
    by_a, by_b = torch.where(sums > 0, sums, torch.inf)
    return by_a, by_b


def class_weights(config: LossConfig, num_classes: int, device: torch.device) -> Tensor | None:
    """Return the recipe's class weights as float32 (K,), or None.

    Raises:
        UserError: there is not one weight per class.
    """
    if config.class_weights is None:
        return None
    if len(config.class_weights) != num_classes:
        raise UserError(
            f"loss.class_weights: {len(config.class_weights)} weights for {num_classes} classes; give one per class"
        )
    return torch.tensor(config.class_weights, dtype=torch.float32, device=device)


def right(logits: Tensor, target: Any) -> Tensor:
    """Return how many of logits (B, K) are highest at their label: (); mixed labels count by their shares."""
    best = logits.argmax(1)
    if isinstance(target, Tensor):
        return (best == target).sum()
    labels_a, labels_b, lam = target
    # Published CutMix code counts the same way, so that its training accuracies compare.
    return (lam * (best == labels_a) + (1 - lam) * (best == labels_b)).sum()


def split(images: Tensor, target: Any, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, target) in micro-batches of ``size`` samples, the last one perhaps smaller."""
    if size >= len(images):
        yield images, target
        return
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        if isinstance(target, Tensor):
            yield images[part], target[part]
        else:
            labels_a, labels_b, lam = target
            yield images[part], (labels_a[part], labels_b[part], lam[part] if lam.ndim else lam)
