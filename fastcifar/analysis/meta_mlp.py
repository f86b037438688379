"""The multilayer perceptron that stacking puts on top of its members' logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.kernels.philox import epoch_order
from fastcifar.models import seeded_devices
from fastcifar.train.step import build_step
from fastcifar.train.step_state import torch_seed

EPOCHS = 20
BATCH_SIZE = 128
DROPOUT = 0.3
WIDTHS = (256, 128, 64)
WEIGHT_DECAY = 0.1
# As published. The step asks for a whole recipe; the model that it names is not built, `build_mlp`'s is given.
RECIPE = {
    "name": "meta-mlp",
    "model": {"name": "lenet5"},
    "schedule": {"name": "cosine"},
    "loss": {"label_smoothing": 0.1},
    "train": {"epochs": EPOCHS, "batch_size": BATCH_SIZE},
    "engine": {"device": "cpu", "precision": "fp32"},
}


def build_mlp(inputs: int, classes: int) -> nn.Sequential:
    """Return the network inputs-256-128-64-classes.

    BatchNorm and ReLU follow each hidden layer, dropout 0.3 the first two. It maps float (B, inputs) to (B, classes).
    """
    layers: list[nn.Module] = []
    for depth, (before, after) in enumerate(zip((inputs, *WIDTHS), WIDTHS, strict=False)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        layers += [nn.Dropout(DROPOUT)] if depth < 2 else []
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], classes))


def fit_mlp(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    seed: int,
    *,
    epochs: int = EPOCHS,
    weight_decay: float = WEIGHT_DECAY,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Fit the meta-model with the engine's step: Adam with L2 decay, a cosine over 20 epochs, label smoothing.

    Args:
        features: float32 (N, D), N at least 2.
        labels: int64 (N,), values in 0..classes-1.
        classes: K.
        seed: of the initialization, the order and the dropout; the caller's generator is left alone.
        epochs: stop after this many of the 20 that the cosine spans.
        weight_decay: Adam's L2 decay; the default is the published one.
        after_epoch: called with the number of finished epochs and the model in evaluation mode.

    Returns:
        The model in evaluation mode.
    """
    inputs, answers = torch.from_numpy(features), torch.from_numpy(labels)
    optimizer = {"name": "adam", "lr": 5e-3, "weight_decay": weight_decay}
    recipe = Recipe.model_validate({**RECIPE, "optimizer": optimizer, "seed": seed})
    with torch.random.fork_rng(devices=seeded_devices()), one_thread():
        torch.manual_seed(torch_seed(seed, EPOCHS))  # the step seeds epochs 0 to 19, for the dropout
        model = build_mlp(features.shape[1], classes)
        steps = -(-len(labels) // BATCH_SIZE)
        step = build_step(recipe, model, _rows, None, steps_per_epoch=steps, device=torch.device("cpu"))
        for epoch in range(epochs):
            step.begin_epoch(epoch)
            for rows in epoch_order(len(labels), seed, epoch).split(BATCH_SIZE):
                if len(rows) > 1:  # BatchNorm has no variance of one sample
                    step(Batch(inputs, rows, answers[rows], rows))
            if after_epoch is not None:
                after_epoch(epoch + 1, model.eval())
    return model.eval()


def _rows(batch: Batch, epoch: int | Tensor) -> Tensor:
    """Stand in for the augmentation: the batch's features, as they are."""
    return batch.images[batch.rows]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: layers this small lose more to the threads' waiting than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def mlp_logits(model: nn.Module, features: np.ndarray) -> np.ndarray:
    """Return the model's logits, float32 (N, K), for features float32 (N, D)."""
    return model(torch.from_numpy(features)).numpy()
