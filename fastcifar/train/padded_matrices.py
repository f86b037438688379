"""Matrices of several shapes as one batch of equal shape, so that one library call serves them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcifar.train.flat_parameters import Segment

MOST_PADDING = 2.0
"""How many times the elements a padded batch may have. An optimizer step of a small net is launches, not arithmetic;
that of a net whose widths go from 16 to 512 would be mostly products of zeros."""


def padding_pays(segments: Sequence[Segment]) -> bool:
    """Tell whether these tensors are of several shapes and still not mostly padding in one batch."""
    shapes = [_shape(segment) for segment in segments]
    if len(set(shapes)) < 2:
        return False
    rows, columns = _largest(shapes)
    return len(shapes) * rows * columns <= MOST_PADDING * sum(segment.size for segment in segments)


class PaddedMatrices:
    """A range of flat parameters as a batch of G matrices (R, C), each in the upper left corner, zeros around it.

    A tensor counts as a matrix of one row for each output. R and C are the largest that occur; matrices with more rows
    than columns lie transposed. Moving there and back is one launch each.

    Args:
        segments: where the tensors lie in the flat buffers, all below ``end``.
        end: length of the range. What lies between the tensors must be zero and stays so.
        device: of the flat buffers.

    Attributes:
        sqrt_rows: float32 (G, 1, 1), the square root of each tensor's outputs.
    """

    def __init__(self, segments: Sequence[Segment], end: int, device: torch.device):
        rows, columns = _largest([_shape(segment) for segment in segments])
        self._shape = (len(segments), rows, columns)
        # One element behind the batch stands for all that lies between the tensors.
        beyond = len(segments) * rows * columns
        places = torch.full((end,), beyond)
        for number, segment in enumerate(segments):
            place = number * rows * columns + _places(segment, columns)
            places[segment.offset : segment.offset + segment.size] = place
        self._places = places.to(device)
        self._batches: dict[torch.dtype, Tensor] = {}
        outputs = [float(segment.shape[0]) for segment in segments]
        self.sqrt_rows = torch.tensor(outputs, device=device).sqrt()[:, None, None]

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a flat range (end,) as a batch (G, R, C) of this dtype; the same memory at every call."""
        if dtype not in self._batches:
            groups, rows, columns = self._shape
            self._batches[dtype] = torch.zeros(groups * rows * columns + 1, dtype=dtype, device=values.device)
        batch = self._batches[dtype]
        batch.index_copy_(0, self._places, values.to(dtype))
        return batch[:-1].view(self._shape)

    def gather(self, out: Tensor) -> None:
        """Write the float32 batch, as it was changed after `spread`, into a flat range (end,)."""
        torch.index_select(self._batches[torch.float32], 0, self._places, out=out)


def _shape(segment: Segment) -> tuple[int, int]:
    """Return rows and columns of a tensor's matrix, the smaller number first."""
    rows = segment.outputs
    columns = segment.size // rows
    return min(rows, columns), max(rows, columns)


def _largest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(rows for rows, _ in shapes), max(columns for _, columns in shapes)


def _places(segment: Segment, stride: int) -> Tensor:
    """Return where each element of a tensor, in memory order, lies in a matrix whose rows are ``stride`` apart."""
    outputs = segment.outputs
    inputs = segment.size // outputs
    row, column = torch.arange(outputs)[:, None], torch.arange(inputs)[None, :]
    if outputs > inputs:
        row, column = column, row
    return (row * stride + column).flatten()
