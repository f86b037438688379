"""The multilayer perceptron that stacking puts on top of its members' logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.philox import Stream, epoch_order, philox

EPOCHS = 20
BATCH_SIZE = 128
LR = 5e-3
WEIGHT_DECAY = 0.1
LABEL_SMOOTHING = 0.1
DROPOUT = 0.3
WIDTHS = (256, 128, 64)


def build_mlp(inputs: int, classes: int) -> nn.Sequential:
    """Return the network inputs-256-128-64-classes.

    BatchNorm and ReLU follow each hidden layer, dropout 0.3 the first two. It maps float (B, inputs) to (B, classes).
    """
    layers: list[nn.Module] = []
    for depth, (before, after) in enumerate(zip((inputs, *WIDTHS), WIDTHS, strict=False)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
        layers += [nn.Dropout(DROPOUT)] if depth < 2 else []
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-1], classes))


@dataclass(frozen=True)
class Training:
    """The rows to fit on: features float32 (N, D), labels int64 (N,), and the number of classes."""

    features: Tensor
    labels: Tensor
    classes: int


def fit_mlp(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    seed: int,
    *,
    epochs: int = EPOCHS,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Fit the meta-model: Adam with L2 decay, a cosine over 20 epochs, batches of 128, label smoothing.

    Args:
        features: float32 (N, D), N at least 2.
        labels: int64 (N,), values in 0..classes-1.
        classes: K.
        seed: of the initialization, the order and the dropout; the caller's generator is left alone.
        epochs: stop after this many of the 20 that the cosine spans.
        after_epoch: called with the number of finished epochs and the model in evaluation mode.

    Returns:
        The model in evaluation mode.
    """
    data = Training(torch.from_numpy(features), torch.from_numpy(labels), classes)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(_torch_seed(seed))
        model = build_mlp(features.shape[1], classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
        for epoch in range(epochs):
            _train_epoch(model, optimizer, data, epoch_order(len(labels), seed, epoch))
            schedule.step()
            if after_epoch is not None:
                after_epoch(epoch + 1, model.eval())
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: layers this small lose more to the threads' waiting than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_seed(seed: int) -> int:
    """Return the seed of torch's generator that belongs to a run's seed."""
    return int(philox(seed, torch.zeros(1, dtype=torch.int64), 0, 0, Stream.TORCH)[0])


def _train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Training, order: Tensor) -> None:
    model.train()
    for rows in order.split(BATCH_SIZE):
        if len(rows) < 2:  # BatchNorm has no variance of one sample
            continue
        loss = F.cross_entropy(model(data.features[rows]), data.labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def mlp_logits(model: nn.Module, features: np.ndarray) -> np.ndarray:
    """Return the model's logits, float32 (N, K), for features float32 (N, D)."""
    return model(torch.from_numpy(features)).numpy()
