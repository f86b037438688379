"""The elementary steps that every augmentation is made of, and the policies that choose among them.

A step is one row of eight int32: its code, its gate and up to six parameters. A gate below 0 is that of a step which
a sample takes in every second epoch: -gate decides, once for all epochs, whether in the even or in the odd ones. All
floating-point work (angles, affine matrices, magnitudes) is done here, once, in float64, so that applying a step needs
integers only, apart from the float32 blend of the four enhancement operations, and gives the same bytes on every
device.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

ROW_WIDTH = 8
CODE, GATE, P0, P1, P2, P3, P4, P5 = range(ROW_WIDTH)  # the columns of a step's row
GATE_BITS = 24
FIXED_ONE = 1 << 16


class Code(IntEnum):
    """What a step does, and the meaning of its parameters p0 to p5.

    The geometric codes come first, because the kernels fold them into the reading of the image.
    """

    IDENTITY = 0
    SHIFT = 1  # out[y, x] = in[y + p0, x + p1]; outside: zero, or the image reflected at its border pixels if p2 is 1
    MIRROR = 2  # left to right
    AFFINE = 3  # 16.16 fixed point: x_in = p0 x + p1 y + p2, y_in = p3 x + p4 y + p5, rounded down, zero outside
    CUTOUT = 4  # rows p0 to p2 - 1, columns p1 to p3 - 1 of one colour: red + 256 green + 65536 blue = p4
    SHARPNESS = 5  # blend with the 3x3 smoothed image; p0: the bits of the float32 factor
    COLOR = 6  # blend with the grey image; p0 likewise
    CONTRAST = 7  # blend with the mean grey; p0 likewise
    BRIGHTNESS = 8  # blend with black; p0 likewise
    POSTERIZE = 9  # value & p0
    SOLARIZE = 10  # invert values >= p0
    INVERT = 11
    AUTOCONTRAST = 12  # stretch each channel to 0..255
    EQUALIZE = 13  # flatten each channel's histogram


# (operation, probability, magnitude bin of 10 or None) twice: Cubuk et al., 2019, "AutoAugment", table 7 (CIFAR-10).
CIFAR10_POLICY: tuple[tuple[tuple[str, float, int | None], tuple[str, float, int | None]], ...] = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)

# The operations of RandAugment and TrivialAugmentWide, in torchvision's order.
SPACE_NAMES = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)
ENHANCE = {
    "Brightness": Code.BRIGHTNESS,
    "Color": Code.COLOR,
    "Contrast": Code.CONTRAST,
    "Sharpness": Code.SHARPNESS,
}
UNSIGNED = frozenset({"Identity", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"})


def step_row(code: Code, *params: int, p: float = 1.0) -> list[int]:
    """Return a step's row: code, gate and parameters, padded to `ROW_WIDTH`.

    Args:
        code: what to do.
        params: at most six int32 values, as `Code` says.
        p: probability in 0..1, kept to 24 bits: the step happens where ``word >> 8 < gate``.
    """
    row = [int(code), round(p * (1 << GATE_BITS)), *params]
    return row + [0] * (ROW_WIDTH - len(row))


def float_bits(value: float) -> int:
    """Return the bits of ``value`` rounded to float32, as an int32."""
    return int(np.float32(value).view(np.int32))


def affine_params(matrix: Sequence[float]) -> list[int]:
    """Return the six 16.16 fixed-point parameters of an affine map from output to input pixels.

    Args:
        matrix: (a, b, c, d, e, f) with x_in = a x + b y + c and y_in = d x + e y + f at pixel centres.
    """
    a, b, c, d, e, f = matrix
    exact = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return [math.floor(v * FIXED_ONE + 0.5) for v in exact]


def rotation_params(degrees: float, height: int, width: int) -> list[int]:
    """Return the `Code.AFFINE` parameters of a rotation about the image centre, counter-clockwise."""
    angle = -math.radians(degrees)
    # Fifteen decimals, as PIL keeps, make right angles exact.
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    cx, cy = width / 2, height / 2
    return affine_params((cos, sin, cos * -cx + sin * -cy + cx, -sin, cos, -sin * -cx + cos * -cy + cy))


def shear_params(magnitude: float, horizontal: bool) -> list[int]:
    """Return the `Code.AFFINE` parameters of a shear about the top left corner; ``magnitude`` is its slope."""
    # The detour over degrees keeps the last bit of torchvision's slope.
    slope = math.tan(math.radians(math.degrees(math.atan(magnitude))))
    return affine_params((1, slope, 0, 0, 1, 0) if horizontal else (1, 0, 0, slope, 1, 0))


def operation_row(name: str, magnitude: float, height: int, width: int, p: float = 1.0) -> list[int]:
    """Return the row of one operation of the policies, as torchvision applies it to a PIL image.

    Args:
        name: such as "ShearX".
        magnitude: signed; a slope, pixels, degrees, factor minus 1, bits to keep or a threshold, by operation.
        height: of the image, in pixels.
        width: of the image, in pixels.
        p: probability in 0..1.
    """
    if name in ENHANCE:
        return step_row(ENHANCE[name], float_bits(1.0 + magnitude), p=p)
    if name in ("ShearX", "ShearY"):
        return step_row(Code.AFFINE, *shear_params(magnitude, name == "ShearX"), p=p)
    return {
        "Identity": lambda: step_row(Code.IDENTITY, p=p),
        "TranslateX": lambda: step_row(Code.SHIFT, 0, -int(magnitude), p=p),
        "TranslateY": lambda: step_row(Code.SHIFT, -int(magnitude), 0, p=p),
        "Rotate": lambda: step_row(Code.AFFINE, *rotation_params(magnitude, height, width), p=p),
        "Posterize": lambda: step_row(Code.POSTERIZE, 256 - (1 << (8 - int(magnitude))), p=p),
        "Solarize": lambda: step_row(Code.SOLARIZE, math.ceil(magnitude), p=p),
        "AutoContrast": lambda: step_row(Code.AUTOCONTRAST, p=p),
        "Equalize": lambda: step_row(Code.EQUALIZE, p=p),
        "Invert": lambda: step_row(Code.INVERT, p=p),
    }[name]()


def magnitudes(name: str, bins: int, height: int, width: int, wide: bool = False) -> list[float]:
    """Return an operation's magnitudes, one per bin (float32 values): torchvision's augmentation space.

    Args:
        name: such as "ShearX"; an operation without magnitude gives zeros.
        bins: 10 for AutoAugment, 31 for RandAugment and TrivialAugmentWide.
        height: of the image, in pixels.
        width: of the image, in pixels.
        wide: the ranges of TrivialAugmentWide.
    """
    if name == "Posterize":
        dropped = (torch.arange(bins) / ((bins - 1) / (6 if wide else 4))).round().int()
        return [float(v) for v in (8 - dropped).tolist()]
    low, high = {
        "ShearX": (0.0, 0.99 if wide else 0.3),
        "ShearY": (0.0, 0.99 if wide else 0.3),
        "TranslateX": (0.0, 32.0 if wide else 150 / 331 * width),
        "TranslateY": (0.0, 32.0 if wide else 150 / 331 * height),
        "Rotate": (0.0, 135.0 if wide else 30.0),
        "Solarize": (255.0, 0.0),
    }.get(name, (0.0, (0.99 if wide else 0.9) if name in ENHANCE else 0.0))
    return [float(v) for v in torch.linspace(low, high, bins).tolist()]


def signed(name: str, magnitude: float, sign: int) -> float:
    """Return the magnitude with sign 0 (minus) or 1 (plus); operations without a sign keep it."""
    return -magnitude if sign == 0 and name not in UNSIGNED else magnitude


def autoaugment_rows(position: int, height: int, width: int) -> list[list[int]]:
    """Return the 100 rows of the policy's first (0) or second (1) operation: sub-policy * 4 + sign 0 * 2 + sign 1."""
    rows = []
    for operations in CIFAR10_POLICY:
        name, p, bin_number = operations[position]
        value = 0.0 if bin_number is None else magnitudes(name, 10, height, width)[bin_number]
        for pair in range(4):
            sign = (pair >> 1, pair & 1)[position]
            rows.append(operation_row(name, signed(name, value, sign), height, width, p))
    return rows


def randaugment_rows(magnitude: int, height: int, width: int) -> list[list[int]]:
    """Return RandAugment's 28 rows: operation * 2 + sign, all at one magnitude bin of 31."""
    return [
        operation_row(name, signed(name, magnitudes(name, 31, height, width)[magnitude], sign), height, width)
        for name in SPACE_NAMES
        for sign in (0, 1)
    ]


def trivialaugment_rows(height: int, width: int) -> list[list[int]]:
    """Return TrivialAugmentWide's 868 rows: (operation * 31 + bin) * 2 + sign."""
    return [
        operation_row(name, signed(name, value, sign), height, width)
        for name in SPACE_NAMES
        for value in magnitudes(name, 31, height, width, wide=True)
        for sign in (0, 1)
    ]
