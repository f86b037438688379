"""Muon: momentum whose matrices are made orthogonal before they move the weights."""

import torch
from torch import Tensor

from fastcifar.config.schema import MuonConfig
from fastcifar.kernels.sgd_ema import Averages, SGDSettings, average, sgd_step
from fastcifar.train.flat_parameters import FlatParameters, Segment
from fastcifar.train.groups import Group, decay_per_step, rate_groups
from fastcifar.train.padded_matrices import PaddedMatrices, padding_pays

# The quintic iteration x -> a x + b x^3 + c x^5 that takes every singular value in (0, 1] to about 1 (0.7 to 1.2).
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon:
    """Jordan et al., 2024: orthogonalized Nesterov momentum for convolution weights, SGD for everything else.

    A convolution's weight counts as a matrix of one row per output. All learning rates follow the schedule. Weight
    decay is decoupled or, with ``decay_per = "step"``, airbench's: see `MuonConfig`.

    Args:
        config: the recipe's ``optimizer`` table.
        flat: the parameters.
        averages: what moves along, or None.
        padded: move matrices of all shapes together, padded with zeros, instead of those of one shape; None for where
            that pays, on a GPU. The results differ by rounding.
    """

    def __init__(self, config: MuonConfig, flat: FlatParameters, averages: Averages | None, padded: bool | None = None):
        self._config, self._flat, self._averages = config, flat, averages
        self._momentum = flat.add("momentum")
        self._others = _others(config, flat)
        self._decoupled = config.weight_decay if config.decay_per == "lr" else 0.0
        convolutions = [s for s in flat.segments if s.offset < flat.conv_end]
        if padded is None:
            padded = flat.weights.is_cuda and padding_pays(convolutions)
        self._groups = _by_shape(convolutions)
        self._padded = PaddedMatrices(convolutions, flat.conv_end, flat.weights.device) if padded else None

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; see `fastcifar.train.optimizers.Optimizer`."""
        flat, end = self._flat, self._flat.conv_end
        if saved is not None:
            flat.weights.copy_(saved)
        if coefficient is not None:
            flat.grads.mul_(coefficient)
        self._decay(flat.weights[:end], lr)
        self._convolutions(lr)
        for part, factor, settings in self._others:
            weights, rate = flat.weights[part], lr * factor
            self._decay(weights, rate)
            sgd_step(weights, flat.grads[part], self._momentum[part], settings, rate)
        if self._averages is not None:
            average(flat.weights, self._averages)
        flat.cast()

    def _decay(self, weights: Tensor, rate: Tensor | float) -> None:
        """Shrink weights by the decoupled weight decay at their learning rate."""
        if self._decoupled:
            # Decoupled: an orthogonal step has no size of its own that a decay inside the gradient could balance.
            weights.mul_(1 - rate * self._decoupled)

    def _convolutions(self, lr: Tensor | float) -> None:
        """Move all convolution weights, those of one shape together."""
        flat, config, end = self._flat, self._config, self._flat.conv_end
        momentum, grads = self._momentum[:end], flat.grads[:end]
        # Nesterov: the gradient buffer becomes what is to be made orthogonal.
        momentum.mul_(config.momentum).add_(grads)
        grads.add_(momentum, alpha=config.momentum)
        if self._padded is not None:
            self._all_shapes(self._padded, lr)
            return
        for group in self._groups:
            # Memory order (channels-last) permutes columns, and orthogonalizing does not care about their order.
            steps = orthogonal(torch.stack([_matrix(grads, s) for s in group]))
            weights = [_matrix(flat.weights, s) for s in group]
            # All matrices of a shape at once: a launch for each operation, not for each operation and matrix.
            moved = torch.stack(weights)
            if config.normalize:
                norms = torch.linalg.vector_norm(moved, dim=(1, 2), keepdim=True)
                moved.mul_(group[0].shape[0] ** 0.5 / norms)
            moved.sub_(steps * lr)
            torch._foreach_copy_(weights, list(moved.unbind()))

    def _all_shapes(self, matrices: PaddedMatrices, lr: Tensor | float) -> None:
        """Move all convolution weights at once, in some twenty launches whatever their shapes.

        Rows and columns of zeros stay zero in every product and add nothing to a norm.
        """
        weights, grads = self._flat.weights[: self._flat.conv_end], self._flat.grads[: self._flat.conv_end]
        steps = orthogonal(matrices.spread(grads, product_dtype(grads)))
        moved = matrices.spread(weights, torch.float32)
        if self._config.normalize:
            moved.mul_(matrices.sqrt_rows / torch.linalg.vector_norm(moved, dim=(1, 2), keepdim=True))
        moved.addcmul_(steps, torch.as_tensor(lr, device=steps.device), value=-1)
        matrices.gather(weights)


def _others(config: MuonConfig, flat: FlatParameters) -> list[Group]:
    """Return what is not convolutions, in ranges of one learning rate."""

    def rate(segment: Segment) -> float:
        head = segment.offset < flat.matrix_end
        return config.lr_head if head and config.lr_head is not None else config.lr_other

    per_step = config.decay_per == "step"
    settings = SGDSettings(config.momentum_other, nesterov=True, weight_decay=config.weight_decay if per_step else 0.0)
    groups = rate_groups(flat, rate, config.lr, settings, start=flat.conv_end)
    return decay_per_step(groups, config.lr) if per_step else groups


def _by_shape(segments: list[Segment]) -> list[list[Segment]]:
    groups: dict[tuple[int, int, int], list[Segment]] = {}
    for segment in segments:
        rows = segment.outputs
        groups.setdefault((segment.shape[0], rows, segment.size // rows), []).append(segment)
    return list(groups.values())


def _matrix(buffer: Tensor, segment: Segment) -> Tensor:
    """Return a convolution's weight in memory order as (outputs, inputs * height * width)."""
    return buffer[segment.offset : segment.offset + segment.size].view(segment.outputs, -1)


def product_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products on the device where ``values`` lies."""
    return torch.bfloat16 if values.is_cuda else torch.float32


def orthogonal(matrices: Tensor, iterations: int = 3) -> Tensor:
    """Return the matrices with their singular values moved to about 1 by a Newton-Schulz iteration.

    Args:
        matrices: float32 or `product_dtype` (G, R, C).
        iterations: three are enough for training small networks (Jordan, 2024, airbench).

    Returns:
        float32 (G, R, C). The products are computed in bfloat16 on a GPU.
    """
    a, b, c = QUINTIC
    x = matrices.to(product_dtype(matrices))
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        # One library call each: b gram + c gram^2, then a x + (that) x.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(torch.float32)
