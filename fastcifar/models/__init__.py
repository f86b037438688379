"""Every architecture of the ladder: plain modules in one explicit table, channels-last, fp32; and the user's own.

`build_model` is the way in. All networks map images (B, 3, S, S) to logits (B, K).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastcifar.config.schema import ConvNeXtV2Config, ModelBase, UserModelConfig
from fastcifar.errors import UserError
from fastcifar.models import (
    convnext,
    deep_baseline,
    lenet,
    pyramidnet,
    residual,
    residual_attention,
    shake_shake,
    speednet,
    transformer,
    user,
    wide_resnet,
)
from fastcifar.models.hooks import bind_counter

__all__ = ["MODELS", "bind_counter", "build_model", "kaiming_normal_fan_out"]

Builder = Callable[[Any, int, int], nn.Module]

MODELS: dict[str, Builder] = {
    "lenet5": lenet.build,
    "deep_baseline": deep_baseline.build,
    "deep_baseline_bn": deep_baseline.build,
    "residual5": residual.build_residual5,
    "residual15": residual.build_residual15,
    "wide_resnet": wide_resnet.build,
    "pyramidnet": pyramidnet.build,
    "speednet": speednet.build,
    "vit": transformer.build_vit,
    "cct": transformer.build_cct,
    "convnextv2": convnext.build,
    "shake_shake": shake_shake.build,
    "residual_attention": residual_attention.build,
}
"""A model's name in a recipe -> (config, num_classes, image_px) -> the network with torch's default weights."""

SMALLEST_PX = {"lenet5": 16, "deep_baseline": 8, "deep_baseline_bn": 8, "residual5": 8, "speednet": 9, "convnextv2": 8}


def smallest_px(config: ModelBase) -> int:
    """Return the side of the smallest image of which a model's poolings leave something; 1 where any will do."""
    least = SMALLEST_PX.get(config.name, 1)  # type: ignore[attr-defined]
    return least * config.stem_stride if isinstance(config, ConvNeXtV2Config) else least


def build_model(config: ModelBase, *, num_classes: int = 10, image_px: int = 32, seed: int) -> nn.Module:
    """Build and initialize a network: fp32 on the CPU, channels-last, in training mode.

    The weights depend on nothing but the arguments, and the caller's random state is left as it was.

    Args:
        config: a model config of `fastcifar.config.schema`.
        num_classes: number of logits.
        image_px: side of the square input images.
        seed: 0..2**63-1.

    Raises:
        UserError: the images are too small for this model, or a model of the user's own cannot be made.
    """
    name: str = config.name  # type: ignore[attr-defined]
    if image_px < (least := smallest_px(config)):
        raise UserError(f"model.name = {name!r} needs images of {least} px or more, these have {image_px}")
    with torch.random.fork_rng(devices=seeded_devices()):
        torch.manual_seed(seed)
        if isinstance(config, UserModelConfig):
            model = user.build(config, num_classes, image_px)
        else:
            model = MODELS[name](config, num_classes, image_px)
        if config.init != "default":
            kaiming_normal_fan_out(model, linear=config.init == "kaiming_normal_fan_out")
    # The stubs of Module.to lack memory_format.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def seeded_devices() -> list[int]:
    """Return the GPUs whose generators `torch.manual_seed` sets at once: all, if any is in use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def kaiming_normal_fan_out(model: nn.Module, *, linear: bool = True) -> None:
    """Draw weights from N(0, 2 / fan_out) and reset biases and BatchNorm (He et al., 2015), in place.

    Args:
        model: any network.
        linear: whether the weights of Linear layers are drawn too, or only those of Conv2d. A classifier has as few
            outputs as there are classes: with 10 its weights get a standard deviation of 0.45, where torch's own have
            0.026 behind 512 features, and the first losses are above 7 in place of 2.3.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) or (linear and isinstance(module, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
