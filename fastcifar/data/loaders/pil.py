"""The augmentations as torchvision's transforms of PIL images: the published pipeline (``augment.where = "loader"``).

Each sample's random numbers are seeded from (seed, epoch, index), so that an epoch does not depend on how many workers
there are and can be resumed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastcifar.config.operations import AutoAugment, Crop, Cutout, Flip, Op, RandAugment, Rotate, TrivialAugmentWide


class PilCutout:
    """Black squares centred at uniform pixels, clipped at the border, with probability ``p``."""

    def __init__(self, op: Cutout):
        self._op = op

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image with its holes; the given one stays as it is."""
        if float(torch.rand(())) >= self._op.p:
            return image
        pixels = np.array(image)
        height, width = pixels.shape[:2]
        for _ in range(self._op.holes):
            y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
            top, left = y - self._op.size_px // 2, x - self._op.size_px // 2
            pixels[max(top, 0) : max(top + self._op.size_px, 0), max(left, 0) : max(left + self._op.size_px, 0)] = 0
        return Image.fromarray(pixels)


def pil_transforms(ops: Sequence[Op], height_px: int, width_px: int) -> list[Callable[[Any], Any]]:
    """Return torchvision's transforms of the operations, in order."""
    from torchvision import transforms as t

    makers: dict[type[Op], Callable[[Any], Callable[[Any], Any]]] = {
        Crop: lambda op: t.RandomCrop((height_px, width_px), padding=op.padding_px),
        Flip: lambda op: t.RandomHorizontalFlip(op.p),
        Rotate: lambda op: t.RandomRotation(op.degrees),
        Cutout: PilCutout,
        AutoAugment: lambda op: t.AutoAugment(t.AutoAugmentPolicy.CIFAR10),
        RandAugment: lambda op: t.RandAugment(op.num_ops, op.magnitude),
        TrivialAugmentWide: lambda op: t.TrivialAugmentWide(),
    }
    return [makers[type(op)](op) for op in ops]


def augment_one(image: np.ndarray, transforms: Sequence[Callable[[Any], Any]], seed: int) -> np.ndarray:
    """Return an augmented image, uint8 (H, W, C); ``seed`` (0..2**63-1) decides all of its random numbers."""
    torch.default_generator.manual_seed(seed)
    picture: Any = Image.fromarray(image)
    for transform in transforms:
        picture = transform(picture)
    return np.asarray(picture)
