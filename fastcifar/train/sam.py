"""Sharpness-aware minimization on the flat parameters: SAM (Foret et al., 2021) and ASAM (Kwon et al., 2021)."""

import torch
from torch import Tensor

from fastcifar.config.schema import AsamConfig
from fastcifar.kernels.flat import Ascent, operations
from fastcifar.train.flat_parameters import FlatParameters


class Perturbation:
    """Ascends from w to w + e by the gradient in the flat parameters; the update that follows restores w.

    One norm goes over all parameters: e = rho T^2 g / (||T g|| + 1e-12), with T = |w| + eta for the parameters in
    scope (ASAM) and T = 1 for the others and for SAM.

    Attributes:
        saved: float32 (n,), the weights before the ascend.
    """

    def __init__(self, flat: FlatParameters, config: AsamConfig):
        scaled_end = flat.weights.numel() if config.scope == "all" else flat.weight_end
        self.ascent = Ascent(config.rho, config.adaptive, config.eta, scaled_end)
        self.saved = flat.weights.new_zeros(flat.weights.shape)
        self._arena = flat
        self._operations = operations(flat.weights)

    def ascend(self) -> Tensor:
        """Perturb the weights, clear the gradient, and return the partial sums of the squared norm (on the device)."""
        flat = self._arena
        partials = self._operations.norm_squared(flat.weights, flat.grads, self.ascent)
        self._operations.ascend(flat.weights, flat.grads, self.saved, partials, self.ascent, flat.working_copy)
        return partials

    def restore(self) -> None:
        """Go back to the weights before the ascend (only needed where no update follows)."""
        self._arena.weights.copy_(self.saved)
        self._arena.cast()


class LookBack:
    """LookSAM's memory (Liu et al., 2022, "Towards efficient and scalable sharpness-aware minimization").

    Of the gradient at w + e, the part that is orthogonal to the gradient at w changes slowly; the steps between two
    full ones add it, scaled to ``reuse`` times the length of their own gradient.

    Attributes:
        direction: float32 (n,), that part with length 1, or zeros before the first full step.
    """

    def __init__(self, flat: FlatParameters, reuse: float):
        self.direction = flat.add("look_direction")
        self._first = torch.zeros_like(flat.grads)
        self._arena, self._reuse = flat, reuse

    def before_ascent(self) -> None:
        """Remember the gradient at w."""
        self._first.copy_(self._arena.grads)

    def after_ascent(self) -> None:
        """Take the part of the gradient in the flat parameters that is orthogonal to the remembered one."""
        first, second = self._first, self._arena.grads
        along = torch.dot(first, second) / (torch.dot(first, first) + 1e-30)
        across = second - along * first
        length = torch.linalg.vector_norm(across)
        # An overflow (fp16) keeps the old direction.
        self.direction.copy_(torch.where(torch.isfinite(length), across / (length + 1e-30), self.direction))

    def amend(self) -> None:
        """Add the remembered direction to the gradient in the flat parameters."""
        grads = self._arena.grads
        grads.addcmul_(self.direction, self._reuse * torch.linalg.vector_norm(grads))
