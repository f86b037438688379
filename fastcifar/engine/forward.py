"""What the step calls as its model: the model itself, with shadow weights or without, compiled or not."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcifar.optim.arena import Arena


class Shadow(torch.autograd.Function):
    """Stands for the cast that autocast would do: the value is there already, the gradient goes to the fp32 weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor) -> Tensor:
        """Return the low-precision copy of ``weight`` (same shape)."""
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as float32, as the cast's own backward would."""
        return grads[0].float(), None


class Shadowed(nn.Module):
    """A model that reads its convolution and linear weights from the arena's low-precision copy."""

    def __init__(self, model: nn.Module, arena: Arena, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self._shadows = arena.add_shadow(dtype)
        self._weights = {n: p for n, p in model.named_parameters() if n in self._shadows}

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        weights = {name: Shadow.apply(self._weights[name], shadow) for name, shadow in self._shadows.items()}
        return functional_call(self.model, weights, (images,))


def build_forward(model: nn.Module, arena: Arena, shadow: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Return a callable (B, C, H, W) -> (B, K) with the model's parameters.

    Args:
        model: in training mode when it is called.
        arena: the model's.
        shadow: dtype of shadow weights, or None for none.
    """
    return model if shadow is None else Shadowed(model, arena, shadow)


def compile_forward(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let torch.compile make few kernels out of many; it happens at the first call for each shape."""
    # Whether fp32 may be rounded to tf32 is the recipe's decision, not something to be reminded of.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    return torch.compile(forward, dynamic=False)
