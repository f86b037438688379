"""Where a recipe trains, and what ``engine.precision = "auto"`` means there."""

import torch

from fastcifar.config.schema import EngineConfig, Recipe
from fastcifar.errors import UserError
from fastcifar.launch import Place


def pick_device(config: EngineConfig, here: Place = Place()) -> torch.device:  # noqa: B008 (frozen)
    """Return the device to train on; of several GPUs the one that has the number of this rank, made the current one.

    Raises:
        UserError: the recipe wants a GPU and there is none, or none for this rank.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError('engine.device = "cuda": no CUDA GPU is available here; use --set engine.device=auto')
    device = torch.device("cuda" if available and config.device != "cpu" else "cpu")
    if here.world == 1 or device.type == "cpu":
        return device
    if here.local_rank >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; a rank needs one of its own: start fewer")
    torch.cuda.set_device(here.local_rank)
    return torch.device("cuda", here.local_rank)


def auto_precision(device: torch.device) -> str:
    """Return what ``engine.precision = "auto"`` means on a device: bf16 where it has instructions for it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # AVX-512 alone is not enough: oneDNN then emulates bf16 by converting, with fp32's arithmetic on top.
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def with_precision(recipe: Recipe, device: torch.device, begun: str | None = None) -> Recipe:
    """Return the recipe with ``auto`` replaced by what it means.

    Args:
        recipe: what to train.
        device: where.
        begun: what a run to go on with has meant by it so far.

    Raises:
        UserError: the recipe asks for a 16-bit working copy where ``auto`` is fp32.
    """
    if recipe.engine.precision != "auto":
        return recipe
    precision = begun or auto_precision(device)
    if recipe.engine.working_copy is True and precision == "fp32":
        raise UserError(
            f'engine.working_copy: {device} has no instructions for bf16, so that engine.precision = "auto" is fp32, '
            'which has no working copy; use --set engine.working_copy=auto, or --set engine.precision=bf16'
        )
    engine = recipe.engine.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"engine": engine})
