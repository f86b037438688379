"""Loss scaling for fp16, decided on the device and right for steps of two passes."""

import torch
from torch import Tensor

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class Scaler:
    """Micikevicius et al., 2018, "Mixed precision training", with torch.amp.GradScaler's constants.

    Both passes of a step use one scale. `observe` each pass's squared gradient norm; a step is left out when any of
    them was not finite, and the scale halves; it doubles after 2000 good steps. Nothing waits for the host.

    Attributes:
        scale: float32 (1,), what the loss is multiplied by.
        good_steps: float32 (1,), steps since the scale last changed.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16):
        self.scale = torch.full((1,), initial, device=device)
        self.good_steps = torch.zeros(1, device=device)
        self._norms = torch.zeros(1, device=device)

    def observe(self, partials: Tensor) -> None:
        """Take note of a pass's squared norm, given as partial sums."""
        self._norms.add_(partials.sum())

    def coefficient(self) -> Tensor:
        """Return 1 / scale, or NaN when a pass of this step overflowed: float32 (1,)."""
        return torch.where(torch.isfinite(self._norms), 1.0 / self.scale, torch.nan)

    def advance(self) -> None:
        """End the step: move the scale and forget the norms."""
        good = torch.isfinite(self._norms)
        self.good_steps.copy_(torch.where(good, self.good_steps + 1, 0.0))
        grown = good & (self.good_steps >= INTERVAL)
        self.scale.mul_(torch.where(good, torch.where(grown, GROWTH, 1.0), BACKOFF))
        self.good_steps.mul_((~grown).float())
        self._norms.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        return {"scale": self.scale, "good_steps": self.good_steps}
