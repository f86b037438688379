"""Knowledge distillation (Hinton et al., 2015, "Distilling the knowledge in a neural network").

Trained models, the teachers, see the very images that the student trains on, augmented and mixed. The student's loss
is a weighted mean of its cross entropy with the labels and T^2 times its Kullback-Leibler divergence from what the
teachers say, all with their logits divided by the temperature T; several teachers say the weighted mean of their
probabilities. What happens to an image in an epoch is a hash, so that their logits can be computed once and kept
(`fastcifar.train.teacher_logits`).

Shapes in the docstrings: B samples, K classes, T teachers, M images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import FIXED_SIZE, DistillConfig, Recipe
from fastcifar.data.store import Store
from fastcifar.errors import UserError
from fastcifar.models import smallest_px
from fastcifar.models.trained import trained_model
from fastcifar.teachers import TeacherRun, teacher_runs
from fastcifar.train.teacher_logits import TeacherLogits

Forward = Callable[[Tensor], Tensor]


def divergence(student: Tensor, teachers: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Return T^2 KL(mean of softmax(teacher / T) || softmax(student / T)), summed over the samples: float32 ().

    Args:
        student: logits (B, K), with their gradient.
        teachers: logits (B, K) of one, or (T, B, K).
        temperature: T, above 0.
        weights: float32 (T,), of the teachers, their sum 1; by default all are equal.
    """
    log_p = F.log_softmax(student.float() / temperature, 1)
    log_q = F.log_softmax(teachers.float() / temperature, -1)
    if log_q.ndim == 3:
        shares = torch.full_like(log_q[:, 0, 0], 1 / len(log_q)) if weights is None else weights
        log_q = torch.logsumexp(log_q + shares.log()[:, None, None], 0)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True)


class TaughtBy(NamedTuple):
    """One teacher.

    Attributes:
        model: in evaluation mode; maps images normalized in its own way, (B, 3, S, S), to logits (B, K).
        scale: (3,), with ``shift`` what makes the student's normalized images those of the teacher.
        shift: (3,).
        weight: its share of what is taught.
    """

    model: nn.Module
    scale: Sequence[float]
    shift: Sequence[float]
    weight: float = 1.0


class Teacher:
    """The trained models that a student learns from, as one.

    Args:
        teachers: the models.
        config: the recipe's ``distill`` table.
        device: where the student trains.
        logits: where what they say is kept, or None to ask them in each step.
    """

    def __init__(
        self, teachers: Sequence[TaughtBy], config: DistillConfig, device: torch.device,
        logits: TeacherLogits | None = None,
    ):
        self._models = [each.model.to(device).requires_grad_(False) for each in teachers]
        self._forwards: list[Forward] = [*self._models]
        self._config, self.logits = config, logits
        self._weights = torch.tensor([each.weight for each in teachers], device=device)
        self._moves = [(_per_channel(each.scale, device), _per_channel(each.shift, device)) for each in teachers]

    def begin_epoch(self, epoch: int) -> None:
        """Take up what is kept of an epoch, counted from 0.

        Raises:
            UserError: nothing is kept of it, any more.
        """
        if self.logits is not None and not self.logits.load(epoch):
            raise UserError(
                f"{self.logits.folder}: the teachers' logits of epoch {epoch + 1} are not there or damaged; "
                "go on with the run (--resume), which computes them again, or set distill.cache = false"
            )

    def compile(self, by: Callable[[nn.Module], Forward] | None) -> None:
        """Execute the models as ``by`` compiles them, or plainly."""
        self._forwards = [*self._models] if by is None else [by(model) for model in self._models]

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """Return the teachers' logits (T, B, K) of images (B, 3, S, S), normalized in the student's way."""
        moved = [(images * scale + shift).to(images.dtype) for scale, shift in self._moves]
        return torch.stack([forward(x) for forward, x in zip(self._forwards, moved, strict=True)])

    def blend(self, loss: Tensor, images: Tensor, logits: Tensor, total: int, indices: Tensor | None = None) -> Tensor:
        """Return the student's whole loss, float32 ().

        Args:
            loss: its cross entropy, ().
            images: what it saw, (B, 3, S, S), normalized in its way.
            logits: its answer, (B, K).
            total: samples of the whole batch, where these are but a part of it.
            indices: int64 (B,), which images of the training set they are; needed where logits are kept.
        """
        theirs = self.see(images) if self.logits is None or indices is None else self.logits.of(indices)
        apart = divergence(logits, theirs, self._config.temperature, self._weights) / total
        return (1 - self._config.weight) * loss + self._config.weight * apart


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def build_teacher(recipe: Recipe, store: Store, device: torch.device) -> Teacher | None:
    """Load the teachers that a recipe names, or None where it names none.

    Args:
        recipe: what the student trains by.
        store: on what.
        device: where the student trains.

    Raises:
        UserError: they are no finished runs, or of other classes or images.
    """
    config = recipe.distill
    if config is None:
        return None
    classes = len(store.classes)
    teachers = [_taught_by(each, recipe, classes, store.image_shape[0]) for each in teacher_runs(config)]
    shape = len(teachers), store.count("train"), classes
    kept = TeacherLogits(recipe, shape, store.manifest.content, device) if config.cache else None
    return Teacher(teachers, config, device, kept)


def _taught_by(teacher: TeacherRun, recipe: Recipe, num_classes: int, image_px: int) -> TaughtBy:
    run = teacher.run
    model, theirs, classes, side_px = trained_model(run, teacher.which)
    if classes != num_classes:
        raise UserError(f"distill.teacher: {run.folder} knows {classes} classes, the data has {num_classes}")
    sizes = {image_px, *(px for _, px in recipe.data.resize)}
    if theirs.model.name in FIXED_SIZE and sizes != {side_px}:
        raise UserError(f"distill.teacher: {run.folder} was made for images of {side_px} px, not {sorted(sizes)}")
    if min(sizes) < (least := smallest_px(theirs.model)):
        raise UserError(f"distill.teacher: {run.folder} takes images of {least} px or more, not of {min(sizes)}")
    ours = zip(recipe.data.std, recipe.data.mean, theirs.data.std, theirs.data.mean, strict=True)
    # (x * std + mean - mean_t) / std_t, channel by channel.
    scale, shift = zip(*((std / std_t, (mean - mean_t) / std_t) for std, mean, std_t, mean_t in ours), strict=True)
    return TaughtBy(model, scale, shift, teacher.weight)
