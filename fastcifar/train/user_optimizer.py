"""An optimizer that a recipe names by import path, over the flat parameters.

It works on the model's own parameters, whose memory is that of the flat weights, and finds their gradients in the flat
gradients; or on all of them as one tensor. Beside our own optimizers it lacks the fused update: restoring after a SAM
ascent step, scaling, averaging and the working copy are launches of their own, and it is not captured in a CUDA graph,
because such code may do anything in a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.config import user_code
from fastcifar.config.schema import UserOptimizerConfig
from fastcifar.errors import UserError
from fastcifar.kernels.sgd_ema import Averages, average
from fastcifar.train.flat_parameters import FlatParameters

KINDS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""What a checkpoint keeps a plain number in; the dtype says what it was."""


class UserOptimizer:
    """Steps a ``torch.optim.Optimizer`` of the user's own; see `fastcifar.train.optimizers.Optimizer`.

    Attributes:
        inner: the optimizer.
    """

    def __init__(self, config: UserOptimizerConfig, flat: FlatParameters, averages: Averages | None, skip: bool):
        self._flat, self._averages, self._skip = flat, averages, skip
        self._key = f'optimizer.name: "{config.name}"'
        self._tensors = flat.parameters() if config.parameters == "each" else {"": nn.Parameter(flat.weights)}
        views = flat.named(flat.grads)
        self._grads = {name: views[name] if name else flat.grads for name in self._tensors}
        self.inner = self._make(config)
        if config.parameters == "each":
            self._refuse_fused_with_padding()

    def _make(self, config: UserOptimizerConfig) -> torch.optim.Optimizer:
        make = user_code.optimizer_class(config.name)
        options = {"lr": config.lr, **config.options}
        if config.weight_decay or ("weight_decay" not in options and user_code.accepts(make, "weight_decay")):
            options["weight_decay"] = config.weight_decay
        made = user_code.call(make, self._key, list(self._tensors.values()), **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise UserError(f"{self._key} made a {type(made).__name__}, not a torch.optim.Optimizer")
        if all(callable(getattr(made, mode, None)) for mode in ("train", "eval")):
            # Schedule-free ones (Defazio et al., 2024): the weights between steps are not those to evaluate or save.
            raise UserError(
                f"{self._key} has modes for training and evaluation, train() and eval(), which are not called here: "
                "choose one without, with [ema] for averaged weights"
            )
        return made

    def _refuse_fused_with_padding(self) -> None:
        """Refuse torch's fused kernels over padded weights, which are views with holes.

        On a CPU they go through as many elements as a view has, holes included, and leave its last ones untrained.

        Raises:
            UserError: the optimizer is fused and a weight is padded.
        """
        padded = next((segment.name for segment in self._flat.segments if segment.padded), None)
        if padded is not None and any(group.get("fused") for group in self.inner.param_groups):
            raise UserError(
                f'{self._key}: fused kernels do not work on padded weights (model.align), such as {padded}: set '
                'optimizer.parameters = "flat", which hands over all parameters as one tensor, or fused = false in '
                "optimizer.options, or model.align = 1"
            )

    def step(self, lr: Tensor | float, *, saved: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Take one step; on a GPU the host waits for the learning rate, and for the coefficient where it may skip."""
        flat = self._flat
        if saved is not None:
            flat.weights.copy_(saved)
        if coefficient is None or not self._skip or bool(torch.isfinite(coefficient).all()):
            if coefficient is not None:
                flat.grads.mul_(coefficient)
            self._step(float(lr))
        if self._averages is not None:
            average(flat.weights, self._averages)
        flat.cast()

    def _step(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        for name, tensor in self._tensors.items():
            tensor.grad = self._grads[name]
        user_code.call(self.inner.step, self._key)
        for tensor in self._tensors.values():
            tensor.grad = None

    # ------------------------------------------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name, for a checkpoint: of each parameter, and the numbers of its groups.

        Raises:
            UserError: a part of it is neither a tensor nor a number.
        """
        names = {id(tensor): name for name, tensor in self._tensors.items()}
        found = {}
        for tensor, state in self.inner.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    kind = "state" if value.ndim or value.device.type == "cpu" else "device"
                    found[f"{kind}/{names[id(tensor)]}/{key}"] = value
                elif value is not None:
                    found[f"number/{names[id(tensor)]}/{key}"] = self._encoded(value, key)
        for number, group in enumerate(self.inner.param_groups):
            # Most of a group is settings, which the recipe has; what is a number may have moved, such as a count.
            numbers = {k: v for k, v in group.items() if k not in ("params", "lr") and type(v) in KINDS}
            found |= {f"group/{number}/{key}": self._encoded(value, key) for key, value in numbers.items()}
        return found

    def _encoded(self, value: Any, key: str) -> Tensor:
        if type(value) not in KINDS:
            kind = type(value).__name__
            raise UserError(f"{self._key} keeps a {kind} in its state ({key}); a checkpoint holds tensors and numbers")
        return torch.tensor(value, dtype=KINDS[type(value)])

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state that `tensors` returned.

        Raises:
            ValueError: it belongs to another model or optimizer.
        """
        self.inner.state.clear()
        for path, value in tensors.items():
            kind, where, key = _split(path)
            kept = self._copy(value, kind, where) if kind in ("state", "device") else value.item()
            self._target(kind, where)[key] = kept

    def _target(self, kind: str, where: str) -> Any:
        """Return the group of this number, or the state of the parameter of this name."""
        groups = {str(number): group for number, group in enumerate(self.inner.param_groups)}
        if where not in (groups if kind == "group" else self._tensors):
            raise ValueError(f"the optimizer has no {kind} {where!r}")
        return groups[where] if kind == "group" else self.inner.state[self._tensors[where]]

    def _copy(self, value: Tensor, kind: str, where: str) -> Tensor:
        """Return a copy as the optimizer keeps it.

        What has a parameter's shape gets its strides too: a checkpoint is written without them, and fused kernels go
        through both as they lie in memory. Torch's own optimizers keep their step counts, (), on the CPU, but for
        fused and capturable ones.
        """
        parameter = self._tensors.get(where)
        if parameter is not None and value.shape == parameter.shape:
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if value.ndim == 0 and kind == "state":
            return value.clone()
        return value.to(self._flat.weights.device, copy=True)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put the state back to what it was before a ``with`` block."""
        tensors = deepcopy(self.tensors())
        yield
        self.load_tensors(tensors)


def _split(path: str) -> tuple[str, str, str]:
    """Return the kind, the parameter's name or the group's number, and the key of an entry."""
    kind, _, rest = path.partition("/")
    where, _, key = rest.rpartition("/")
    return kind, where, key
