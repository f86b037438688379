"""One training step: augment, mix, forward, backward, update. Nothing in it waits for the host."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config.schema import EngineConfig, Recipe
from fastcifar.data.batch import Batch
from fastcifar.kernels.flat import operations
from fastcifar.kernels.philox import Stream, philox
from fastcifar.models.shakedrop import bind_counter
from fastcifar.train.cuda_graph import Capturer
from fastcifar.train.cursor import build_cursor
from fastcifar.train.ema import averaged, build_averages
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.forward import build_forward, compile_forward
from fastcifar.train.gradient import build_gradients
from fastcifar.train.passes import AUTOCAST, Passes
from fastcifar.train.scaler import Scaler
from fastcifar.train.schedule import learning_rate
from fastcifar.train.update import build_update


class Step:
    """A recipe's training step, with all of its state; `build_step` makes it.

    Attributes:
        model: the model, whose parameters live in ``flat``.
        flat: the flat buffers.
        passes: forward and backward.
        update: the optimizer.
        cursor: where the run is.
        warm: whether a step has been taken in this process (compilation and capture are behind).
        fallback: why that is less than the recipe asked for, or None.
    """

    def __init__(
        self, recipe: Recipe, model: nn.Module, augment: Any, mix: Any, steps_per_epoch: int, device: torch.device
    ):
        self.model, self.warm = model.to(device), False
        self._recipe, self._augment, self._mix = recipe, augment, mix
        compiled, captured, self.fallback = choose_mode(recipe.engine, device)
        self.flat = FlatParameters(model)
        self._averages = build_averages(self.flat, recipe.ema)
        self._scaler = Scaler(device) if recipe.engine.precision == "fp16" else None
        self._rate = learning_rate(recipe.schedule, recipe.optimizer.lr, recipe.train.epochs, steps_per_epoch)
        self.cursor = build_cursor(self._rate, steps_per_epoch, device)
        working_copy = AUTOCAST[recipe.engine.precision] if recipe.engine.working_copy else None
        self._forward = build_forward(model, self.flat, working_copy)
        forward = compile_forward(self._forward) if compiled else self._forward
        self.passes = Passes(recipe, model, forward, self.cursor, self._scaler)
        bind_counter(model, self.passes.counter, recipe.seed)
        self._gradients = build_gradients(recipe.asam, self.passes, self.flat)
        self.update = build_update(recipe.optimizer, self.flat, self._averages, skip=self._scaler is not None)
        self._capturer = Capturer(self._run, self._changing) if captured else None
        self._every = recipe.asam.every if recipe.asam else 1
        self._compiled, self._first = compiled, 0
        self._sizes: list[int] = []

    @property
    def mode(self) -> str:
        """What is done: "eager", "compile", "graph" or "compile+graph"."""
        parts = ["compile"] * self._compiled + ["graph"] * (self._capturer is not None)
        return "+".join(parts) or "eager"

    def begin_epoch(self, epoch: int) -> float:
        """Go to the start of an epoch (counted from 0) and return its first learning rate.

        It seeds torch's generator from (seed, epoch), so that dropout is the same after a resume, and tells a model
        that has a method ``begin_epoch``.
        """
        self.flat.check()
        self.model.train()
        hook = getattr(self.model, "begin_epoch", None)
        if hook is not None:
            hook(epoch)
        torch.manual_seed(torch_seed(self._recipe.seed, epoch))
        self.cursor.begin(epoch)
        self._first, self._sizes = epoch * self.cursor.steps_per_epoch, []
        return self._rate(epoch, 0)

    def __call__(self, batch: Batch) -> None:
        """Train on one batch."""
        kind = int((self._first + len(self._sizes)) % self._every != 0)
        if not self._replayed(batch, kind):
            self._run(batch, kind)
        self._sizes.append(len(batch.rows))
        self.warm = True

    def _replayed(self, batch: Batch, kind: int) -> bool:
        """Run the captured step, first capturing it; return False where there is none.

        Where it cannot be captured, say why and give up compilation first, then capturing. A failed attempt leaves
        the state as it was.
        """
        while self._capturer is not None:
            try:
                self._capturer(batch, kind)
                return True
            except RuntimeError as error:
                self.fallback = f"{self.mode}: the step cannot be captured as a CUDA graph: {_headline(error)}"
                if not self._compiled:
                    self._capturer = None
                self._compiled, self.passes.forward = False, self._forward
        return False

    def _run(self, batch: Batch, kind: int) -> None:
        """Carry out a step, operation by operation; ``kind`` 1 is a step between two full ones of LookSAM."""
        images, target = self.inputs(batch)
        saved = self._gradients[kind](images, target)
        self.update(self.cursor.lr, saved=saved, coefficient=self._coefficient())
        if self._scaler is not None:
            self._scaler.advance()
        self.cursor.advance()

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the augmented, normalized, mixed images (B, C, H, W) and their target."""
        images = self._augment(batch, self.cursor.epoch)
        if self._mix is None:
            return images, batch.labels
        return self._mix(images, batch.labels, self.cursor.epoch, self.cursor.step)

    def _coefficient(self) -> Tensor | None:
        """Return what the gradient is to be multiplied by (unscaling, clipping): float32 (1,), or None."""
        clip = self._recipe.train.grad_clip
        if not clip and self._scaler is None:
            return None
        partials = operations(self.flat.grads).norm_squared(self.flat.weights, self.flat.grads)
        self.passes.observe(partials)
        coefficient = torch.ones_like(partials[:1]) if self._scaler is None else self._scaler.coefficient()
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
        losses = self.passes.losses[: len(sizes)].to("cpu", torch.float64)
        correct = self.passes.correct[: len(sizes)].to("cpu", torch.float64)
        bad = (~torch.isfinite(losses)).nonzero()
        samples = int(sizes.sum())
        return {
            "loss": float((losses * sizes).sum() / max(samples, 1)),
            "accuracy": float(100 * correct.sum() / max(samples, 1)),
            "samples": samples,
            "nonfinite_step": int(bad[0]) + 1 if len(bad) else None,
        }

    def losses(self) -> Tensor:
        """Return the loss of each step of this epoch so far: float32 (steps,), a copy on the host."""
        return self.passes.losses[: len(self._sizes)].cpu().clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a bit-identical resume at an epoch's border needs: flat names to tensors (not copies)."""
        state = {f"flat.{name}": tensor for name, tensor in self.flat.state_dict().items()}
        state["forward_passes"] = self.passes.counter
        state |= {f"model.{n}": t for n, t in self.model.state_dict().items() if not t.is_floating_point()}
        if self._scaler is not None:
            state |= {f"scaler.{name}": tensor for name, tensor in self._scaler.tensors().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state_dict` back, in place.

        Raises:
            ValueError: a tensor is missing or has another size.
        """
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"{name} is missing or has another size: the state belongs to another recipe")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.flat.cast()

    def _changing(self) -> list[Tensor]:
        """Return every tensor that a step changes and that matters after it."""
        state = [*self.state_dict().values(), *self.cursor.tensors(), self.passes.losses, self.passes.correct]
        return [*state, self.flat.grads, *([] if self.flat.working_copy is None else [self.flat.working_copy])]

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Return a context in which the model has its "raw" or averaged ("ema") weights and BatchNorm statistics.

        Raises:
            ValueError: the recipe has no moving average, or there are no such weights.
        """
        if which == "raw":
            return nullcontext()
        if which != "ema":
            raise ValueError(f'"{which}": the weights are "raw" or "ema"')
        if self._averages is None:
            raise ValueError("the recipe has no ema, so there are no averaged weights")
        return averaged(self.flat, self._averages)


def _headline(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def torch_seed(seed: int, epoch: int) -> int:
    """Return the seed of torch's own generator for an epoch: 0..2**63-1, a function of the run's seed."""
    words = philox(seed, torch.zeros(1, dtype=torch.int64), epoch, 0, Stream.TORCH)
    return int(words[0]) | (int(words[1]) >> 1) << 32


def choose_mode(config: EngineConfig, device: torch.device) -> tuple[bool, bool, str | None]:
    """Return whether to compile, whether to capture, and why that is less than the recipe asks for, or None.

    ``auto`` compiles and captures on a GPU; on a CPU torch.compile costs minutes and wins nothing.
    """
    on_gpu = device.type == "cuda"
    if config.mode == "auto":
        return on_gpu, on_gpu, None
    if config.mode == "graph" and not on_gpu:
        return False, False, 'engine.mode = "graph" needs a CUDA device; the step runs eagerly'
    return config.mode == "compile", config.mode == "graph", None


def use_precision(precision: str) -> None:
    """Let a GPU's matrix products and convolutions round fp32 inputs to tf32, or not; let cuDNN choose by timing."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def build_step(
    recipe: Recipe, model: nn.Module, augment: Any, mix: Any, *, steps_per_epoch: int, device: torch.device
) -> Step:
    """Make the training step of a recipe.

    Args:
        recipe: the whole recipe.
        model: fp32, channels-last; it is moved to the device and its parameters into flat buffers.
        augment: callable (Batch, epoch) -> (B, C, H, W) normalized; see ``fastcifar.augment.augment``.
        mix: callable (images, labels, epoch, step) -> (images, target), or None; see ``fastcifar.augment.mix``.
        steps_per_epoch: batches in an epoch.
        device: where to train.

    Raises:
        UserError: there is not one class weight per class.
    """
    device = torch.device(device)
    if device.type == "cuda":
        use_precision(recipe.engine.precision)
    return Step(recipe, model, augment, mix, steps_per_epoch, device)
