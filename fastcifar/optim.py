"""SAM, ASAM and exponential moving averages for any `torch.nn.Module` and any `torch.optim.Optimizer`.

Plain torch, tensor by tensor (in ``foreach`` calls): the same formulas as the fused kernels of fastcifar's own step,
for somebody else's loop. Example:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asam, ema = fastcifar.optim.ASAM(model, optimizer, rho=2.0), fastcifar.optim.EMA(model, decay=0.999)
    for images, labels in loader:
        loss = asam.step(lambda: cross_entropy(model(images), labels))
        ema.update()
    with ema.applied():
        evaluate(model)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fastcifar.errors import UserError

__all__ = ["ASAM", "EMA", "SAM"]

LEAST_NORM = 1e-12


class SAM:
    """Sharpness-aware minimization (Foret et al., 2021): the gradient is taken where a step uphill of ``rho`` leads.

    One norm goes over all parameters together, as in the paper. A loss scaler (fp16) is not supported: bf16 needs none.

    Args:
        model: its parameters that require gradients.
        optimizer: takes the step at the old weights with the new gradient.
        rho: radius of the ascent, above 0.
        batch_norm: whether BatchNorm's running statistics move in the second pass too (``update``, as published) or are
            put back (``freeze``).

    Raises:
        UserError: ``rho`` is not above 0.
    """

    adaptive = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        batch_norm: Literal["update", "freeze"] = "update",
    ) -> None:
        if not rho > 0:
            raise UserError(f"rho: {rho} is not above 0")
        self.model, self.optimizer, self.rho = model, optimizer, rho
        self.eta, self._scaled = 0.0, frozenset[str]()
        self._freeze = batch_norm == "freeze"

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """Take a whole step: gradient, ascent, gradient there, back, optimizer step.

        Args:
            loss: runs the model on the batch and returns the loss, (); it is called twice.

        Returns:
            The loss at the old weights, (), detached.
        """
        self.optimizer.zero_grad()
        with torch.enable_grad():
            first = loss()
            first.backward()
        before = self.ascend()
        stats = [(buffer, buffer.clone()) for buffer in self.model.buffers()] if self._freeze else []
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        for buffer, old in stats:
            buffer.copy_(old)
        self.restore(before)
        self.optimizer.step()
        return first.detach()

    @torch.no_grad()
    def ascend(self) -> dict[str, Tensor]:
        """Move the weights w to w + e with e = rho T^2 g / (||T g|| + 1e-12), and return the old ones by name.

        T is 1 for SAM, |w| + eta for ASAM. For loops of one's own, such as one with micro-batches; `restore` goes back.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        if not named:
            return {}
        weights: list[Tensor] = list(named.values())
        grads = [p.grad for p in named.values() if p.grad is not None]
        before = {name: p.detach().clone() for name, p in named.items()}
        steps = [g * t for g, t in zip(grads, self._scales(named), strict=True)]  # T g
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
        torch._foreach_mul_(steps, self._scales(named))  # T^2 g
        torch._foreach_mul_(steps, self.rho / (norm + LEAST_NORM))
        torch._foreach_add_(weights, steps)
        return before

    def _scales(self, named: dict[str, nn.Parameter]) -> list[Tensor]:
        """Return T for each parameter: a tensor of its shape, or a one."""
        return [
            p.detach().abs() + self.eta if self.adaptive and name in self._scaled else p.new_ones(())
            for name, p in named.items()
        ]

    @torch.no_grad()
    def restore(self, before: dict[str, Tensor]) -> None:
        """Put the weights back to what `ascend` returned."""
        named = dict(self.model.named_parameters())
        if before:
            torch._foreach_copy_([named[name] for name in before], list(before.values()))


class ASAM(SAM):
    """Adaptive SAM (Kwon et al., 2021): the ascent is scaled by each weight's size.

    Args:
        model: see `SAM`.
        optimizer: see `SAM`.
        rho: radius of the ascent, above 0.
        eta: added to the scale |w|, 0 or more.
        scope: scale all parameters, or only those called ``weight`` (the authors' choice).
        batch_norm: see `SAM`.
    """

    adaptive = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.5,
        *,
        eta: float = 0.0,
        scope: Literal["all", "weights"] = "all",
        batch_norm: Literal["update", "freeze"] = "update",
    ) -> None:
        super().__init__(model, optimizer, rho, batch_norm=batch_norm)
        if not eta >= 0:
            raise UserError(f"eta: {eta} is below 0")
        self.eta = eta
        names = [name for name, _ in model.named_parameters()]
        self._scaled = frozenset(n for n in names if scope == "all" or n.rpartition(".")[2] == "weight")


class EMA:
    """Exponential moving average of weights and floating-point buffers (BatchNorm statistics), without warm-up.

    A value that does not change stays as it is, an infinity of a mask too.

    Args:
        model: what is averaged; the averages start at its present state.
        decay: share of the old average that a step keeps, from 0 to below 1.

    Raises:
        UserError: ``decay`` is another number.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay: {decay} is not from 0 to below 1")
        self.model, self.decay = model, decay
        self._averages = {name: tensor.detach().clone() for name, tensor in self._present().items()}
        self._infinite = [name for name, tensor in self._averages.items() if not torch.isfinite(tensor).all()]

    def _present(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.model.state_dict().items() if t.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present state in; call it after each optimizer step."""
        present = self._present()
        averages = [self._averages[name] for name in present]
        torch._foreach_lerp_(averages, list(present.values()), 1 - self.decay)
        for name in self._infinite:
            # Between two equal infinities lies no number.
            average = self._averages[name]
            average.copy_(torch.where(torch.isfinite(average), average, present[name]))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for the time of a ``with`` block, in place, whatever happens inside."""
        before = {name: tensor.clone() for name, tensor in self._present().items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(before)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        present = self._present()
        torch._foreach_copy_(list(present.values()), [values[name] for name in present])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name (not copies)."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averages of `state_dict` up, in place.

        Raises:
            KeyError: one is missing.
        """
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(state[name])
