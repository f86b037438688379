"""``--check-nan``: the first layer whose output or gradient is not finite.

Hooks on every module look at each output in the forward pass and at each output's gradient in the backward pass. Each
look waits for the device, so this is for finding an error, not for training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.errors import UserError


def check_finite(
    model: nn.Module, where: Callable[[], str], evaluation: Callable[[], str] = lambda: "the evaluation"
) -> None:
    """Make every pass of the model, in training and in evaluation, raise at the first layer that is not finite.

    Args:
        model: hooks stay on it.
        where: returns the epoch and step in words, of a pass in training.
        evaluation: returns in words which evaluation a pass belongs to.

    Raises:
        UserError: in a pass, naming the module, and the epoch and step.
    """

    def place() -> str:
        return where() if model.training else evaluation()

    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(_hook(f"{name} ({type(module).__name__})", place))


def _hook(name: str, where: Callable[[], str]) -> Callable[[nn.Module, Any, Any], None]:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        # Statistics too: they may overflow in a step whose own pass, by the batch's statistics, is finite.
        for state_name, state in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            _require(state.detach(), f"{where()}: the {state_name} of {name} is", "before this pass")
        _require(output.detach(), f"{where()}: the output of {name} is", _inputs(inputs))
        if output.requires_grad:
            output.register_hook(lambda g: _require(g, f"{where()}: the gradient at the output of {name} is", ""))

    return look


def _inputs(inputs: Any) -> str:
    finite = all(bool(torch.isfinite(x).all()) for x in inputs if isinstance(x, Tensor))
    return "its input is finite" if finite else "its input is not finite either"


def _require(tensor: Tensor, what: str, more: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{what} not finite{f' ({more})' if more else ''}")
