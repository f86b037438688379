"""ShakeDrop (Yamada et al., 2019, "ShakeDrop regularization for deep residual learning").

Residual branch l of L dies with probability p_l = p_L * l / L. In training a gate b ~ Bernoulli(1 - p_l) is drawn.
Where it is 1 the branch passes. Where it is 0 the branch is scaled by alpha ~ U(-1, 1) on the way forward and its
gradient by beta ~ U(0, 1) on the way back, both per sample. In evaluation the branch is scaled by 1 - p_l, the
expectation of the forward factor.

All numbers of one forward pass are drawn at once, at its start, by `ShakeDraws`: one launch instead of one per block,
the same graph whatever the gates are, and no host-device synchronization.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcifar.data.batch import Share
from fastcifar.kernels.shakedrop import BITS, draw_scales

Gate = Literal["batch", "sample"]

def death_rates(last: float, blocks: int) -> list[float]:
    """Return each block's death probability: the linear schedule ``last * l / L`` for l = 1..L."""
    return [last * (i + 1) / blocks for i in range(blocks)]


class Shake(torch.autograd.Function):
    """Scale a tensor by one factor per sample, and its gradient by another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W) times ``forward_scale`` (B,), in the dtype and memory format of ``x``."""
        ctx.save_for_backward(backward_scale)
        return x * forward_scale.to(x.dtype)[:, None, None, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient (B, C, H, W) times the backward scale."""
        (backward_scale,) = ctx.saved_tensors
        return grads[0] * backward_scale.to(grads[0].dtype)[:, None, None, None], None, None


class ShakeDraws(nn.Module):
    """The random factors of all blocks for one forward pass, drawn from the run's counter-based randomness.

    The draws are a function of (seed, forward counter, block, position in the batch), so that they are the same on
    every device and after a resume. Call `fastcifar.models.hooks.bind_counter` before training.

    Args:
        rates: each block's death probability in 0..1.
        gate: ``"batch"`` draws one gate per block and batch, as published; ``"sample"`` one per block and sample.
    """

    thresholds: Tensor
    counter: Tensor
    seed: Tensor

    def __init__(self, rates: list[float], gate: Gate = "batch"):
        super().__init__()
        self.gate = gate
        self.bound = False
        self.share: Share | None = None
        # None is state of the model: the rates follow from the recipe, counter and seed belong to the step. Integers
        # stay exact whatever dtype the model is moved to.
        # Integers to compare with random bits: a float comparison could differ in the last bit between devices.
        thresholds = torch.tensor([round(rate * 2**BITS) for rate in rates])
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("counter", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, batch: int) -> Tensor:
        """Return the factors of the next forward pass: float32 (L, 2, B), forward and backward.

        Args:
            batch: number of samples B, of this rank: it takes the draws of their places in the global batch.

        Raises:
            RuntimeError: no counter was bound, so that every pass would draw the same numbers.
        """
        if not self.bound:
            raise RuntimeError("ShakeDrop has no counter to draw from: call bind_counter(model, counter, seed) first")
        first, total = self.share or (0, batch)
        # The draws of the whole batch, of which a rank takes its own: any number of ranks sees the same.
        scales = draw_scales(self.thresholds, self.counter, self.seed, total, self.gate == "sample")
        return scales if batch == total else scales[..., first : first + batch].contiguous()

    def bind_counter(self, counter: Tensor, seed: int) -> None:
        """Draw from this counter from now on; see `fastcifar.models.hooks.Draws`."""
        # The operator takes the seed's 64 bits as a signed integer.
        self.seed = torch.tensor([seed - (1 << 64) if seed >> 63 else seed], device=counter.device)
        self.counter, self.bound = counter, True


class ShakeDrop(nn.Module):
    """One block's ShakeDrop; stateless.

    Args:
        death_rate: probability in 0..1 that the gate is 0.
    """

    def __init__(self, death_rate: float):
        super().__init__()
        self.death_rate = death_rate

    def forward(self, branch: Tensor, scales: Tensor | None) -> Tensor:
        """Scale a residual branch.

        Args:
            branch: (B, C, H, W), any float dtype.
            scales: in training, this block's row of `ShakeDraws`, float32 (2, B); not read in evaluation.
        """
        if not self.training:
            return branch * (1 - self.death_rate)
        if scales is None:
            raise RuntimeError("ShakeDrop in training mode needs the factors that ShakeDraws returns")
        return Shake.apply(branch, scales[0], scales[1])

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"death_rate={self.death_rate:.4g}"
