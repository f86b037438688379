"""The augmentations as torchvision's transforms of PIL images: the published pipeline (``augment.where = "loader"``).

Each sample's random numbers are seeded from (seed, epoch, index), so that an epoch does not depend on how many workers
there are and can be resumed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastcifar.config import user_code
from fastcifar.config.operations import (
    AutoAugment,
    Crop,
    Cutout,
    Erase,
    Flip,
    Op,
    RandAugment,
    Rotate,
    TrivialAugmentWide,
    UserOp,
)
from fastcifar.errors import UserError
from fastcifar.kernels.augment.decisions import ERASE_ASPECTS, check_sizes
from fastcifar.kernels.augment.policy import GATE_BITS
from fastcifar.kernels.philox import Stream, philox

FLIP_DRAW = 2  # its number on the device; see `fastcifar.kernels.augment.decisions`


class PilCutout:
    """Black squares with probability ``p``: clipped around uniform pixels, or whole at uniform corners."""

    def __init__(self, op: Cutout):
        self._op = op

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image with its holes; the given one stays as it is."""
        if float(torch.rand(())) >= self._op.p:
            return image
        pixels = np.array(image)
        height, width = pixels.shape[:2]
        size = self._op.size_px
        # The range of the uppermost and leftmost row and column of a square.
        low, places = (0, 1 - size) if self._op.inside else (-(size // 2), 0)
        for _ in range(self._op.holes):
            top, left = low + int(torch.randint(height + places, ())), low + int(torch.randint(width + places, ()))
            pixels[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        return Image.fromarray(pixels)


class PilErase:
    """torchvision's random erasing on a PIL image, filled with black."""

    def __init__(self, op: Erase):
        from torchvision.transforms import RandomErasing

        self._erase = RandomErasing(op.p, (op.min_area, op.max_area), ERASE_ASPECTS, value=0)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image with its rectangle; the given one stays as it is."""
        return Image.fromarray(self._erase(pil_to_tensor(image)).permute(1, 2, 0).numpy())


class UserTransform:
    """A transform of the user's own: of a PIL image, or where it says ``takes = "tensor"`` of uint8 (3, H, W).

    Raises:
        UserError: it cannot be found or made, or fails on an image of black.
    """

    def __init__(self, op: UserOp, height_px: int, width_px: int):
        self._op, self._made = op, user_code.operation(op)
        user_code.check_operation(op, "loader")
        self._of_tensors = getattr(self._made, "takes", "pil") == "tensor"
        generator = torch.get_rng_state()
        self(Image.new("RGB", (width_px, height_px)))
        torch.set_rng_state(generator)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image transformed.

        Raises:
            UserError: the transform failed, or returned what is no RGB image of the same size.
        """
        given: Any = pil_to_tensor(image) if self._of_tensors else image
        found = user_code.call(self._made, f'augment: "{self._op}"', given)
        if isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.ndim == 3:
            found = Image.fromarray(found.permute(1, 2, 0).numpy())
        if not isinstance(found, Image.Image) or (found.size, found.mode) != (image.size, image.mode):
            raise UserError(
                f'augment: "{self._op}" returned {self._told(found)}, not an RGB image of {image.width}x{image.height} '
                "pixels or a tensor uint8 (3, H, W) of it"
            )
        return found

    @staticmethod
    def _told(found: Any) -> str:
        if isinstance(found, torch.Tensor):
            return f"a tensor {found.dtype} {tuple(found.shape)}"
        if isinstance(found, Image.Image):
            return f"a {found.mode} image of {found.width}x{found.height}"
        return f"a {type(found).__name__}"


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Alternating:
    """Mirrors a sample in every second epoch, as ``flip(alternate=true)`` does on the device, in the same epochs."""

    def __init__(self, op: Flip):
        self._gate = max(round(op.p * (1 << GATE_BITS)), 1)

    def __call__(self, image: Image.Image, side: int, odd: bool) -> Image.Image:
        """Return the image or its mirror image.

        Args:
            image: the sample.
            side: 0..2**24-1, a hash of the sample that is the same in every epoch; see `sides`.
            odd: whether the epoch, counted from 0, is odd.
        """
        mirrored = (side < self._gate) != odd
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def sides(seed: int, indices: np.ndarray) -> np.ndarray:
    """Return each sample's hash for `Alternating`, int64 (N,): the draw of the device's ``flip`` in epoch 0."""
    words = philox(seed, torch.from_numpy(indices), 0, 0, Stream.AUGMENT)
    return (words[FLIP_DRAW] >> (32 - GATE_BITS)).numpy()


def pil_transforms(ops: Sequence[Op], height_px: int, width_px: int) -> list[Callable[..., Any]]:
    """Return torchvision's transforms of the operations, in order; `Alternating` and `PilCutout` are our own.

    Raises:
        UserError: an operation needs larger images.
    """
    from torchvision import transforms as t

    check_sizes(ops, height_px, width_px)
    modes = {"zero": "constant", "reflect": "reflect"}
    makers: dict[type[Op], Callable[[Any], Callable[..., Any]]] = {
        Crop: lambda op: t.RandomCrop((height_px, width_px), padding=op.padding_px, padding_mode=modes[op.pad]),
        Flip: lambda op: Alternating(op) if op.alternate else t.RandomHorizontalFlip(op.p),
        Rotate: lambda op: t.RandomRotation(op.degrees),
        Cutout: PilCutout,
        Erase: PilErase,
        AutoAugment: lambda op: t.AutoAugment(t.AutoAugmentPolicy.CIFAR10),
        RandAugment: lambda op: t.RandAugment(op.num_ops, op.magnitude),
        TrivialAugmentWide: lambda op: t.TrivialAugmentWide(),
        UserOp: lambda op: UserTransform(op, height_px, width_px),
    }
    return [makers[type(op)](op) for op in ops]


def augment_one(
    image: np.ndarray, transforms: Sequence[Callable[..., Any]], seed: int, side: int = 0, odd: bool = False
) -> np.ndarray:
    """Return an augmented image, uint8 (H, W, C).

    Args:
        image: uint8 (H, W, C).
        transforms: from `pil_transforms`.
        seed: 0..2**63-1; decides all random numbers but those of `Alternating`.
        side: 0..2**24-1, for `Alternating`.
        odd: whether the epoch is odd, for `Alternating`.
    """
    torch.default_generator.manual_seed(seed)
    picture: Any = Image.fromarray(image)
    for transform in transforms:
        picture = transform(picture, side, odd) if isinstance(transform, Alternating) else transform(picture)
    return np.asarray(picture)
