"""Sharpness-aware minimization on the arena: SAM (Foret et al., 2021) and ASAM (Kwon et al., 2021)."""

import torch
from torch import Tensor

from fastcifar.optim.arena import Arena
from fastcifar.optim.flat import Ascent, operations
from fastcifar.recipe.models import AsamConfig


class Perturbation:
    """Climbs from w to w + e by the gradient in the arena; the update that follows restores w.

    One norm goes over all parameters: e = rho T^2 g / (||T g|| + 1e-12), with T = |w| + eta for the parameters in
    scope (ASAM) and T = 1 for the others and for SAM.

    Attributes:
        saved: float32 (n,), the weights before the climb.
    """

    def __init__(self, arena: Arena, config: AsamConfig):
        scaled_end = arena.weights.numel() if config.scope == "all" else arena.weight_end
        self.ascent = Ascent(config.rho, config.adaptive, config.eta, scaled_end)
        self.saved = arena.weights.new_zeros(arena.weights.shape)
        self._arena = arena
        self._operations = operations(arena.weights)

    def climb(self) -> Tensor:
        """Perturb the weights, clear the gradient, and return the partial sums of the squared norm (on the device)."""
        arena = self._arena
        partials = self._operations.norm_squared(arena.weights, arena.grads, self.ascent)
        self._operations.ascend(arena.weights, arena.grads, self.saved, partials, self.ascent, arena.shadow)
        return partials

    def restore(self) -> None:
        """Go back to the weights before the climb (only needed where no update follows)."""
        self._arena.weights.copy_(self.saved)
        self._arena.cast()


class LookBack:
    """LookSAM's memory (Liu et al., 2022, "Towards efficient and scalable sharpness-aware minimization").

    Of the gradient at w + e, the part that is orthogonal to the gradient at w changes slowly; the steps between two
    full ones add it, scaled to ``reuse`` times the length of their own gradient.

    Attributes:
        direction: float32 (n,), that part with length 1, or zeros before the first full step.
    """

    def __init__(self, arena: Arena, reuse: float):
        self.direction = arena.add("look_direction")
        self._first = torch.zeros_like(arena.grads)
        self._arena, self._reuse = arena, reuse

    def before_climb(self) -> None:
        """Remember the gradient at w."""
        self._first.copy_(self._arena.grads)

    def after_climb(self) -> None:
        """Take the part of the gradient in the arena that is orthogonal to the remembered one."""
        first, second = self._first, self._arena.grads
        along = torch.dot(first, second) / (torch.dot(first, first) + 1e-30)
        across = second - along * first
        length = torch.linalg.vector_norm(across)
        # An overflow (fp16) keeps the old direction.
        self.direction.copy_(torch.where(torch.isfinite(length), across / (length + 1e-30), self.direction))

    def amend(self) -> None:
        """Add the remembered direction to the gradient in the arena."""
        grads = self._arena.grads
        grads.addcmul_(self.direction, self._reuse * torch.linalg.vector_norm(grads))
