"""One training step, from a batch of bytes to new weights, and the state that steps share.

Read `Step.execute` from top to bottom: it is all that happens to a batch. Nothing in it waits for the host (no
``.item()``, no branch on a value of the device), so that on a GPU the whole of it, augmentation and both SAM passes
included, is captured once as a CUDA graph and replayed (`fastcifar.train.execution`). The kernels that it calls have
their formulas beside them: `fastcifar.kernels.sam.reference`, `fastcifar.kernels.sgd_ema.reference`.

Shapes in the comments: B samples, C channels, H and W pixels, K classes, n parameters, m BatchNorm statistics.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.kernels.philox import Stream, philox
from fastcifar.kernels.sam import Ascent, ascend, norm_squared
from fastcifar.kernels.sgd_ema import Averages
from fastcifar.models import hooks
from fastcifar.models.batch_norm import set_batches_tracked
from fastcifar.models.norm_act import use_fused_batch_norm
from fastcifar.train.cursor import DeviceCursor, HostCursor, build_cursor
from fastcifar.train.ema import averaged, build_averages
from fastcifar.train.execution import Execution, model_forward
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.freeze import build_freeze
from fastcifar.train.lookahead import Lookahead
from fastcifar.train.loss import Divisors, class_weights, cross_entropy, divisors
from fastcifar.train.optimizers import Optimizer, build_optimizer
from fastcifar.train.precision import PRECISIONS, LossScaler, Precision
from fastcifar.train.schedule import LearningRate, learning_rate


@dataclass(eq=False)
class Step:
    """A recipe's training step with its state; `build_step` puts the parts together.

    Attributes:
        recipe: the whole recipe.
        model: the model, whose parameters are views of ``flat``.
        augment: (Batch, epoch) -> images (B, C, H, W), normalized.
        mix: CutMix or Mixup, (images, labels, epoch, step) -> (images, target), or None.
        flat: weights, gradients and optimizer state in flat buffers.
        forward: what is called as the model: itself, with a working copy of its weights, compiled or not.
        score: `loss_and_correct`, compiled or not.
        precision: what autocast does.
        rate: (epoch, step) -> learning rate.
        cursor: the epoch, the step in it and the learning rate, on the device.
        optimizer: moves the weights.
        averages: the moving averages of weights and statistics, or None.
        ascent: the settings of SAM's ascent step, or None for plain gradients.
        scaler: fp16's loss scaler, or None.
        class_weights: float32 (K,), or None.
        forward_passes: int64 (1,), the number of forward passes so far: what random layers draw from.
        losses: float32 (steps_per_epoch,), each step's mean loss, at w and on augmented images.
        correct: float32 (steps_per_epoch,), how many samples it got right; mixed labels count by their shares.
    """

    recipe: Recipe
    model: nn.Module
    augment: Any
    mix: Any
    flat: FlatParameters
    forward: Callable[[Tensor], Tensor]
    precision: Precision
    rate: LearningRate
    cursor: HostCursor | DeviceCursor
    optimizer: Optimizer
    averages: Averages | None
    ascent: Ascent | None
    scaler: LossScaler | None
    class_weights: Tensor | None
    forward_passes: Tensor
    losses: Tensor
    correct: Tensor
    _sizes: list[int] = field(default_factory=list)

    score: Callable[..., tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.score = self.loss_and_correct
        # Scratch, not state: each step writes them before it reads them.
        self._saved = torch.zeros_like(self.flat.weights) if self.ascent else None
        freeze = self.recipe.asam is not None and self.recipe.asam.batch_norm == "freeze"
        self._stats = self.flat.stats.clone() if freeze else None
        self._skip = self.recipe.engine.on_nonfinite == "skip"
        self._stats_before = self.flat.stats.clone() if self._skip else None
        self.execution = Execution(self)

    # ----------------------------------------------------------------------------------------------- one training step

    def __call__(self, batch: Batch) -> None:
        """Train on one batch: `execute`, or the CUDA graph that was captured from it."""
        self.execution(batch)
        self._sizes.append(len(batch.rows))

    def execute(self, batch: Batch) -> None:
        """Train on one batch, operation by operation."""
        flat, cursor, saved = self.flat, self.cursor, None
        if self._stats_before is not None:
            self._stats_before.copy_(flat.stats)
        images, target = self.inputs(batch)  # uint8 (B, H, W, C) -> bf16 (B, C, H, W)

        # The gradient at w.
        loss, correct = self.backward(images, target)
        cursor.record(self.losses, loss)
        cursor.record(self.correct, correct)

        if self.ascent is not None and self._saved is not None:
            # SAM's ascent step: to w + e, the point nearby where the loss is highest to first order. The norm of the
            # gradient stays on the device, as partial sums.
            partials = norm_squared(flat.weights, flat.grads, self.ascent)
            self._observe(partials)
            ascend(flat.weights, flat.grads, self._saved, partials, self.ascent, flat.working_copy)
            saved = self._saved
            # The gradient at w + e. Published code lets this pass move BatchNorm's running statistics once more;
            # batch_norm = "freeze" takes that back.
            if self._stats is not None:
                self._stats.copy_(flat.stats)
            self.backward(images, target)
            if self._stats is not None:
                flat.stats.copy_(self._stats)

        # The optimizer step: back to w, along the gradient at w + e; the moving averages follow in the same launch.
        coefficient = self._coefficient(loss)
        if self._stats_before is not None and coefficient is not None:
            flat.stats.copy_(torch.where(torch.isfinite(coefficient), flat.stats, self._stats_before))
        self.optimizer.step(cursor.lr, saved=saved, coefficient=coefficient)
        if self.scaler is not None:
            self.scaler.advance()
        cursor.advance()

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the augmented, normalized, mixed images (B, C, H, W) and their target: labels, or mixed labels."""
        images = self.augment(batch, self.cursor.epoch)
        if self.mix is None:
            return images, batch.labels
        return self.mix(images, batch.labels, self.cursor.epoch, self.cursor.step)

    def backward(self, images: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """Run forward and backward and leave the gradient of the mean (or summed) loss in ``flat.grads``.

        With ``train.accumulate`` above 1 the batch goes through in micro-batches, whose gradients autograd adds up;
        each loss is divided by what the whole batch's would be.

        Returns:
            The mean loss and the number of right answers, both () on the device.
        """
        accumulate, losses, correct = self.recipe.train.accumulate, [], []
        divide = divisors(target, self.class_weights) if accumulate > 1 else None
        self.flat.clear_gradients()
        for x, y in split(images, target, -(-len(images) // accumulate)):
            self.forward_passes.add_(1)
            with self.precision.autocasting(x.device.type):
                logits = self.forward(x)
            loss, count = self.score(logits, y, divide)
            objective = loss
            if self.recipe.loss.reduction == "sum":
                # The mean times what it was divided by, which without class weights is the whole batch's size.
                objective = loss * len(images)
            (objective if self.scaler is None else objective * self.scaler.scale[0]).backward()
            losses.append(loss.detach())
            correct.append(count)
        self.flat.collect_gradients()
        return (losses[0], correct[0]) if accumulate == 1 else (torch.stack(losses).sum(), torch.stack(correct).sum())

    def loss_and_correct(self, logits: Tensor, target: Any, divide: Divisors | None) -> tuple[Tensor, Tensor]:
        """Return the mean loss, with its gradient, and the number of right answers, both () on the device.

        Args:
            logits: (B, K).
            target: int64 (B,) labels, or mixed labels.
            divide: what the loss is divided by where these are but a part of the batch.
        """
        loss = cross_entropy(logits, target, self.recipe.loss, weights=self.class_weights, divide=divide)
        return loss, right(logits.detach(), target)

    def _coefficient(self, loss: Tensor) -> Tensor | None:
        """Return what the optimizer multiplies the gradient by (unscaling, clipping): float32 (1,), or None.

        NaN leaves the step out: with ``engine.on_nonfinite = "skip"`` where the loss or the gradient's norm is not
        finite.
        """
        clip = self.recipe.train.grad_clip
        if not clip and self.scaler is None and not self._skip:
            return None
        partials = norm_squared(self.flat.weights, self.flat.grads)
        self._observe(partials)
        coefficient = torch.ones_like(partials[:1]) if self.scaler is None else self.scaler.coefficient()
        if clip:
            norm = partials.sum().sqrt() * coefficient
            coefficient = coefficient * (clip / (norm + 1e-6)).clamp(max=1.0)
        if self._skip:
            coefficient = torch.where(torch.isfinite(partials.sum() + loss), coefficient, torch.nan)
        return coefficient

    def _observe(self, partials: Tensor) -> None:
        if self.scaler is not None:
            self.scaler.observe(partials)

    # ----------------------------------------------------------------------------------------------------------- epochs

    def begin_epoch(self, epoch: int) -> float:
        """Go to the start of an epoch (counted from 0) and return its first learning rate.

        It seeds torch's generator from (seed, epoch), so that dropout is the same after a resume, and tells the model
        (`fastcifar.models.hooks.FollowsEpochs`).
        """
        self.flat.check()
        self.model.train()
        hooks.begin_epoch(self.model, epoch)
        torch.manual_seed(torch_seed(self.recipe.seed, epoch))
        self.cursor.begin(epoch)
        self._sizes = []
        return self.rate(epoch, 0)

    def end_epoch(self) -> dict[str, Any]:
        """Return the epoch's results: the one host-device synchronization of an epoch.

        Returns:
            ``loss`` (mean over samples), ``accuracy`` in percent (both of the first passes, on augmented images),
            ``samples``, and ``nonfinite_step``: the number, from 1, of the epoch's first step whose loss was not
            finite, or None. With ``engine.on_nonfinite = "skip"`` the mean is over the other steps.
        """
        set_batches_tracked(self.model, self.forward_passes)
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        losses = self.losses[: len(sizes)].to("cpu", torch.float64)
        correct = self.correct[: len(sizes)].to("cpu", torch.float64)
        bad = (~torch.isfinite(losses)).nonzero()
        samples = int(sizes.sum())
        if self._skip:
            sizes, losses = sizes * torch.isfinite(losses), losses.nan_to_num(0.0, 0.0, 0.0)
        return {
            "loss": float((losses * sizes).sum() / max(int(sizes.sum()), 1)),
            "accuracy": float(100 * correct.sum() / max(samples, 1)),
            "samples": samples,
            "nonfinite_step": int(bad[0]) + 1 if len(bad) else None,
        }

    def step_losses(self) -> Tensor:
        """Return the loss of each step of this epoch so far: float32 (steps,), a copy on the host."""
        return self.losses[: len(self._sizes)].cpu().clone()

    # ------------------------------------------------------------------------------------------------------------ state

    def position(self) -> tuple[list[int], dict[str, Tensor]]:
        """Return what a bit-identical resume between two steps of an epoch needs beside `state_dict`.

        Returns:
            The samples of each step so far, and tensors: ``losses`` and ``correct`` (steps,), generator states.
        """
        steps = len(self._sizes)
        tensors = {
            "losses": self.losses[:steps], "correct": self.correct[:steps],
            "generator": torch.get_rng_state(),
        }
        if self.losses.is_cuda:
            tensors["cuda_generator"] = torch.cuda.get_rng_state(self.losses.device)
        return list(self._sizes), tensors

    def go_to(self, sizes: list[int], tensors: dict[str, Tensor]) -> None:
        """Go on within the epoch that `begin_epoch` has just begun, from a `position`.

        Raises:
            UserError: the position does not fit this epoch.
        """
        steps = len(sizes)
        if steps > self.cursor.steps_per_epoch or any(len(tensors.get(k, ())) != steps for k in ("losses", "correct")):
            raise UserError("the checkpoint's place within the epoch does not fit the recipe: it is damaged")
        self.losses[:steps].copy_(tensors["losses"])
        self.correct[:steps].copy_(tensors["correct"])
        self._sizes = list(sizes)
        for _ in sizes:
            self.cursor.advance()
        torch.set_rng_state(tensors["generator"])
        if "cuda_generator" in tensors and self.losses.is_cuda:
            torch.cuda.set_rng_state(tensors["cuda_generator"], self.losses.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that a bit-identical resume at an epoch boundary needs: flat names to tensors (not copies)."""
        state = {f"flat.{name}": tensor for name, tensor in self.flat.state_dict().items()}
        state["forward_passes"] = self.forward_passes
        state |= {f"model.{n}": t for n, t in self.model.state_dict().items() if not t.is_floating_point()}
        if self.scaler is not None:
            state |= {f"scaler.{name}": tensor for name, tensor in self.scaler.tensors().items()}
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

    def changing(self) -> Iterable[Tensor]:
        """Return every tensor that a step changes and that matters after it: what a warm-up has to put back."""
        tensors = [*self.state_dict().values(), *self.cursor.tensors(), self.losses, self.correct]
        return tensors if self.flat.working_copy is None else [*tensors, self.flat.working_copy]

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Return a context in which the model has its "raw" or averaged ("ema") weights and BatchNorm statistics.

        Raises:
            ValueError: the recipe has no moving average, or there are no such weights.
        """
        if which == "raw":
            return nullcontext()
        if which != "ema":
            raise ValueError(f'"{which}": the weights are "raw" or "ema"')
        if self.averages is None:
            raise ValueError("the recipe has no ema, so there are no averaged weights")
        return averaged(self.flat, self.averages)


def right(logits: Tensor, target: Any) -> Tensor:
    """Return how many of logits (B, K) are highest at their label: (); mixed labels count by their shares."""
    best = logits.argmax(1)
    if isinstance(target, Tensor):
        return (best == target).sum()
    labels_a, labels_b, lam = target
    return (lam * (best == labels_a) + (1 - lam) * (best == labels_b)).sum()


def split(images: Tensor, target: Any, size: int) -> Iterator[tuple[Tensor, Any]]:
    """Yield (images, target) in micro-batches of ``size`` samples, the last one perhaps smaller."""
    if size >= len(images):
        yield images, target
        return
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        if isinstance(target, Tensor):
            yield images[part], target[part]
        else:
            labels_a, labels_b, lam = target
            yield images[part], (labels_a[part], labels_b[part], lam[part] if lam.ndim else lam)


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
        model: fp32, channels-last; it is moved to the device and its parameters into flat buffers.
        augment: callable (Batch, epoch) -> (B, C, H, W) normalized; see ``fastcifar.augment.augment``.
        mix: callable (images, labels, epoch, step) -> (images, target), or None; see ``fastcifar.augment.mix``.
        steps_per_epoch: batches in an epoch.
        device: where to train.

    Raises:
        UserError: there is not one class weight per class.
    """
    precision, asam = PRECISIONS[recipe.engine.precision], recipe.asam
    if device.type == "cuda":
        precision.apply_to_cuda()
    flat = FlatParameters(model.to(device))
    averages = build_averages(flat, recipe.ema)
    rate = learning_rate(recipe.schedule, recipe.optimizer.lr, recipe.train.epochs, steps_per_epoch)
    forward_passes = torch.zeros(1, dtype=torch.int64, device=device)
    hooks.bind_counter(model, forward_passes, recipe.seed)
    use_fused_batch_norm(model, device.type == "cuda" and recipe.engine.fused_batch_norm is not False)
    skip = precision.scaled or recipe.engine.on_nonfinite == "skip"
    optimizer = build_optimizer(recipe.optimizer, flat, averages, skip=skip)
    if recipe.lookahead:
        optimizer = Lookahead(optimizer, recipe.lookahead, flat, recipe.train.epochs * steps_per_epoch)
    # Outermost, so that nothing moves what is frozen.
    optimizer = build_freeze(optimizer, recipe, model, flat, averages, steps_per_epoch)
    scaled_end = flat.weights.numel() if asam and asam.scope == "all" else flat.weight_end
    return Step(
        recipe=recipe, model=model, augment=augment, mix=mix, flat=flat, precision=precision, rate=rate,
        forward=model_forward(model, flat, working_copy_dtype(recipe, device)),
        cursor=build_cursor(rate, steps_per_epoch, device),
        optimizer=optimizer, averages=averages,
        ascent=Ascent(asam.rho, asam.adaptive, asam.eta, scaled_end) if asam else None,
        scaler=LossScaler(device) if precision.scaled else None,
        class_weights=class_weights(recipe.loss, _classes(model), device),
        forward_passes=forward_passes,
        losses=torch.zeros(steps_per_epoch, device=device),
        correct=torch.zeros(steps_per_epoch, device=device),
    )  # fmt: skip


def working_copy_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which a working copy of the weights is kept, or None for none.

    ``auto`` keeps one on a GPU, where it saves casts and bytes; with micro-batches, gradients would add up in 16 bits.
    """
    wanted = recipe.engine.working_copy
    if wanted == "auto":
        wanted = device.type == "cuda" and recipe.train.accumulate == 1
    return PRECISIONS[recipe.engine.precision].autocast if wanted else None


def _classes(model: nn.Module) -> int:
    """Return the number of outputs: that of the last linear layer."""
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return widths[-1] if widths else 0
