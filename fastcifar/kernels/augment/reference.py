"""Decisions executed by torchvision on PIL images: what every kernel must equal, byte for byte."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from fastcifar.config import operations as O
from fastcifar.kernels.augment.decisions import BASE, ERASE_PLACES, Program, erase_shapes, rotate_angle


def apply(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Return torchvision's operation ``name`` of AutoAugment at this magnitude."""
    return _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)


def auto(image: Image.Image, position: int, number: int) -> Image.Image:
    """Return operation ``position`` (0, 1) of AutoAugment's sub-policy ``number // 4``; the low bits are the signs."""
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    name, _, bin_number = policy.policies[number // 4][position]
    values, has_sign = policy._augmentation_space(10, (image.height, image.width))[name]
    magnitude = float(values[bin_number].item()) if bin_number is not None else 0.0
    sign = (number % 4 >> 1, number & 1)[position]
    return apply(image, name, -magnitude if has_sign and sign == 0 else magnitude)


def from_space(image: Image.Image, space: dict[str, Any], operation: int, bin_number: int, sign: int) -> Image.Image:
    """Return an operation of torchvision's augmentation space at a magnitude bin."""
    name = list(space)[operation]
    values, has_sign = space[name]
    magnitude = float(values[bin_number].item()) if values.ndim else 0.0
    return apply(image, name, -magnitude if has_sign and sign == 0 else magnitude)


def cut(image: Image.Image, op: O.Cutout, number: int, mean: Sequence[float]) -> Image.Image:
    """Return the image with a hole at place ``number`` (row by row), clipped at the borders or inside them."""
    array = np.array(image)
    color = np.floor(255 * np.array(mean) + 0.5) if op.fill == "mean" else 0
    if op.inside:
        top, left = divmod(number, image.width - op.size_px + 1)
        array[top : top + op.size_px, left : left + op.size_px] = color
        return Image.fromarray(array)
    cy, cx = divmod(number, image.width)
    top, left = cy - op.size_px // 2, cx - op.size_px // 2
    array[max(top, 0) : max(top + op.size_px, 0), max(left, 0) : max(left + op.size_px, 0)] = color
    return Image.fromarray(array)


def erase(image: Image.Image, op: O.Erase, number: int, mean: Sequence[float]) -> Image.Image:
    """Return the image with rectangle ``number`` filled, by torchvision's own function."""
    shape, place = divmod(number, ERASE_PLACES)
    tall, wide = erase_shapes(op, image.height, image.width)[shape]
    places = [(y, x) for y in range(image.height - tall + 1) for x in range(image.width - wide + 1)]
    top, left = places[place * len(places) // ERASE_PLACES]
    color = np.floor(255 * np.array(mean) + 0.5) if op.fill == "mean" else np.zeros(3)
    value = torch.tensor(color, dtype=torch.uint8)[:, None, None]
    return F.to_pil_image(F.erase(F.pil_to_tensor(image), top, left, tall, wide, value))


def crop(image: Image.Image, op: O.Crop, number: int) -> Image.Image:
    """Return the crop ``number`` (row by row) of the padded image."""
    top, left = divmod(number, 2 * op.padding_px + 1)
    mode = {"zero": "constant", "reflect": "reflect"}[op.pad]
    return F.crop(F.pad(image, [op.padding_px], padding_mode=mode), top, left, image.height, image.width)


def step(image: Image.Image, op: O.Op, part: int, number: int, mean: Sequence[float]) -> Image.Image:
    """Execute choice ``number`` of the ``part``-th slot of ``op``."""
    match op:
        case O.Crop():
            return crop(image, op, number)
        case O.Flip():
            return F.hflip(image)
        case O.Rotate():
            return F.rotate(image, rotate_angle(op.degrees, number))
        case O.AutoAugment():
            return auto(image, part, number)
        case O.Cutout():
            return cut(image, op, number, mean)
        case O.Erase():
            return erase(image, op, number, mean)
        case O.RandAugment():
            space = RandAugment()._augmentation_space(31, (image.height, image.width))
            return from_space(image, space, number // 2, op.magnitude, number % 2)
        case O.TrivialAugmentWide():
            space = TrivialAugmentWide()._augmentation_space(31)
            return from_space(image, space, number // 62, number // 2 % 31, number % 2)
    raise TypeError(f"{op} has no reference")


def parts(op: O.Op) -> int:
    """Return how many slots an operation has."""
    return 2 if isinstance(op, O.AutoAugment) else getattr(op, "holes", getattr(op, "num_ops", 1))


def augment(
    image: NDArray[np.uint8],
    ops: Sequence[O.Op],
    program: Program,
    decisions: NDArray[np.int32],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
) -> NDArray[np.uint8]:
    """Return an image, uint8 (H, W, 3), after the operations that were decided for it.

    Args:
        image: uint8 (H, W, 3).
        ops: the recipe's operations.
        program: what they were compiled to.
        decisions: int32 (S,), the chosen row of each slot, 0 for none.
        mean: per channel in 0..1, what ``cutout(fill='mean')`` fills with.
    """
    result = Image.fromarray(image)
    slots = [(op, part) for op in ops for part in range(parts(op))]
    for (op, part), slot, row in zip(slots, program.slots, decisions, strict=True):
        if row:
            result = step(result, op, part, int(row - slot[BASE]), mean)
    return np.array(result)
