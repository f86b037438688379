"""A trained run as a model: its weights, the input that they expect, and predictions for image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcifar.analysis.content import CIFAR10
from fastcifar.config.schema import CombineRecipe
from fastcifar.data.images import read_rgb
from fastcifar.data.pixels import Images
from fastcifar.models.trained import trained_model
from fastcifar.run_directory import RunDirectory
from fastcifar.train.tta import tta_logits


@dataclass(frozen=True)
class Trained:
    """A trained model, ready for new images.

    Attributes:
        model: in evaluation mode, on the CPU, fp32; maps normalized float (B, 3, S, S) to logits (B, K).
        classes: K names.
        mean: per channel, of pixels in 0..1.
        std: per channel, likewise.
        image_px: S.
    """

    model: nn.Module
    classes: list[str]
    mean: list[float]
    std: list[float]
    image_px: int

    def normalized(self, images: Tensor) -> Tensor:
        """Return uint8 (B, S, S, C) images as normalized float32 (B, C, S, S)."""
        mean, std = torch.tensor(self.mean, device=images.device), torch.tensor(self.std, device=images.device)
        return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def load_trained(run: RunDirectory, which: str | None = None) -> Trained:
    """Load a run's model.

    Args:
        run: a training run.
        which: ``last``, ``best`` or ``selected``; None takes ``selected`` where there is one, else ``last``.

    Raises:
        UserError: a combination (it has no weights), weights that are missing or not of this recipe.
    """
    model, recipe, num_classes, image_px = trained_model(run, which)
    return Trained(model, class_names(run, num_classes), list(recipe.data.mean), list(recipe.data.std), image_px)


def class_names(run: RunDirectory, num_classes: int) -> list[str]:
    """Return the class names that a run has recorded, else CIFAR-10's where that was its data, else numbers."""
    if "classes" in run.summary:
        return list(run.summary["classes"])
    source = None if isinstance(run.recipe, CombineRecipe) else run.recipe.data.source
    is_cifar10 = source == "cifar10" and num_classes == len(CIFAR10)
    return list(CIFAR10) if is_cifar10 else [str(i) for i in range(num_classes)]


def read_image(path: Path, image_px: int, *, upright: bool = True) -> np.ndarray:
    """Return an image file as uint8 (S, S, 3): its central square, reduced or enlarged to S x S (bicubic).

    Args:
        path: of the file.
        image_px: S.
        upright: turn it as its EXIF data says, as a photograph wants to be.

    Raises:
        UserError: the file is missing, not a regular file, no image, or too large.
    """
    from PIL import Image, ImageOps

    picture = read_rgb(path, upright=upright)
    if picture.size != (image_px, image_px):
        picture = ImageOps.fit(picture, (image_px, image_px), Image.Resampling.BICUBIC)
    return np.array(picture)


def predict(trained: Trained, images: Images, tta: str = "none", batch_size: int = 250) -> np.ndarray:
    """Return probabilities float32 (N, K) for uint8 (N, S, S, C) images.

    Args:
        trained: from `load_trained`.
        images: of the model's size.
        tta: ``none``, ``flip`` or ``multicrop``.
        batch_size: images a forward pass.
    """
    return torch.from_numpy(logits_of(trained, images, tta, batch_size)).softmax(1).numpy()


@torch.inference_mode()
def logits_of(trained: Trained, images: Images, tta: str = "none", batch_size: int = 250) -> np.ndarray:
    """Return logits float32 (N, K), as `predict` takes them, computed where the model is."""
    device = next(trained.model.parameters()).device
    parts = []
    for start in range(0, len(images), batch_size):
        part = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
        parts.append(tta_logits(trained.model, trained.normalized(part.to(device)), tta).cpu())
    return torch.cat(parts).numpy()


def predict_files(trained: Trained, files: Sequence[Path], tta: str = "none", top: int = 3) -> list[dict[str, Any]]:
    """Return per file its ``file`` and ``top`` classes, most probable first, each with its ``probability`` in 0..1.

    Raises:
        UserError: a file is missing or no image.
    """
    images = np.stack([read_image(path, trained.image_px) for path in files])
    results = []
    for path, p in zip(files, predict(trained, images, tta), strict=True):
        order = np.argsort(-p, kind="stable")[:top]
        classes = [{"class": trained.classes[i], "probability": float(p[i])} for i in order]
        results.append({"file": str(path), "classes": classes})
    return results
