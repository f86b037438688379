"""Test-time augmentation: the mean of a model's logits over small changes of the same image."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcifar.errors import UserError, nearest

Predict = Callable[[Tensor], Tensor]


def flip_logits(model: Predict, images: Tensor) -> Tensor:
    """Return the mean of the logits of the image and of its mirror image: two views.

    Args:
        model: maps float (B, C, H, W) to float (B, K); in evaluation mode.
        images: float (B, C, H, W), normalized.
    """
    return 0.5 * (model(images) + model(images.flip(-1)))


def multicrop_logits(model: Predict, images: Tensor) -> Tensor:
    """Return the weighted mean over six views: three translations, each mirrored too (Jordan, 2024, airbench).

    The image itself counts for half, its translations by one pixel up-left and down-right (borders filled by
    reflection) for a quarter each.

    Args:
        model: maps float (B, C, H, W) to float (B, K); in evaluation mode.
        images: float (B, C, H, W), normalized, H and W at least 2 px.
    """
    height_px, width_px = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    up_left = padded[..., 2 : 2 + height_px, 2 : 2 + width_px]
    down_right = padded[..., :height_px, :width_px]
    moved = flip_logits(model, _like(up_left, images)) + flip_logits(model, _like(down_right, images))
    return 0.5 * flip_logits(model, images) + 0.25 * moved


def _like(view: Tensor, images: Tensor) -> Tensor:
    """Copy a cropped view into the memory order of ``images``, which slicing and padding lose."""
    return view.clone(memory_format=_order(images))


def _order(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


KINDS: dict[str, Callable[[Predict, Tensor], Tensor]] = {
    "none": lambda model, images: model(images),
    "flip": flip_logits,
    "multicrop": multicrop_logits,
}


def tta_logits(model: Predict, images: Tensor, kind: str) -> Tensor:
    """Return logits float (B, K) under the test-time augmentation ``kind``: ``none``, ``flip`` or ``multicrop``.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"eval.tta: {kind!r} is not allowed{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")

    def precise(view: Tensor) -> Tensor:
        # Views are averaged in float32: 16 bits would round the mean of six, several times.
        logits = model(view)
        return logits.float() if logits.element_size() < 4 else logits

    return KINDS[kind](precise, images)
