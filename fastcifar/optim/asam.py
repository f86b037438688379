"""Sharpness-aware minimization on the arena: SAM (Foret et al., 2021) and ASAM (Kwon et al., 2021)."""

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
        self._operations.ascend(arena.weights, arena.grads, self.saved, partials, self.ascent)
        return partials

    def restore(self) -> None:
        """Go back to the weights before the climb (only needed where no update follows)."""
        self._arena.weights.copy_(self.saved)
