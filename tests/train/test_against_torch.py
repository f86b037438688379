"""The whole step, 50 times on a small real model, against float64 references that know nothing of flat parameters."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch

from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.train.step import Step, build_step
from tests.train.reference import error, make_data, make_net, train_reference

STEPS = 50


class Given:
    """Stands for the augmentation: hands over the float images of a step."""

    def __init__(self, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.data, self.at = data, 0

    def __call__(self, batch: Batch, epoch: int) -> torch.Tensor:
        self.at += 1
        return self.data[self.at - 1][0].to(memory_format=torch.channels_last)


def train_ours(net: torch.nn.Module, data: Any, **tables: Any) -> Step:
    table = {"name": "t", "model": {"name": "lenet5"}, "train": {"epochs": 1, "batch_size": 16}}
    recipe = Recipe.model_validate(table | {"engine": {"precision": "fp32"}} | tables)
    step = build_step(recipe, net, Given(data), None, steps_per_epoch=len(data), device=torch.device("cpu"))
    step.begin_epoch(0)
    for x, y in data:
        rows = torch.arange(len(x))
        step(Batch(torch.zeros(len(x), 8, 8, 3, dtype=torch.uint8), rows, y, rows))
    return step


SGD = {"name": "sgd", "lr": 0.02, "weight_decay": 5e-4}


def adamw_on_matrices(parameters: Iterable[torch.Tensor]) -> torch.optim.AdamW:
    every = list(parameters)
    matrices, others = [p for p in every if p.ndim > 1], [p for p in every if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


ADAM = {"lr": 1e-3, "weight_decay": 5e-4}
OPTIMIZERS = {
    "nesterov": (SGD, partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)),
    "momentum": (SGD | {"nesterov": False}, partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)),
    "plain": (SGD | {"momentum": 0.0, "weight_decay": 0.0}, partial(torch.optim.SGD, lr=0.02)),
    "adam": (ADAM | {"name": "adam"}, partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4)),
    "adamw": (ADAM | {"name": "adamw"}, partial(torch.optim.AdamW, lr=1e-3, weight_decay=5e-4)),
    "adamw-matrices": (ADAM | {"name": "adamw", "decay": "matrices", "weight_decay": 0.5}, adamw_on_matrices),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_moving_average(name: str) -> None:
    config, make = OPTIMIZERS[name]
    net, data = make_net(1), make_data(2, STEPS)
    expected, average = train_reference(net, data, make, decay=0.9)
    step = train_ours(net, data, optimizer=config, ema={"decay": 0.9})
    # Adam divides by the root of a tiny second moment, which magnifies the rounding of a gradient near zero.
    bound = 1e-6 if config["name"] == "sgd" else 2e-5
    assert error(net.state_dict(), expected) < bound
    with step.weights("ema"):
        assert average is not None
        assert error(net.state_dict(), average) < bound
    assert error(net.state_dict(), expected) < bound


SAMS = {
    "sam": {"adaptive": False, "rho": 0.05},
    "asam": {"rho": 0.5},
    "asam-published": {"rho": 2.0},
    "asam-eta-weights": {"rho": 0.5, "eta": 0.01, "scope": "weights"},
    "asam-late": {"rho": 2.0, "start": 0.61},
}


@pytest.mark.parametrize("name", SAMS)
def test_sharpness_aware(name: str) -> None:
    config: dict[str, Any] = SAMS[name]
    sam = {"rho": config["rho"], "adaptive": config.get("adaptive", True), "eta": config.get("eta", 0.0)}
    sam |= {"weights_only": config.get("scope") == "weights"}
    net, data = make_net(3), make_data(4, STEPS)
    make = OPTIMIZERS["nesterov"][1]
    # 0.61 of 50 steps are 30.5: the 31st step, number 30, is the last plain one.
    late = math.ceil(config.get("start", 0.0) * STEPS)
    expected, average = train_reference(net, data, make, sam, decay=0.9, sam_from=late)
    step = train_ours(net, data, optimizer=SGD, asam=config, ema={"decay": 0.9})
    assert error(net.state_dict(), expected) < 1e-6
    with step.weights("ema"):
        assert average is not None
        assert error(net.state_dict(), average) < 1e-6


def test_clipping() -> None:
    net, data = make_net(5), make_data(6, STEPS)
    expected, _ = train_reference(net, data, OPTIMIZERS["nesterov"][1], clip=0.3)
    train_ours(net, data, optimizer=SGD, train={"epochs": 1, "batch_size": 16, "grad_clip": 0.3})
    assert error(net.state_dict(), expected) < 1e-6


def test_the_difference_would_be_seen() -> None:
    """The bound is meaningful: a hair's difference in a setting is far above it."""
    net, data = make_net(1), make_data(2, STEPS)
    expected, _ = train_reference(net, data, partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=5.1e-4))
    train_ours(net, data, optimizer=SGD | {"nesterov": False})
    assert error(net.state_dict(), expected) > 1e-6
