"""Evaluation: logits of a whole split; every figure is computed from them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.augment.augment import Augment

# A split is kept on the device while it takes no more than this; larger ones are sent batch by batch.
RESIDENT_BYTES = 1 << 30


@dataclass(frozen=True)
class Metrics:
    """What one pass over a split gives.

    Attributes:
        logits: float32 (N, classes), on the CPU.
        accuracy: percent, 0..100.
        loss: mean cross entropy in nats, without label smoothing.
    """

    logits: np.ndarray
    accuracy: float
    loss: float

    def row(self) -> dict[str, float]:
        """Return the metrics without the logits."""
        return {"accuracy": self.accuracy, "loss": self.loss}


def metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Compute accuracy and loss from logits (N, classes) and labels int64 (N,), both on one device."""
    logits = logits.float()
    right = (logits.argmax(1) == labels).sum().item()
    loss = F.cross_entropy(logits, labels).item()
    return Metrics(logits.cpu().numpy(), 100.0 * right / len(labels), loss)


class EvaluationSet:
    """The images to evaluate on, normalized on the fly and never augmented.

    Args:
        images: uint8 (N, H, W, C), possibly memory-mapped.
        labels: int64 (N,).
        augment: its ``plain`` normalizes a batch.
        batch_size: images a forward pass.
        precision: ``bf16``, ``fp16``, ``fp32`` or ``tf32``, as in training.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        augment: Augment,
        device: torch.device,
        batch_size: int,
        precision: str,
    ) -> None:
        self._device, self._augment, self._batch_size = device, augment, batch_size
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self._images = torch.from_numpy(np.ascontiguousarray(images))
        if images.nbytes <= RESIDENT_BYTES:
            self._images = self._images.to(device)
        self.labels = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @torch.inference_mode()
    def logits(self, model: nn.Module, forward: Any = None) -> Tensor:
        """Return the model's logits, float32 (N, classes) on the device.

        Args:
            model: put into evaluation mode for the pass and back.
            forward: what to call on a normalized batch instead of the model (test-time augmentation).
        """
        was_training = model.training
        model.eval()
        with torch.autocast(self._device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            parts = [(forward or model)(self._batch(start)).float() for start in range(0, len(self), self._batch_size)]
        model.train(was_training)
        return torch.cat(parts)

    def metrics(self, model: nn.Module, forward: Any = None) -> Metrics:
        """Return logits, accuracy and loss of the model on this set."""
        return metrics(self.logits(model, forward), self.labels)

    def _batch(self, start: int) -> Tensor:
        images = self._images[start : start + self._batch_size].to(self._device, non_blocking=True)
        return self._augment.plain(images)
