"""A model that a recipe names by import path: made, and tried on two images before anything is trained."""

import torch
from torch import nn

from fastcifar.config import user_code
from fastcifar.config.schema import UserModelConfig
from fastcifar.errors import UserError
from fastcifar.models.hooks import bind_counter


def build(config: UserModelConfig, num_classes: int, image_px: int) -> nn.Module:
    """Build the module that ``config`` names and make sure that it maps images to logits.

    Raises:
        UserError: it cannot be found or made, is no `torch.nn.Module`, gives something else than one logit a class, or
            has a parameter or a buffer that is not finite, or of another floating-point type than float32.
    """
    builder = user_code.model_builder(config.name)
    options = user_code.offered(builder, config.name, num_classes, image_px) | config.options
    model = user_code.call(builder, f'model.name: "{config.name}"', **options)
    if not isinstance(model, nn.Module):
        raise UserError(f'model.name: "{config.name}" made a {type(model).__name__}, not a torch.nn.Module')
    _check_types(model, config.name)
    check_logits(model, config.name, num_classes, image_px)
    _check_finite(model, config.name)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f'model.name: "{config.name}" has no parameter that learns')
    return model


def _check_types(model: nn.Module, name: str) -> None:
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f'model.name: "{name}": {key} is {kind}; make it float32, engine.precision does the rest'
            )


def _check_finite(model: nn.Module, name: str) -> None:
    # An average of such a value is not a number, and a run ends where a value of its state ceases to be one.
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f'model.name: "{name}": {key} has values that are not finite; a mask of infinities is no state: '
                "keep it with register_buffer(..., persistent=False)"
            )


@torch.no_grad()
def check_logits(model: nn.Module, name: str, num_classes: int, image_px: int) -> None:
    """Run two black images through a model in evaluation mode, which also gives lazy modules their shapes."""
    training = model.training
    bind_counter(model, torch.zeros(1, dtype=torch.int64), seed=0)
    logits = user_code.call(model.eval(), f'model.name: "{name}"', torch.zeros(2, 3, image_px, image_px))
    model.train(training)
    shape = tuple(getattr(logits, "shape", ())) or type(logits).__name__
    if shape != (2, num_classes):
        raise UserError(
            f'model.name: "{name}" maps images (2, 3, {image_px}, {image_px}) to {shape}, not to (2, {num_classes}) '
            "logits; give it a parameter num_classes, or set its number of classes in model.options"
        )
