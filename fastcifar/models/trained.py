"""The model of a finished run, with its trained weights."""

from typing import NamedTuple

from torch import nn

from fastcifar.config.schema import CombineRecipe, Recipe
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.run_directory import RunDirectory


class TrainedModel(NamedTuple):
    """A run's model.

    Attributes:
        model: in evaluation mode, on the CPU, fp32; maps normalized float (B, 3, S, S) to logits (B, K).
        recipe: what it was trained by.
        num_classes: K.
        image_px: S.
    """

    model: nn.Module
    recipe: Recipe
    num_classes: int
    image_px: int


def trained_model(run: RunDirectory, which: str | None = None) -> TrainedModel:
    """Build a run's model and load its weights.

    Args:
        run: a training run.
        which: ``last``, ``best`` or ``selected``; None takes ``selected`` where there is one, else ``last``.

    Raises:
        UserError: a combination (it has no weights), weights that are missing or not of this recipe.
    """
    recipe = run.recipe
    if isinstance(recipe, CombineRecipe):
        raise UserError(f"{run.folder}: is a combination and has no weights of its own; name one of its members")
    which = which or run.default_weights()
    weights = run.weights(which)
    num_classes = run.logits(f"test/last/{run.summary['weights']}").shape[1]
    image_px = int(run.summary.get("image_px", 32))
    model = build_model(recipe.model, num_classes=num_classes, image_px=image_px, seed=recipe.seed)
    try:
        model.load_state_dict(weights)  # every name accounted for
    except RuntimeError as error:
        path = run.folder / "weights" / f"{which}.safetensors"
        raise UserError(f"{path}: cannot be loaded into the recipe's model: {error}") from None
    return TrainedModel(model.eval(), recipe, num_classes, image_px)
