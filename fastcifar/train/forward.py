"""What the step calls as its model: the model itself, with working_copy weights or without, compiled or not."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcifar.train.flat_parameters import FlatParameters


class WorkingCopy(torch.autograd.Function):
    """Stands for the cast that autocast would do: the value is there already, the gradient goes to the fp32 weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, working_copy: Tensor) -> Tensor:
        """Return the low-precision copy of ``weight`` (same shape)."""
        return working_copy.view_as(working_copy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as float32, as the cast's own backward would."""
        return grads[0].float(), None


class WorkingCopyModel(nn.Module):
    """A model that reads its convolution and linear weights from the flat parameters' low-precision copy."""

    def __init__(self, model: nn.Module, flat: FlatParameters, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self._working_copies = flat.add_working_copy(dtype)
        self._weights = {n: p for n, p in model.named_parameters() if n in self._working_copies}

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        weights = {n: WorkingCopy.apply(self._weights[n], copy) for n, copy in self._working_copies.items()}
        return functional_call(self.model, weights, (images,))


def build_forward(
    model: nn.Module, flat: FlatParameters, working_copy: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    """Return a callable (B, C, H, W) -> (B, K) with the model's parameters.

    Args:
        model: in training mode when it is called.
        flat: the model's.
        working_copy: dtype of working_copy weights, or None for none.
    """
    return model if working_copy is None else WorkingCopyModel(model, flat, working_copy)


def compile_forward(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let torch.compile make few kernels out of many; it happens at the first call for each shape."""
    # Whether fp32 may be rounded to tf32 is the recipe's decision, not something to be reminded of.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    return torch.compile(forward, dynamic=False)
