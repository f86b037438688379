"""Operations of the user's own on the training device, between ours and in the order of the recipe.

Ours decide, move pixels and normalize in one kernel. Where an operation by import path stands among them, the list
falls into stages: ours up to it as bytes, then the user's, and so on; the last stage normalizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastcifar.augment.augment import Augment
from fastcifar.config import user_code
from fastcifar.config.operations import Op, UserOp
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox

BLOCKS_PER_OPERATION = 1 << 16


@dataclass(frozen=True)
class Draws:
    """A batch's random numbers: for each sample a hash of (seed, epoch, sample, operation, number), and nothing else.

    They are the same on every loader, device, thread count and rank, and after a resume, and nothing here waits for the
    host, so that an operation can be captured in a CUDA graph.

    Attributes:
        seed: the run's, 0..2**64-1.
        indices: int64 (B,), which samples of the training set these are.
        epoch: from 0; int, or an int64 tensor of one element.
        operation: the operation's place in the recipe's list.
    """

    seed: int
    indices: Tensor
    epoch: int | Tensor
    operation: int

    def uniform(self, count: int = 1, first: int = 0) -> Tensor:
        """Return uniform numbers in [0, 1): float32 (B, count), multiples of 2**-24.

        Args:
            count: how many for each sample.
            first: number of the first one; the same number is the same draw, whatever else is asked for. Up to 262,143.
        """
        return (self._words(count, first) >> 8).float() * 2.0**-24

    def integers(self, below: int, count: int = 1, first: int = 0) -> Tensor:
        """Return uniform integers in 0..below-1, below at most 2**31: int64 (B, count); see `uniform`."""
        return self._words(count, first) * below >> 32

    def _words(self, count: int, first: int) -> Tensor:
        """Return 32-bit words, int64 (B, count)."""
        low, high = first // 4, (first + count - 1) // 4 + 1
        start = BLOCKS_PER_OPERATION * self.operation
        blocks = torch.arange(start + low, start + high, device=self.indices.device)
        words = philox(self.seed, self.indices[:, None], self.epoch, blocks[None, :], Stream.USER_OPERATION)
        return torch.stack(words, dim=2).flatten(1)[:, first - 4 * low : first - 4 * low + count]


@runtime_checkable
class DeviceOperation(Protocol):
    """An augmentation that works on whole batches, on the training device."""

    def augment(self, images: Tensor, draws: Draws) -> Tensor:
        """Return the batch augmented.

        Args:
            images: uint8 (B, 3, H, W), in 0..255, on the training device; may be changed in place.
            draws: the samples' random numbers.

        Returns:
            uint8 (B, 3, H, W).
        """
        ...


@dataclass(frozen=True)
class UserStage:
    """One operation of the user's own in its place."""

    op: UserOp
    made: DeviceOperation
    seed: int
    place: int

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Batch:
        """Return the batch with its images augmented, uint8 (B, H, W, 3).

        Raises:
            UserError: the operation failed, or returned another shape or type.
        """
        images = batch.gathered().permute(0, 3, 1, 2)
        draws = Draws(self.seed, batch.indices, epoch, self.place)
        out = user_code.call(self.made.augment, f'augment: "{self.op}"', images, draws)
        if getattr(out, "shape", None) != images.shape or out.dtype != torch.uint8:
            found = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f'augment: "{self.op}" returned {found}, not torch.uint8 {tuple(images.shape)}')
        return replaced(batch, out.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class BytesStage:
    """Operations of ours whose result is not normalized yet."""

    augment: Augment

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Batch:
        """Return the batch with its images augmented, uint8 (B, H, W, 3)."""
        return replaced(batch, self.augment(batch, epoch).permute(0, 2, 3, 1).to(torch.uint8))


def replaced(batch: Batch, images: Tensor) -> Batch:
    """Return a batch of these images alone, uint8 (B, H, W, 3), with its labels and indices."""
    rows = torch.arange(len(images), device=images.device)
    return Batch(images.contiguous(), rows, batch.labels, batch.indices)


def build_stages(
    ops: Sequence[Op], seed: int, make: Callable[[Sequence[Op], Sequence[Op]], Augment]
) -> tuple[list[UserStage | BytesStage], int]:
    """Return all stages but the last, and where in the list the operations of the last one begin.

    Args:
        ops: a recipe's operations, in order.
        seed: keys every random decision.
        make: (operations of ours, those before them) -> their kernel, with bytes as its result.

    Raises:
        UserError: an operation of the user's own cannot be found or made, or does not work on the device.
    """
    stages: list[UserStage | BytesStage] = []
    start = 0
    for place, op in enumerate(ops):
        if not isinstance(op, UserOp):
            continue
        if start < place:
            stages.append(BytesStage(make(ops[start:place], ops[:start])))
        user_code.check_operation(op, "device")
        stages.append(UserStage(op, user_code.operation(op), seed, place))
        start = place + 1
    return stages, start


class StagedAugment(Augment):
    """A recipe's augmentations with the user's own among them; `fastcifar.augment.augment.build_augment` makes it."""

    def __init__(self, stages: Sequence[UserStage | BytesStage], last: Augment) -> None:
        self._stages, self._last = stages, last
        self.program, self.seed = last.program, last.seed

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Tensor:
        """Return the augmented, normalized batch; see `Augment.__call__`."""
        for stage in self._stages:
            batch = stage(batch, epoch)
        return self._last(batch, epoch)

    def plain(self, images: Tensor) -> Tensor:
        """Return images normalized and nothing else; see `Augment.plain`."""
        return self._last.plain(images)
