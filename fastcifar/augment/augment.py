"""Augmentation as the training step sees it: one call from a batch of bytes to normalized images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcifar.config.operations import Op, UserOp, check_size
from fastcifar.config.schema import AugmentConfig
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.kernels.augment.cpu import augment_batch, make_scratch
from fastcifar.kernels.augment.decisions import Program, build_program, decide_batch

# numba has no bfloat16, so 16-bit types travel as their bits.
BITS = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.float32}


BYTES = torch.arange(256, dtype=torch.float32).repeat(3, 1)
"""In place of `normal_table`, where the result is to be bytes again."""
NOT_LINEAR = (np.zeros(0, np.float32), np.zeros(0, np.float32))


def normal_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the normalized value of every byte: ``dtype`` (3, 256).

    Each is byte / 255, minus the channel's mean, over its deviation, in float32, rounded once to ``dtype``.
    """
    unit = torch.arange(256, dtype=torch.float32) / 255
    centred = unit - torch.tensor(mean, dtype=torch.float32)[:, None]
    return (centred / torch.tensor(std, dtype=torch.float32)[:, None]).to(dtype).contiguous()


def linear_form(
    normal: Tensor, mean: Sequence[float], std: Sequence[float], width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the centres and scales with which ``(byte - centre) * scale`` is ``normal``, per channel of a line.

    Args:
        normal: from `normal_table`.
        mean: what it was made from.
        std: likewise.
        width: pixels a line.

    Returns:
        float32 (width * 3,) twice; both empty for other types than bfloat16, and where one of the 768 values differs.
    """
    center = torch.tensor([255 * m for m in mean], dtype=torch.float32)
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32)
    values = (torch.arange(256, dtype=torch.float32) - center[:, None]) * scale[:, None]
    if normal.dtype != torch.bfloat16 or not torch.equal(values.bfloat16().view(torch.int16), normal.view(torch.int16)):
        width = 0
    return center.repeat(width).numpy(), scale.repeat(width).numpy()


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a CPU tensor's memory as numpy, 16-bit floats as uint16 bits."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


class Augment:
    """A recipe's augmentations on the CPU, ready to run; `build_augment` makes it.

    Attributes:
        program: the compiled operations.
        seed: keys every random decision.
    """

    def __init__(
        self,
        program: Program,
        normal: Tensor,
        image_shape: tuple[int, int, int],
        seed: int,
        linear: tuple[NDArray[np.float32], NDArray[np.float32]] = NOT_LINEAR,
    ) -> None:
        self.program, self.seed = program, seed
        self._normal, self._shape, self._linear = normal, image_shape, linear
        self._plain = build_program([], *image_shape[:2])
        self._scratch = make_scratch(len(program.slots), *image_shape[:2])

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Tensor:
        """Return the augmented, normalized batch: (B, 3, H, W), channels-last, of the chosen dtype.

        Args:
            batch: uint8 images on the device of this object, of the shape that it was built for.
            epoch: 0..2**32-1; a tensor of one element is read on its device.

        Raises:
            IndexError: a row that is not one of the images (on the CPU; a GPU is not waited for).
            ValueError: images of another shape or type.
        """
        return self._run(batch.images, batch.rows, batch.indices, self.program, int(epoch))

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else: uint8 (B, H, W, 3) to (B, 3, H, W), channels-last."""
        rows = torch.arange(len(images))
        return self._run(images, rows, rows, self._plain, 0)

    def decisions(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.int32]:
        """Return what happens to these samples in this epoch: int32 (B, S), rows of ``program.table``."""
        return decide_batch(self.program, indices, epoch, self.seed)

    def _run(self, images: Tensor, rows: Tensor, indices: Tensor, program: Program, epoch: int) -> Tensor:
        self._check_images(images)
        check_rows(rows, len(images))
        out = torch.empty((len(rows), *self._shape), dtype=self._normal.dtype)
        arrays = images.contiguous().numpy(), rows.contiguous().numpy(), indices.contiguous().numpy()
        normal = (as_numpy(self._normal), *self._linear)
        augment_batch(*arrays, program, normal, as_numpy(out), self._scratch, seed=self.seed, epoch=epoch)
        return out.permute(0, 3, 1, 2)

    def _check_images(self, images: Tensor) -> None:
        """Refuse images that the compiled kernels, which check nothing, would read wrongly."""
        if images.shape[1:] != self._shape or images.dtype != torch.uint8:
            wanted = "x".join(map(str, self._shape))
            raise ValueError(f"images are {images.dtype} {tuple(images.shape[1:])}; built for uint8 of {wanted}")


class AugmentBySize:
    """Augmentations for images of several sizes, of which each batch has one; see `fastcifar.data.loaders.resized`.

    Args:
        by_side: side of the square images in pixels -> their augmentation.
    """

    def __init__(self, by_side: dict[int, Augment]):
        self._by_side = by_side

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Tensor:
        """Return the augmented, normalized batch; see `Augment.__call__`."""
        return self._by_side[batch.images.shape[1]](batch, epoch)

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else; see `Augment.plain`."""
        return self._by_side[images.shape[1]].plain(images)


def check_rows(rows: Tensor, count: int) -> None:
    """Refuse rows (int64 (B,), on the CPU) outside 0..count-1: once per batch, because the kernel reads unchecked.

    Raises:
        IndexError: with the range of the rows.
    """
    if not len(rows):
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= count:
        raise IndexError(f"rows {low} to {high} of {count} images: the batch is not of these images (a closed loader?)")


def check_shared_memory(wanted: int, image_shape: tuple[int, int, int], device: torch.device) -> None:
    """Refuse images that are too large for the GPU's augmentation kernel.

    Args:
        wanted: bytes of shared memory that a launch takes.
        image_shape: (H, W, 3).
        device: the GPU; the interpreter's kernels have the CPU, which has no such limit.

    Raises:
        UserError: the device has less.
    """
    if device.type != "cuda":
        return
    properties: Any = torch.cuda.get_device_properties(device)
    if wanted > (limit := properties.shared_memory_per_block_optin):
        height, width, _ = image_shape
        raise UserError(
            f"augment: images of {width}x{height} pixels take {wanted:,} bytes of the GPU's shared memory, which has "
            f"{limit:,}: scale the images down, leave only mirrors, one crop and one rotation, or set "
            'augment.where = "loader" with data.loader.name = "torchvision"'
        )


class GpuAugment(Augment):
    """A recipe's augmentations on the GPU; `build_augment` makes it.

    There is no host-device synchronization here, and with an epoch tensor a call can be captured in a CUDA graph.
    """

    def __init__(
        self, program: Program, normal: Tensor, image_shape: tuple[int, int, int], seed: int, device: torch.device
    ) -> None:
        from fastcifar.kernels.augment.triton import Tables, launch, shared_bytes  # not imported without a GPU

        self.program, self.seed, self._launch_kernel = program, seed, launch
        self._normal, self._shape = normal.to(device), image_shape
        self._tables = Tables(program, seed, device)
        check_shared_memory(shared_bytes(self._tables, *image_shape[:2]), image_shape, device)
        self._plain_tables = Tables(build_program([], *image_shape[:2]), seed, device)
        self._epoch = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Tensor:
        """Return the augmented, normalized batch; see `Augment.__call__`."""
        now = epoch.reshape(1) if isinstance(epoch, Tensor) else self._epoch.fill_(epoch)
        return self._launch(batch.images, batch.rows, batch.indices, now, self._tables)

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else; see `Augment.plain`."""
        rows = torch.arange(len(images), device=images.device)
        return self._launch(images, rows, rows, self._epoch, self._plain_tables)

    def _launch(self, images: Tensor, rows: Tensor, indices: Tensor, epoch: Tensor, tables: Any) -> Tensor:
        self._check_images(images)
        out = torch.empty((len(rows), *self._shape), dtype=self._normal.dtype, device=images.device)
        given = images.contiguous(), rows.contiguous(), indices.contiguous()
        self._launch_kernel(*given, epoch, tables, self._normal, out)
        return out.permute(0, 3, 1, 2)


def build_augment(
    config: AugmentConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_shape: tuple[int, int, int],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Augment:
    """Compile a recipe's augmentations for one image shape and device.

    With ``where = "loader"`` the images arrive augmented, so that only the normalization is left.

    Args:
        config: the operations, in order.
        mean: per channel, of pixels in 0..1.
        std: per channel, above 0.
        image_shape: (H, W, 3).
        seed: 0..2**64-1.
        device: where batches lie and results go.
        dtype: bfloat16, float16 or float32.

    Raises:
        UserError: not three channels, a mean or deviation per channel missing, or padding or holes that are as
            large as the images.
    """
    channels = image_shape[2]
    if channels != 3 or len(mean) != 3 or len(std) != 3:
        raise UserError(
            f"augmentation needs 3 channels with data.mean and data.std of 3 values each; "
            f"got {channels} channels, {len(mean)} means, {len(std)} deviations"
        )
    check_size(config.ops, min(image_shape[:2]))
    normal = normal_table(mean, std, dtype)
    linear = linear_form(normal, mean, std, image_shape[1])

    def make(ops: Sequence[Op], before: Sequence[Op], table: Tensor, form: Any) -> Augment:
        program = build_program(ops, *image_shape[:2], mean, before)
        if device.type == "cuda":
            return GpuAugment(program, table, image_shape, seed, device)
        return Augment(program, table, image_shape, seed, form)

    ops: list[Op] = [] if config.where == "loader" else config.ops
    if any(isinstance(op, UserOp) for op in ops):
        from fastcifar.augment.staged import StagedAugment, build_stages

        stages, start = build_stages(ops, seed, lambda own, before: make(own, before, BYTES, NOT_LINEAR))
        return StagedAugment(stages, make(ops[start:], ops[:start], normal, linear))
    return make(ops, [], normal, linear)
