"""The augmentations of a recipe without a recipe, for any training loop."""

from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from fastcifar.augment.augment import build_augment
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError

HALF = (0.5, 0.5, 0.5)


class Augmentation:
    """Augments and normalizes batches of uint8 images, on a CPU by a numba kernel, on a GPU in one Triton launch.

    Example:
        >>> augment = fastcifar.augment.Augmentation(["crop(4)", "flip", "autoaugment"], seed=0)
        >>> images = augment(pixels)  # uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32)

    Args:
        ops: operations as a recipe writes them, in order.
        mean: per channel, of pixels in 0..1.
        std: per channel, above 0.
        image_shape: (H, W, 3).
        seed: keys every random decision, 0..2**64-1.
        device: where the images lie; ``cpu`` or ``cuda``.
        dtype: of the result: float32, bfloat16 or float16.

    Raises:
        UserError: an unknown operation, or one that needs larger images.
    """

    def __init__(
        self,
        ops: Sequence[str] = ("crop(4)", "flip"),
        *,
        mean: Sequence[float] = HALF,
        std: Sequence[float] = HALF,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._calls = 0
        self._augment = build_augment(
            read_ops(ops), mean=mean, std=std, image_shape=image_shape, seed=seed, device=torch.device(device),
            dtype=dtype,
        )  # fmt: skip

    def __call__(self, images: Tensor, *, indices: Tensor | None = None, epoch: int | None = None) -> Tensor:
        """Return images augmented and normalized: (B, 3, H, W) of the chosen dtype, channels-last.

        The same (seed, epoch, index) gives the same result on every device and in every batch.

        Args:
            images: uint8 (B, H, W, 3) on the device.
            indices: int64 (B,): each sample's number in the data set; by default its place in the batch.
            epoch: 0..2**32-1; by default the number of calls so far, so that each call draws anew.
        """
        _check_pixels(images)
        rows = torch.arange(len(images), device=images.device)
        now, self._calls = (self._calls, self._calls + 1) if epoch is None else (epoch, self._calls)
        return self._augment(Batch(images, rows, rows, rows if indices is None else indices), now)

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else, for evaluation: uint8 (B, H, W, 3) to (B, 3, H, W)."""
        _check_pixels(images)
        return self._augment.plain(images)


def _check_pixels(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        kind, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
        raise UserError(f"images are {kind} {shape}: give uint8 pixels (B, H, W, 3), which are normalized here")


def read_ops(ops: Sequence[str], where: str = "device") -> AugmentConfig:
    """Return operations as a recipe's table.

    Raises:
        UserError: one of them is wrong, or they are one text.
    """
    if isinstance(ops, str):
        raise UserError(f'augment: "{ops}" is one text; give a list of them: ["{ops}"]')
    try:
        return AugmentConfig.model_validate({"ops": list(ops), "where": where})
    except ValidationError as error:
        raise UserError(f"augment: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
