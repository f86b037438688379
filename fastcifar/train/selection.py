"""Training on the hardest samples of each batch, as a small net beside the model, the proxy, finds them.

Jordan, 2024 (airbench96_faster) trains the proxy first and keeps its choices for the whole run. Nothing of the model
goes into the proxy, so that the same choices come out when both take each step together, with nothing to keep but the
proxy's weights, and a run that stops between two steps goes on. Whether the proxy learns in a step, the host decides;
each answer is a CUDA graph of its own.

Shapes in the docstrings: B samples, k of them kept, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import Recipe
from fastcifar.models import build_model, hooks
from fastcifar.train.flat_parameters import FlatParameters
from fastcifar.train.freeze import build_freeze
from fastcifar.train.loss import cross_entropy
from fastcifar.train.optimizers import build_optimizer
from fastcifar.train.precision import PRECISIONS


class Selection:
    """The proxy with its own flat parameters and optimizer, which is that of the recipe.

    Args:
        recipe: with a ``select`` table.
        proxy: the small net, fitted to images; it is moved to the device and its parameters into flat buffers.
        steps_per_epoch: batches in an epoch.
        class_weights: float32 (K,), or None.
        device: where to train.

    Attributes:
        flat: the proxy's parameters, statistics and optimizer state.
    """

    def __init__(
        self, recipe: Recipe, proxy: nn.Module, steps_per_epoch: int, class_weights: Tensor | None, device: torch.device
    ):
        assert recipe.select is not None
        self._config, self._loss, self._class_weights = recipe.select, recipe.loss, class_weights
        self._precision = PRECISIONS[recipe.engine.precision]
        self._model = proxy.to(device).train()
        self._forward: Callable[[Tensor], Tensor] = self._model
        self.flat = FlatParameters(self._model)
        optimizer = build_optimizer(recipe.optimizer, self.flat, None)
        # It counts the proxy's own steps, of which a run has fewer than steps.
        every = recipe.select.every
        self._optimizer = build_freeze(optimizer, recipe, self._model, self.flat, None, steps_per_epoch, every)

    def compile(self, by: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None) -> None:
        """Execute the proxy as ``by`` compiles it, or plainly."""
        self._forward = self._model if by is None else by(self._model)

    def begin_epoch(self, epoch: int) -> None:
        """Tell the proxy's modules which epoch begins, counted from 0."""
        self.flat.check()
        hooks.begin_epoch(self._model, epoch)

    def learns(self, step: int) -> bool:
        """Return whether the proxy learns in this step of the run, counted from 0."""
        return step % self._config.every == 0

    def phases(self) -> list[bool]:
        """Return what `learns` will be."""
        return [True] if self._config.every == 1 else [False, True]

    def kept(self, samples: int) -> int:
        """Return how many samples of a batch are kept, at least one."""
        return max(1, round(self._config.share * samples))

    def choose(self, images: Tensor, labels: Tensor, lr: Tensor | float, learning: bool) -> Tensor:
        """Return which samples of a batch are the hardest, int64 (k,), ascending; a learning proxy learns from them.

        Args:
            images: normalized, (B, C, H, W), channels-last.
            labels: int64 (B,).
            lr: this step's learning rate.
            learning: whether the proxy takes a step, on what it was right or wrong about just now.
        """
        with torch.set_grad_enabled(learning), self._precision.autocasting(images.device.type):
            logits = self._forward(images)
        losses = F.cross_entropy(
            logits.detach().float(), labels, self._class_weights, reduction="none",
            label_smoothing=self._loss.label_smoothing,
        )  # fmt: skip
        hardest = losses.topk(self.kept(len(labels))).indices.sort().values
        if learning:
            self._learn(logits.index_select(0, hardest), labels[hardest], lr)
        return hardest

    def _learn(self, logits: Tensor, labels: Tensor, lr: Tensor | float) -> None:
        loss = cross_entropy(logits, labels, self._loss, weights=self._class_weights)
        self.flat.clear_gradients()
        (loss * len(labels) if self._loss.reduction == "sum" else loss).backward()
        self.flat.collect_gradients()
        self._optimizer.step(lr)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, by name (not copies)."""
        return self.flat.state_dict()


def taken(images: Tensor, samples: Tensor) -> Tensor:
    """Return some images of a batch (B, C, H, W), in channels-last order as they were."""
    return images.permute(0, 2, 3, 1).index_select(0, samples).permute(0, 3, 1, 2)


def build_selection(
    recipe: Recipe, proxy: nn.Module | None, counter: Tensor, steps_per_epoch: int, class_weights: Tensor | None
) -> Selection | None:
    """Return what selects samples by a proxy, which draws from the step's ``counter``; None without a proxy."""
    if proxy is None:
        return None
    selection = Selection(recipe, proxy, steps_per_epoch, class_weights, counter.device)
    hooks.bind_counter(proxy, counter, recipe.seed)
    return selection


def build_proxy(recipe: Recipe, num_classes: int, image_px: int, device: torch.device) -> nn.Module | None:
    """Build the proxy that a recipe describes, or return None where it selects nothing."""
    if recipe.select is None:
        return None
    model = build_model(recipe.select.model, num_classes=num_classes, image_px=image_px, seed=recipe.seed)
    return model.to(device)
