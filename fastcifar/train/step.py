"""One training step, from a batch of bytes to new weights.

Read `Step.execute` from top to bottom: it is all that happens to a batch. Nothing in it waits for the host (no
``.item()``, no branch on a value of the device), so that on a GPU the whole of it, augmentation and both SAM passes
included, is captured once as a CUDA graph and replayed (`fastcifar.train.execution`). On several devices each has a
slice of the batch, and `Ranks.sum` adds up their gradients (`fastcifar.train.ranks`). The kernels that it calls have
their formulas beside them: `fastcifar.kernels.sam.reference`, `fastcifar.kernels.sgd_ema.reference`. What steps share,
and what happens around an epoch, is `fastcifar.train.step_state`.

Shapes in the comments: B samples, C channels, H and W pixels, K classes, n parameters, m BatchNorm statistics.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config.schema import EngineConfig, Recipe, UserModelConfig
from fastcifar.data.batch import Batch
from fastcifar.kernels.sam import Ascent, ascend, norm_squared
from fastcifar.models import hooks
from fastcifar.models.batch_norm import use_sync_batch_norm
from fastcifar.models.norm_act import use_fused_batch_norm
from fastcifar.train.cursor import build_cursor
from fastcifar.train.distillation import Teacher
from fastcifar.train.ema import build_averages
from fastcifar.train.execution import Execution, model_forward
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.freeze import build_freeze
from fastcifar.train.lookahead import Lookahead
from fastcifar.train.loss import Divisors, class_weights, cross_entropy, divisors, right, split
from fastcifar.train.mixing import mixed
from fastcifar.train.optimizers import build_optimizer
from fastcifar.train.precision import PRECISIONS, LossScaler
from fastcifar.train.ranks import ALONE, Ranks
from fastcifar.train.schedule import learning_rate
from fastcifar.train.selection import build_selection, taken
from fastcifar.train.step_state import StepState
from fastcifar.train.user_optimizer import UserOptimizer


@dataclass(eq=False)
class Step(StepState):
    """A recipe's training step; `build_step` puts its parts together.

    Attributes:
        score: `loss_and_correct`, compiled or not.
        execution: how `execute` is carried out: eagerly, compiled, as a CUDA graph.
    """

    def __post_init__(self) -> None:
        self.score: Callable[..., tuple[Tensor, Tensor]] = self.loss_and_correct
        # Scratch, not state: each step writes them before it reads them.
        self._saved = torch.zeros_like(self.flat.weights) if self.ascent else None
        freeze = self.recipe.asam is not None and self.recipe.asam.batch_norm == "freeze"
        self._stats = self.flat.stats.clone() if freeze else None
        # m-sharpness: each rank goes up along its own gradient.
        self._ascends_alone = self.recipe.asam is not None and self.recipe.asam.norm == "rank"
        self._skip = self.recipe.engine.on_nonfinite == "skip"
        # The loss scaler skips steps as well, and what overflows within the model is in its statistics by then.
        self._stats_before = self.flat.stats.clone() if self._skip or self.scaler is not None else None
        self.execution = Execution(self)

    def __call__(self, batch: Batch) -> None:
        """Train on one batch: `execute`, or the CUDA graph that was captured from it."""
        self.phase = self.next_phase()
        self.execution(batch)
        self._sizes.append(batch.total if self.selection is None else self.selection.kept(batch.total))

    def execute(self, batch: Batch) -> None:
        """Train on one batch, operation by operation."""
        flat, cursor, saved = self.flat, self.cursor, None
        # Where bad steps are skipped, the forward pass must not leave their statistics behind either.
        if self._stats_before is not None:
            self._stats_before.copy_(flat.stats)
        images, target = self.inputs(batch)  # uint8 (B, H, W, C) -> bf16 (B, C, H, W)
        total, indices = batch.total, batch.indices
        if self.selection is not None:
            hardest = self.selection.choose(images, target, cursor.lr, self.phase.proxy_learns)
            images, target, indices = taken(images, hardest), target[hardest], indices[hardest]
            total = len(images)

        # The gradient at w, of all ranks' samples; or of each rank's own, where each makes an ascent step of its own.
        alone = self.phase.ascending and self._ascends_alone
        loss, correct = self.backward(images, target, total, indices)
        if not alone:
            self.ranks.sum(flat.grads)
        # Kept on the device until the epoch ends: reading a loss here would make the host wait for it.
        cursor.record(self.losses, loss)
        cursor.record(self.correct, correct)

        if self.phase.ascending and self.ascent is not None and self._saved is not None:
            # SAM's ascent step: to w + e, the point nearby where the loss is highest to first order. The norm of the
            # gradient stays on the device, as partial sums.
            partials = norm_squared(flat.weights, flat.grads, self.ascent)
            self._observe(partials, alone)
            ascend(flat.weights, flat.grads, self._saved, partials, self.ascent, flat.working_copy)
            saved = self._saved
            # The gradient at w + e. Published code lets this pass move BatchNorm's running statistics once more;
            # batch_norm = "freeze" takes that back.
            if self._stats is not None:
                self._stats.copy_(flat.stats)
            # The same images and the same mix as at w: the two gradients must be of one function.
            self.backward(images, target, total, indices)
            self.ranks.sum(flat.grads)
            if self._stats is not None:
                flat.stats.copy_(self._stats)

        # The optimizer step: back to w, along the gradient at w + e; the moving averages follow in the same launch.
        coefficient = self._coefficient(loss)
        if self._stats_before is not None and coefficient is not None:
            flat.stats.copy_(torch.where(torch.isfinite(coefficient), flat.stats, self._stats_before))
        self.optimizer.step(cursor.lr, saved=saved, coefficient=coefficient)
        # After the step, so that both passes and the optimizer saw one scale.
        if self.scaler is not None:
            self.scaler.advance()
        cursor.advance()

    def inputs(self, batch: Batch) -> tuple[Tensor, Any]:
        """Return the augmented, normalized, mixed images (B, C, H, W) and their target: labels, or mixed labels."""
        images = self.augment(batch, self.cursor.epoch)
        hooks.take_share(self.model, batch.share)
        if self.mix is None:
            return images, batch.labels
        return mixed(self.mix, images, batch, self.cursor.epoch, self.cursor.step, self.ranks)

    def backward(
        self, images: Tensor, target: Any, total: int, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward and leave the gradient of the mean (or summed) loss in ``flat.grads``.

        With ``train.accumulate`` above 1 the batch goes through in micro-batches, whose gradients autograd adds up.
        Their losses, and those of several ranks, are divided by what the whole batch's would be.

        Args:
            images: (B, C, H, W), this rank's.
            target: labels, or mixed labels.
            total: samples of the whole batch.
            indices: int64 (B,), which images of the training set they are, for teachers whose logits are kept.

        Returns:
            The mean loss and the number of right answers, both () on the device: this rank's part of them.
        """
        accumulate, losses, correct, done = self.recipe.train.accumulate, [], [], 0
        in_parts = accumulate > 1 or self.ranks.world > 1
        divide = divisors(target, self.class_weights, total, self.ranks) if in_parts else None
        self.flat.clear_gradients()
        for x, y in split(images, target, -(-len(images) // accumulate)):
            # Before the pass: ShakeDrop draws by this number, so that SAM's second pass has other draws than the first.
            self.forward_passes.add_(1)
            with self.precision.autocasting(x.device.type):
                logits = self.forward(x)
            # Outside autocast: log-softmax and the sum over the batch need fp32's range and precision.
            loss, count = self.score(logits, y, divide)
            if self.teacher is not None:
                rows = None if indices is None else indices[done : done + len(x)]
                with self.precision.autocasting(x.device.type):
                    loss = self.teacher.blend(loss, x, logits, total, rows)
            objective = loss
            if self.recipe.loss.reduction == "sum":
                # The mean times what it was divided by, which without class weights is the whole batch's size.
                objective = loss * total
            (objective if self.scaler is None else objective * self.scaler.scale[0]).backward()
            done += len(x)
            losses.append(loss.detach())
            correct.append(count)
        # From where autograd left them into one buffer, in one launch; what follows works on that buffer.
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
        # Not scaled by the weights, as ASAM's norm is: what counts here is the gradient that the optimizer takes.
        partials = norm_squared(self.flat.weights, self.flat.grads)
        self._observe(partials)
        coefficient = torch.ones_like(partials[:1]) if self.scaler is None else self.scaler.coefficient()
        if clip:
            # The norm of the true gradient: what is in memory still has the loss scale in it.
            norm = partials.sum().sqrt() * coefficient
            coefficient = coefficient * (clip / (norm + 1e-6)).clamp(max=1.0)
        if self._skip:
            finite = torch.isfinite(partials.sum() + self.ranks.sum(loss))
            coefficient = torch.where(finite, coefficient, torch.nan)
        return coefficient

    def _observe(self, partials: Tensor, alone: bool = False) -> None:
        if self.scaler is not None:
            self.scaler.observe(self.ranks.sum(partials.clone()) if alone else partials)


def build_step(
    recipe: Recipe, model: nn.Module, augment: Any, mix: Any, steps_per_epoch: int, device: torch.device,
    ranks: Ranks = ALONE, teacher: Teacher | None = None, proxy: nn.Module | None = None,
) -> Step:
    """Make the training step of a recipe.

    Args:
        recipe: the whole recipe.
        model: fp32, channels-last; it is moved to the device and its parameters into flat buffers.
        augment: callable (Batch, epoch) -> (B, C, H, W) normalized; see ``fastcifar.augment.augment``.
        mix: callable (images, labels, epoch, step) -> (images, target), or None; see ``fastcifar.augment.mix``.
        steps_per_epoch: batches in an epoch.
        device: where to train.
        ranks: those that divide each batch.
        teacher: the trained model to learn from, or None.
        proxy: the small net that chooses samples, for a recipe that selects.

    Raises:
        UserError: there is not one class weight per class.
    """
    precision, asam = PRECISIONS[recipe.engine.precision], recipe.asam
    if device.type == "cuda":
        precision.apply_to_cuda()
    # First of all: whatever holds a parameter from here on holds a view that stays.
    flat = FlatParameters(model.to(device))
    averages = build_averages(flat, recipe.ema)
    rate = learning_rate(recipe.schedule, recipe.optimizer.lr, recipe.train.epochs, steps_per_epoch)
    forward_passes = torch.zeros(1, dtype=torch.int64, device=device)
    hooks.bind_counter(model, forward_passes, recipe.seed)
    choose_batch_norm(recipe.engine, model, device, ranks)
    skip = precision.scaled or recipe.engine.on_nonfinite == "skip"
    optimizer = build_optimizer(recipe.optimizer, flat, averages, skip=skip)
    user_optimizer = optimizer if isinstance(optimizer, UserOptimizer) else None
    if recipe.lookahead:
        optimizer = Lookahead(optimizer, recipe.lookahead, flat, recipe.train.epochs * steps_per_epoch)
    # Outermost, so that nothing moves what is frozen.
    optimizer = build_freeze(optimizer, recipe, model, flat, averages, steps_per_epoch)
    weights = class_weights(recipe.loss, _classes(recipe, model), device)
    # The authors scale weights, not biases; the flat order puts the weights first, so that a number says which.
    scaled_end = flat.weights.numel() if asam and asam.scope == "all" else flat.weight_end
    return Step(
        recipe=recipe, model=model, augment=augment, mix=mix, flat=flat, precision=precision, rate=rate,
        forward=model_forward(model, flat, working_copy_dtype(recipe, device)),
        cursor=build_cursor(rate, steps_per_epoch, device),
        optimizer=optimizer, averages=averages,
        ascent=Ascent(asam.rho, asam.adaptive, asam.eta, scaled_end) if asam else None,
        scaler=LossScaler(device) if precision.scaled else None,
        class_weights=weights, forward_passes=forward_passes,
        losses=torch.zeros(steps_per_epoch, device=device), correct=torch.zeros(steps_per_epoch, device=device),
        user_optimizer=user_optimizer, ranks=ranks, teacher=teacher,
        selection=build_selection(recipe, proxy, forward_passes, steps_per_epoch, weights),
    )  # fmt: skip


def choose_batch_norm(config: EngineConfig, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Let BatchNorm layers work over all ranks, fused, or plainly, as the recipe asks for and as can be here."""
    synced = ranks.world > 1 and config.batch_norm == "sync"
    use_sync_batch_norm(model, ranks.data if synced else None)
    use_fused_batch_norm(model, device.type == "cuda" and config.fused_batch_norm is not False and not synced)


def working_copy_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Return the dtype in which a working copy of the weights is kept, or None for none.

    ``auto`` keeps one on a GPU, where it saves casts and bytes; with micro-batches, gradients would add up in 16 bits.
    """
    wanted = recipe.engine.working_copy
    if wanted == "auto":
        wanted = device.type == "cuda" and recipe.train.accumulate == 1
    return PRECISIONS[recipe.engine.precision].autocast if wanted else None


def _classes(recipe: Recipe, model: nn.Module) -> int:
    """Return the number of outputs: that of the last linear layer; of a model of the user's own, as many as weights."""
    if isinstance(recipe.model, UserModelConfig):
        return len(recipe.loss.class_weights or [])  # `check_data` has compared them with the classes of the data
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return widths[-1] if widths else 0
