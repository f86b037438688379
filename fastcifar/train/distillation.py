"""Knowledge distillation (Hinton et al., 2015, "Distilling the knowledge in a neural network").

A trained model, the teacher, sees the very images that the student trains on, augmented and mixed. The student's loss
is a weighted mean of its cross entropy with the labels and T^2 times its Kullback-Leibler divergence from the teacher,
both with their logits divided by the temperature T.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import FIXED_SIZE, DistillConfig, Recipe
from fastcifar.errors import UserError
from fastcifar.models.trained import trained_model
from fastcifar.run_directory import RunDirectory


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over the samples: float32 ().

    Args:
        student: logits (B, K), with their gradient.
        teacher: logits (B, K).
        temperature: T, above 0.
    """
    log_p = F.log_softmax(student.float() / temperature, 1)
    log_q = F.log_softmax(teacher.float() / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True)


class Teacher:
    """A trained model that a student learns from.

    Args:
        model: in evaluation mode; maps images normalized in its own way, (B, 3, S, S), to logits (B, K).
        config: the recipe's ``distill`` table.
        scale: (3,), with ``shift`` what makes the student's normalized images those of the teacher.
        shift: (3,).
        device: where the student trains.
    """

    def __init__(
        self, model: nn.Module, config: DistillConfig, scale: Sequence[float], shift: Sequence[float],
        device: torch.device,
    ):
        self._model = model.to(device).requires_grad_(False)
        self._forward: Callable[[Tensor], Tensor] = self._model
        self._config = config
        self._scale, self._shift = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (scale, shift))

    def compile(self, by: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None) -> None:
        """Execute the model as ``by`` compiles it, or plainly."""
        self._forward = self._model if by is None else by(self._model)

    def blend(self, loss: Tensor, images: Tensor, logits: Tensor, total: int) -> Tensor:
        """Return the student's whole loss, float32 ().

        Args:
            loss: its cross entropy, ().
            images: what it saw, (B, 3, S, S), normalized in its way.
            logits: its answer, (B, K).
            total: samples of the whole batch, where these are but a part of it.
        """
        with torch.no_grad():
            theirs = self._forward((images * self._scale + self._shift).to(images.dtype))
        apart = divergence(logits, theirs, self._config.temperature) / total
        return (1 - self._config.weight) * loss + self._config.weight * apart


def build_teacher(recipe: Recipe, num_classes: int, image_px: int, device: torch.device) -> Teacher | None:
    """Load the teacher that a recipe names, or None where it names none.

    Raises:
        UserError: it is no finished run, or of other classes or images.
    """
    config = recipe.distill
    if config is None:
        return None
    run = RunDirectory.open(Path(config.teacher))
    model, theirs, classes, side_px = trained_model(run, config.weights)
    if classes != num_classes:
        raise UserError(f"distill.teacher: {run.folder} knows {classes} classes, the data has {num_classes}")
    sizes = {image_px, *(px for _, px in recipe.data.resize)}
    if theirs.model.name in FIXED_SIZE and sizes != {side_px}:
        raise UserError(f"distill.teacher: {run.folder} was made for images of {side_px} px, not {sorted(sizes)}")
    ours = zip(recipe.data.std, recipe.data.mean, theirs.data.std, theirs.data.mean, strict=True)
    # (x * std + mean - mean_t) / std_t, channel by channel.
    scale, shift = zip(*((std / std_t, (mean - mean_t) / std_t) for std, mean, std_t, mean_t in ours), strict=True)
    return Teacher(model, config, scale, shift, device)
