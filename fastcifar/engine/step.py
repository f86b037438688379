"""One training step: augment, mix, forward, backward, update. Nothing in it waits for the host."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcifar.data.batch import Batch
from fastcifar.engine.cursor import DeviceCursor, HostCursor
from fastcifar.engine.passes import Passes
from fastcifar.engine.scaler import Scaler
from fastcifar.models.shakedrop import bind_counter
from fastcifar.optim.arena import Arena
from fastcifar.optim.asam import Perturbation
from fastcifar.optim.ema import averaged, build_averages
from fastcifar.optim.flat import operations
from fastcifar.optim.schedule import learning_rate
from fastcifar.optim.update import build_update
from fastcifar.philox import Stream, philox
from fastcifar.recipe.models import Recipe


class Step:
    """A recipe's training step, with all of its state.

    Attributes:
        model: the model, whose parameters live in ``arena``.
        arena: the flat buffers.
        warm: whether a step has been taken in this process (compilation and capture are behind).
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, augment: Any, mix: Any, steps_per_epoch: int, device: torch.device
    ):
        self.model, self.warm = model.to(device), False
        self.arena = Arena(model)
        self._recipe, self._augment, self._mix = recipe, augment, mix
        self._averages = build_averages(self.arena, recipe.ema)
        self._update = build_update(recipe.optimizer, self.arena, self._averages)
        self._perturbation = Perturbation(self.arena, recipe.asam) if recipe.asam else None
        self._scaler = Scaler(device) if recipe.engine.precision == "fp16" else None
        self._passes = Passes(recipe, model, steps_per_epoch, device)
        bind_counter(model, self._passes.counter, recipe.seed)
        rate = learning_rate(recipe.schedule, recipe.optimizer.lr, recipe.train.epochs, steps_per_epoch)
        on_host = device.type == "cpu"
        self._cursor = HostCursor(rate, steps_per_epoch) if on_host else DeviceCursor(rate, steps_per_epoch, device)
        self._rate, self._epoch = rate, 0
        self._sizes: list[int] = []

    def begin_epoch(self, epoch: int) -> float:
        """Go to the start of an epoch (counted from 0) and return its first learning rate.

        It seeds torch's generator from (seed, epoch), so that dropout is the same after a resume, and tells a model
        that has a method ``begin_epoch``.
        """
        self.arena.check()
        self.model.train()
        hook = getattr(self.model, "begin_epoch", None)
        if hook is not None:
            hook(epoch)
        torch.manual_seed(torch_seed(self._recipe.seed, epoch))
        self._cursor.begin(epoch)
        self._epoch, self._sizes = epoch, []
        return self._rate(epoch, 0)

    def __call__(self, batch: Batch) -> None:
        """Train on one batch."""
        self._run(batch)
        self._sizes.append(len(batch.rows))
        self.warm = True

    def _run(self, batch: Batch) -> None:
        """Carry out a step, operation by operation."""
        images, target = self._inputs(batch)
        scale = self._scaler.scale if self._scaler else None
        self._passes(images, target, scale, self._cursor)
        saved = None
        if self._perturbation is not None:
            partials = self._perturbation.climb()
            if self._scaler:
                self._scaler.observe(partials)
            self._passes(images, target, scale, None)
            saved = self._perturbation.saved
        self._update(self._cursor.lr, saved=saved, coefficient=self._coefficient())
        if self._scaler:
            self._scaler.advance()
        self._cursor.advance()

    def _inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the augmented, normalized, mixed images (B, C, H, W) and their target."""
        if self._recipe.augment.where == "loader":
            images = self._augment.plain(batch.gathered())
        else:
            images = self._augment(batch, self._cursor.epoch)
        if self._mix is None:
            return images, batch.labels
        return self._mix(images, batch.labels, self._cursor.epoch, self._cursor.step)

    def _coefficient(self) -> Tensor | None:
        """Return what the gradient is to be multiplied by: unscaling and clipping, (1,), or None."""
        clip = self._recipe.train.grad_clip
        if not clip and self._scaler is None:
            return None
        partials = operations(self.arena.grads).norm_squared(self.arena.weights, self.arena.grads)
        coefficient = torch.ones_like(partials[:1])
        if self._scaler:
            self._scaler.observe(partials)
            coefficient = self._scaler.coefficient()
        if clip:
            norm = partials.sum().sqrt() * coefficient
            coefficient = coefficient * (clip / (norm + 1e-6)).clamp(max=1.0)
        return coefficient

    def end_epoch(self) -> dict[str, Any]:
        """Return the epoch's results: the one wait for the device in an epoch.

        Returns:
            ``loss`` (mean over samples), ``accuracy`` in percent (both of the first passes, on augmented images),
            ``samples``, and ``nonfinite_step``: the number, from 1, of the epoch's first step whose loss was not
            finite, or None.
        """
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        losses = self._passes.losses[: len(sizes)].to("cpu", torch.float64)
        correct = self._passes.correct[: len(sizes)].to("cpu", torch.float64)
        bad = (~torch.isfinite(losses)).nonzero()
        samples = int(sizes.sum())
        return {
            "loss": float((losses * sizes).sum() / max(samples, 1)),
            "accuracy": float(100 * correct.sum() / max(samples, 1)),
            "samples": samples,
            "nonfinite_step": int(bad[0]) + 1 if len(bad) else None,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a bit-identical resume at an epoch's border needs: flat names to tensors (not copies)."""
        state = {f"arena.{name}": tensor for name, tensor in self.arena.state_dict().items()}
        state["forward_passes"] = self._passes.counter
        state |= {f"model.{n}": t for n, t in self.model.state_dict().items() if not t.is_floating_point()}
        if self._scaler:
            state |= {f"scaler.{name}": tensor for name, tensor in self._scaler.tensors().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state_dict` back, in place.

        Raises:
            ValueError: a tensor is missing or has another size.
        """
        arena = {name.removeprefix("arena."): t for name, t in state.items() if name.startswith("arena.")}
        self.arena.load_state_dict(arena)
        own = self.state_dict()
        for name in own:
            if name not in state or state[name].shape != own[name].shape:
                raise ValueError(f"{name} is missing or has another size: the state belongs to another recipe")
            if not name.startswith("arena."):
                own[name].copy_(state[name])

    def weights(self, which: Literal["raw", "ema"]) -> AbstractContextManager[None]:
        """Return a context in which the model has its raw or averaged weights and BatchNorm statistics.

        Raises:
            ValueError: the recipe has no moving average.
        """
        if which == "raw":
            return nullcontext()
        if self._averages is None:
            raise ValueError("the recipe has no ema, so there are no averaged weights")
        return averaged(self.arena, self._averages)


def torch_seed(seed: int, epoch: int) -> int:
    """Return the seed of torch's own generator for an epoch: 0..2**63-1, a function of the run's seed."""
    words = philox(seed, torch.zeros(1, dtype=torch.int64), epoch, 0, Stream.TORCH)
    return int(words[0]) | (int(words[1]) >> 1) << 32


def build_step(
    recipe: Recipe, model: nn.Module, augment: Any, mix: Any, *, steps_per_epoch: int, device: torch.device
) -> Step:
    """Make the training step of a recipe.

    Args:
        recipe: the whole recipe.
        model: fp32, channels-last; it is moved to the device and its parameters into an arena.
        augment: callable (Batch, epoch) -> (B, C, H, W), with a method ``plain``; see ``fastcifar.augment``.
        mix: callable (images, labels, epoch, step) -> (images, target), or None.
        steps_per_epoch: batches in an epoch.
        device: where to train.
    """
    return Step(recipe, model, augment, mix, steps_per_epoch, torch.device(device))
