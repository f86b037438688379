"""Mixed precision: one table of what each ``engine.precision`` means, and the loss scaler that fp16 needs."""

from typing import NamedTuple

import torch
from torch import Tensor

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


class Precision(NamedTuple):
    """What a recipe's ``engine.precision`` means.

    Attributes:
        autocast: the dtype in which autocast runs convolutions and matrix products; None for fp32.
        images: the dtype of the normalized images.
        tf32: whether a GPU may round fp32 inputs of convolutions and matrix products to tf32.
        scaled: whether the loss has to be scaled, so that small gradients do not vanish.
    """

    autocast: torch.dtype | None
    images: torch.dtype
    tf32: bool = False
    scaled: bool = False

    def autocasting(self, device_type: str) -> torch.autocast:
        """Return the context of a forward pass on ``"cpu"`` or ``"cuda"``.

        Each weight is cast once a pass anyway, and a cache of casts must not outlive a pass in a captured CUDA graph.
        """
        return torch.autocast(device_type, self.autocast, enabled=self.autocast is not None, cache_enabled=False)

    def apply_to_cuda(self) -> None:
        """Set the process's tf32 switches, and let cuDNN choose its algorithms by timing them."""
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        # Shapes never change within a run, so that the search is paid once.
        torch.backends.cudnn.benchmark = True


PRECISIONS: dict[str, Precision] = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp16": Precision(torch.float16, torch.float16, scaled=True),  # for GPUs without bf16: V100, T4
    "fp32": Precision(None, torch.float32),
    "tf32": Precision(None, torch.float32, tf32=True),
}


class LossScaler:
    """Micikevicius et al., 2018, "Mixed precision training", with torch.amp.GradScaler's constants.

    Both passes of a SAM step use one scale. `observe` each pass's squared gradient norm; a step is left out when any of
    them was not finite, and the scale halves; it doubles after 2000 good steps. Unlike torch's scaler it knows steps of
    two passes, and it never waits for the host.

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
        # All by `where` and none by `if`: the host never learns whether a step was good.
        self.good_steps.copy_(torch.where(good, self.good_steps + 1, 0.0))
        grown = good & (self.good_steps >= INTERVAL)
        self.scale.mul_(torch.where(good, torch.where(grown, GROWTH, 1.0), BACKOFF))
        self.good_steps.mul_((~grown).float())
        self._norms.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        return {"scale": self.scale, "good_steps": self.good_steps}
