"""Plans carried out by torchvision's functional calls on PIL images: what every kernel must equal."""

import numpy as np
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op

from fastcifar.augment.decisions import BASE, rotate_angle
from fastcifar.config import operations as O


def apply(image, name, magnitude):
    return _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)


def auto(image, position, number):
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    name, _, bin_number = policy.policies[number // 4][position]
    values, has_sign = policy._augmentation_space(10, (image.height, image.width))[name]
    magnitude = float(values[bin_number].item()) if bin_number is not None else 0.0
    sign = (number % 4 >> 1, number & 1)[position]
    return apply(image, name, -magnitude if has_sign and sign == 0 else magnitude)


def from_space(image, space, operation, bin_number, sign):
    name = list(space)[operation]
    values, has_sign = space[name]
    magnitude = float(values[bin_number].item()) if values.ndim else 0.0
    return apply(image, name, -magnitude if has_sign and sign == 0 else magnitude)


def cut(image, op, number, mean):
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


def crop(image, op, number):
    top, left = divmod(number, 2 * op.padding_px + 1)
    mode = {"zero": "constant", "reflect": "reflect"}[op.pad]
    return F.crop(F.pad(image, [op.padding_px], padding_mode=mode), top, left, image.height, image.width)


def step(image, op, part, number, mean):
    """Carry out choice ``number`` of the ``part``-th slot of ``op``."""
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
        case O.RandAugment():
            space = RandAugment()._augmentation_space(31, (image.height, image.width))
            return from_space(image, space, number // 2, op.magnitude, number % 2)
        case O.TrivialAugmentWide():
            space = TrivialAugmentWide()._augmentation_space(31)
            return from_space(image, space, number // 62, number // 2 % 31, number % 2)


def parts(op):
    return 2 if op.name == "autoaugment" else getattr(op, "holes", getattr(op, "num_ops", 1))


def carry_out(image, ops, program, plan, mean=(0.0, 0.0, 0.0)):
    """uint8 (H, W, 3) -> uint8 (H, W, 3): the plan, by PIL."""
    result = Image.fromarray(image)
    slots = [(op, part) for op in ops for part in range(parts(op))]
    for (op, part), slot, row in zip(slots, program.slots, plan, strict=True):
        if row:
            result = step(result, op, part, int(row - slot[BASE]), mean)
    return np.array(result)
