"""The augmentations of a recipe without a recipe, for any training loop."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt, ValidationError
from torch import Tensor

from fastcifar.augment.augment import build_augment
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError

HALF = (0.5, 0.5, 0.5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Arguments(BaseModel):
    """What is given from Python, and no recipe has checked."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    mean: list[FiniteFloat] = Field(min_length=3, max_length=3)
    std: list[Annotated[FiniteFloat, Field(gt=0)]] = Field(min_length=3, max_length=3)
    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)]
    batch_size: Annotated[StrictInt, Field(ge=1)] = 1


def check_arguments(dtype: torch.dtype, **values: Any) -> None:
    """Check a normalization, a seed and a batch size.

    Raises:
        UserError: one of them is wrong.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r}: give one of {', '.join(map(str, DTYPES))}")
    try:
        Arguments.model_validate({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['input']!r}: {first['msg']}") from None


def find_device(device: str | torch.device) -> torch.device:
    """Return a device by its name; ``auto`` takes a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f'device: {device!r}: give "auto", "cpu", "cuda" or "cuda:1"')
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device: "{device}": no CUDA GPU is available here; use device="auto"')
    return found


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
        seed: keys every random decision, 0..2**63-1.
        device: where the images lie: ``cpu`` or ``cuda``; ``auto`` takes a GPU where there is one.
        dtype: of the result: float32, bfloat16 or float16.

    Raises:
        UserError: an unknown operation, or one that needs larger images; another argument that is wrong.
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
        check_arguments(dtype, mean=mean, std=std, seed=seed)
        self._augment = build_augment(
            read_ops(ops), mean=mean, std=std, image_shape=image_shape, seed=seed, device=find_device(device),
            dtype=dtype,
        )  # fmt: skip

    def __call__(self, images: Tensor, *, indices: Tensor | None = None, epoch: int | None = None) -> Tensor:
        """Return images augmented and normalized: (B, 3, H, W) of the chosen dtype, channels-last.

        The same (seed, epoch, index) gives the same result on every device and in every batch.

        Args:
            images: uint8 (B, H, W, 3) on the device.
            indices: int64 (B,): each sample's number in the data set; by default its place in the batch.
            epoch: 0..2**32-1; by default the number of calls so far, so that each call draws anew.

        Raises:
            UserError: images or indices have another type or shape.
        """
        _check_pixels(images)
        if indices is not None:
            _check_indices(indices, len(images))
        rows = torch.arange(len(images), device=images.device)
        now, self._calls = (self._calls, self._calls + 1) if epoch is None else (epoch, self._calls)
        return self._augment(Batch(images, rows, rows, rows if indices is None else indices), now)

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else, for evaluation: uint8 (B, H, W, 3) to (B, 3, H, W)."""
        _check_pixels(images)
        return self._augment.plain(images)


def _check_indices(indices: Tensor, samples: int) -> None:
    # The kernels read as many as there are images, unchecked.
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or tuple(indices.shape) != (samples,):
        given = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise UserError(f"indices are {given.removeprefix('torch.')}: give int64 ({samples},), one for each image")


def _check_pixels(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}: give a tensor, such as torch.from_numpy(images)")
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
