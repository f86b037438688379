"""What a model costs, found by running it on the meta device: parameters, arithmetic, memory traffic, floor times.

The one place that counts. `fastcifar.models.budget` multiplies by the steps of a recipe, `fastcifar.models.memory` adds
what the training device has to hold, and the ladder sorts its rows by `forward_macs`.

The traffic is that of a good compiler: convolutions, linear layers, poolings and BatchNorms read and write memory;
everything elementwise (ReLU, GELU, dropout, additions, ShakeDrop, padding) is part of a neighbour and costs nothing.
Forward and backward, in values per value of the operation's input and output:

- convolution, linear: input and output once forward; output gradient twice, input and input gradient once backward;
- BatchNorm: input twice (statistics, normalization) and output once forward; input and output gradient twice (their
  sums, the gradient) and input gradient once backward;
- pooling: input and output once forward, the same of their gradients backward.

Weights are not counted: they are read once per batch, not per image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastcifar.config.schema import ModelBase, UserModelConfig
from fastcifar.models import bind_counter, build_model

aten = torch.ops.aten
BATCH_NORMS = (aten.native_batch_norm, aten._native_batch_norm_legit, aten.cudnn_batch_norm)
POOLINGS = (aten.max_pool2d_with_indices, aten.avg_pool2d, aten.mean, aten.amax)
BACKWARD_FLOPS = 2
"""The backward pass of a convolution or linear layer is two of the same size."""


@dataclass
class Operation:
    """One operation that reads and writes memory, per image, forward and backward.

    Attributes:
        kind: ``convolution``, ``linear``, ``batch_norm`` or ``pooling``.
        flops: floating-point operations (two per multiplication and addition).
        values: activation values read and written.
    """

    kind: str
    flops: int
    values: int

    def floor_s(self, flops_per_s: float, values_per_s: float) -> float:
        """Return the least time for one image: the slower of arithmetic and memory."""
        return max(self.flops / flops_per_s, self.values / values_per_s)


@dataclass
class Cost:
    """What a model costs per image.

    Attributes:
        parameters: trained values.
        operations: see `Operation`.
    """

    parameters: int
    operations: list[Operation] = field(repr=False)

    @property
    def macs(self) -> int:
        """Multiplications with addition of one forward pass, by the formulas of `torch.utils.flop_counter`."""
        return self.flops // (2 * (1 + BACKWARD_FLOPS))

    @property
    def flops(self) -> int:
        """Floating-point operations forward and backward."""
        return sum(operation.flops for operation in self.operations)

    def bytes_moved(self, bytes_per_value: int = 2) -> int:
        """Return the activation bytes read and written forward and backward (2 bytes per value for bf16)."""
        return bytes_per_value * sum(operation.values for operation in self.operations)

    def intensity(self, bytes_per_value: int = 2) -> float:
        """Return the arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes_moved(bytes_per_value)

    def epoch_s(
        self, tflops: float, gbs: float, *, images: int = 50_000, passes: int = 1, bytes_per_value: int = 2
    ) -> "EpochFloor":
        """Return the least time of an epoch on a device of the given peaks.

        Args:
            tflops: arithmetic peak in 1e12 floating-point operations per second.
            gbs: memory peak in 1e9 bytes per second.
            images: images in an epoch.
            passes: forward and backward passes per step: 2 for SAM and ASAM.
            bytes_per_value: 2 for bf16 activations.
        """
        flops_per_s, values_per_s, count = tflops * 1e12, gbs * 1e9 / bytes_per_value, images * passes
        values = sum(operation.values for operation in self.operations)
        each = sum(operation.floor_s(flops_per_s, values_per_s) for operation in self.operations)
        return EpochFloor(count * self.flops / flops_per_s, count * values / values_per_s, count * each)


class EpochFloor(NamedTuple):
    """Lower bounds of an epoch's time.

    Attributes:
        arithmetic_s: all arithmetic at the peak.
        memory_s: all traffic at the peak.
        floor_s: each operation at the slower of the two, one after the other.
    """

    arithmetic_s: float
    memory_s: float
    floor_s: float


class OperationCounter(TorchDispatchMode):
    """Collects the `Operation`s that run under it, of a batch of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its cost."""
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            activation = args[1] if packet is aten.addmm else args[0]
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result) * (1 + BACKWARD_FLOPS)
            kind = "convolution" if packet is aten.convolution else "linear"
            self.operations.append(Operation(kind, flops, 3 * (activation.numel() + result.numel())))
        elif packet in BATCH_NORMS:
            self.operations.append(Operation("batch_norm", 0, 8 * args[0].numel()))
        elif packet in POOLINGS:
            output = result[0] if isinstance(result, tuple) else result
            self.operations.append(Operation("pooling", 0, 2 * (args[0].numel() + output.numel())))
        return result


def cost_of(model: nn.Module, image_px: int = 32) -> Cost:
    """Return what a model costs, without running it: it is moved to the meta device, which loses its weights.

    Args:
        model: any model of `fastcifar.models`.
        image_px: side of the square input.
    """
    return _count(ready(model.to("meta")), torch.zeros(1, 3, image_px, image_px, device="meta"))


def _count(model: nn.Module, image: torch.Tensor) -> Cost:
    counter = OperationCounter()
    with torch.no_grad(), attention_in_parts(), counter:
        model(image)
    return Cost(count_parameters(model), counter.operations)


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """Let attention run as matrix products; no formula is known for the fused operations that a CPU has for it."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters())


def meta_model(config: ModelBase, *, num_classes: int = 10, image_px: int = 32) -> nn.Module:
    """Return the model of a recipe's config on the meta device, where neither its weights nor a pass take memory.

    Not for a model of the user's own, which may do what that device cannot.
    """
    with torch.device("meta"):
        return build_model(config, num_classes=num_classes, image_px=image_px, seed=0)


def ready(model: nn.Module) -> nn.Module:
    """Put a model on the meta device into training mode, with a counter for its random layers, and return it."""
    bind_counter(model, torch.zeros(1, dtype=torch.int64, device="meta"), seed=0)
    return model.train()


def cost_of_config(config: ModelBase, *, num_classes: int = 10, image_px: int = 32) -> Cost:
    """Return what the model of a recipe's config costs; no memory is taken for its weights.

    A model of the user's own is made and run on the CPU, because code may do what the meta device cannot. It runs in
    evaluation mode, so that its BatchNorms do not count.
    """
    if isinstance(config, UserModelConfig):
        model = build_model(config, num_classes=num_classes, image_px=image_px, seed=0).eval()
        bind_counter(model, torch.zeros(1, dtype=torch.int64), seed=0)
        return _count(model, torch.zeros(1, 3, image_px, image_px))
    return cost_of(meta_model(config, num_classes=num_classes, image_px=image_px), image_px)


_costs: dict[str, Cost] = {}  # by config: many rows of the ladder share a model


def known_cost(config: ModelBase) -> Cost:
    """Return `cost_of_config`, counted once per process for all recipes with the same model."""
    key = config.model_dump_json(exclude={"init"})
    if key not in _costs:
        _costs[key] = cost_of_config(config)
    return _costs[key]


def forward_macs(config: ModelBase) -> int:
    """Return `Cost.macs` of a config, counted once per process."""
    return known_cost(config).macs
