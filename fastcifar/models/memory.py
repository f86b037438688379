"""How much memory a recipe needs on the device that trains it, found on the meta device before anything is made."""

from contextlib import nullcontext

import torch
from torch import nn

from fastcifar.config.schema import (
    ModelBase,
    PyramidNetConfig,
    Recipe,
    UserModelConfig,
    WideResNetConfig,
)
from fastcifar.errors import UserError
from fastcifar.host_memory import total_bytes
from fastcifar.models import bind_counter, build_model
from fastcifar.models.cost import count_parameters, meta_model, ready

# The estimate is of eager mode, which keeps more activations than a compiled model: twice the memory is no proof yet.
ACTIVATIONS_MARGIN = 2
USUAL_BATCH, USUAL_WIDEN, USUAL_ALPHA, USUAL_WIDTH, USUAL_DEPTH = 8192, 20, 600, 1024, 300


def refuse_what_cannot_fit(
    recipe: Recipe, device: torch.device, *, devices: int = 1, num_classes: int = 10, image_px: int = 32
) -> None:
    """Refuse a recipe that is far beyond the device's memory, before a run directory or a model is made.

    The estimate costs seconds, so it is only made where a width, a depth or a batch is unusual.

    Args:
        recipe: what is to be trained.
        device: where.
        devices: how many divide each batch.
        num_classes: of the data.
        image_px: side of its images.

    Raises:
        UserError: it cannot fit; with the estimate.
    """
    if not is_large(recipe):
        return
    facts = {"num_classes": num_classes, "image_px": image_px}
    parameters = count_parameters(_own(recipe.model, **facts) or meta_model(recipe.model, **facts))
    check_memory(recipe.name, memory_mib(recipe, parameters, 0, devices=devices, **facts), device)


def is_large(recipe: Recipe) -> bool:
    """Return whether a model or batch is larger than any that is known to fit a usual device."""
    model = recipe.model
    if recipe.train.batch_size > USUAL_BATCH:
        return True
    if isinstance(model, WideResNetConfig):
        return model.widen > USUAL_WIDEN or model.depth > USUAL_DEPTH
    if isinstance(model, PyramidNetConfig):
        return model.alpha > USUAL_ALPHA or model.depth > USUAL_DEPTH
    return widest(model) > USUAL_WIDTH


def widest(model: ModelBase) -> int:
    """Return the largest of the widths that a model's config names (``width``, ``widths``, ``dim``); 0 for none."""
    named = model.model_dump(include={"width", "widths", "dim"}).values()
    return max((width for value in named for width in (value if isinstance(value, list) else [value])), default=0)


def check_memory(name: str, memory: dict[str, float], device: torch.device) -> None:
    """Refuse an estimate that is beyond a device.

    Args:
        name: the recipe's.
        memory: from `memory_mib`.
        device: where it would be trained.

    Raises:
        UserError: weights and their state alone, or half of all, are more than the whole memory.
    """
    have = device_bytes(device) / 2**20
    if max(memory["weights_and_state"], memory["total"] / ACTIVATIONS_MARGIN) > have:
        raise UserError(
            f"{name}: needs about {memory['total'] / 1024:,.0f} GiB ({memory['weights_and_state'] / 1024:,.0f} GiB of "
            f"weights and their state), {device} has {have / 1024:,.0f} GiB; choose a smaller model, or a smaller "
            "train.batch_size or a larger train.accumulate"
        )


def device_bytes(device: torch.device) -> int:
    """Return a device's whole memory, used or not; for the CPU no more than its control groups allow."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_bytes()


def micro_batch(recipe: Recipe, devices: int = 1) -> int:
    """Return how many samples go through the model at once, on that one of so many devices that has the most."""
    own = -(-recipe.train.batch_size // devices)
    return -(-own // recipe.train.accumulate)


def memory_mib(
    recipe: Recipe, parameters: int, images: int, *, devices: int = 1, num_classes: int = 10, image_px: int = 32
) -> dict[str, float]:
    """Return the expected memory on each training device in MiB, without what CUDA itself takes (about 500 MiB).

    Args:
        recipe: what is to be trained.
        parameters: trained values of its model.
        images: how many of the training images lie on the device.
        devices: how many divide each batch; each has all of the weights.
        num_classes: of the data.
        image_px: side of its images.
    """
    # Weights, gradients, moments; of an optimizer by import path, as many as Adam has.
    buffers = 2 + (1 if recipe.optimizer.name in ("sgd", "muon") else 2)
    buffers += sum(1 for kept in (recipe.ema, recipe.asam, recipe.lookahead) if kept)  # one copy of the weights each
    parts = {
        "weights_and_state": 4 * parameters * buffers,
        "activations": saved_bytes(recipe, num_classes=num_classes, image_px=image_px) * micro_batch(recipe, devices),
        "images": 3 * image_px**2 * images,
    }
    return {name: round(size / 2**20, 1) for name, size in {**parts, "total": sum(parts.values())}.items()}


def saved_bytes(recipe: Recipe, *, num_classes: int = 10, image_px: int = 32) -> int:
    """Return the bytes that autograd keeps of one image's forward pass in eager mode, found on the meta device."""
    half = recipe.engine.gpu_precision in ("bf16", "fp16")
    facts, shape = {"num_classes": num_classes, "image_px": image_px}, (2, 3, image_px, image_px)
    own_model = _own(recipe.model, **facts)
    if own_model is not None:
        return _saved_bytes(own_model, torch.zeros(shape), autocast=half)
    dtype = torch.bfloat16 if half else torch.float32
    model = ready(meta_model(recipe.model, **facts).to(dtype))
    return _saved_bytes(model, torch.zeros(shape, device="meta", dtype=dtype), autocast=False)


def _own(config: ModelBase, *, num_classes: int, image_px: int) -> nn.Module | None:
    """Return a model of the user's own, on the CPU and ready for a pass; None for ours, which need no memory for it."""
    if not isinstance(config, UserModelConfig):
        return None
    model = build_model(config, num_classes=num_classes, image_px=image_px, seed=0)
    bind_counter(model, torch.zeros(1, dtype=torch.int64), seed=0)
    return model.train()


def _saved_bytes(model: nn.Module, images: torch.Tensor, autocast: bool) -> int:
    """Return the bytes that autograd keeps of one of these images; two or more, as BatchNorm wants."""
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    casts = torch.autocast(images.device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casts:
        result = model(images)
    del result
    return sum(storage.nbytes() for storage in kept.values()) // len(images)
