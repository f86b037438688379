"""Training on the hardest samples: against float64 with the proxy trained apart, resumed, refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.errors import UserError
from fastcifar.models import build_model
from fastcifar.models.hooks import Learning
from fastcifar.open_run import open_run
from fastcifar.run_directory import RunDirectory
from fastcifar.train.checks import check_division
from fastcifar.train.freeze import every_nth, step_shares
from fastcifar.train.run import train
from fastcifar.train.step import Step, build_step
from tests.train.reference import error, make_data, make_net
from tests.train.test_against_torch import Given
from tests.train.tiny import assert_same_run, recipe

STEPS, BATCH, KEPT, EVERY = 20, 16, 6, 3
TABLE: dict[str, Any] = {
    "name": "t", "model": {"name": "lenet5"}, "engine": {"precision": "fp32"},
    "optimizer": {"name": "sgd", "lr": 0.002, "momentum": 0.85}, "train": {"epochs": 1, "batch_size": BATCH},
    "loss": {"reduction": "sum", "label_smoothing": 0.2},
    "select": {"share": 0.4, "every": EVERY, "model": {"name": "lenet5"}},
}  # fmt: skip

Data = list[tuple[Tensor, Tensor]]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.85, nesterov=True)


def choices(proxy: nn.Module, data: Data) -> list[Tensor]:
    """Train the proxy alone, as published, and return which samples of each step the model is to have: bool (B,)."""
    optimizer, masks = sgd(proxy), []
    for number, (x, y) in enumerate(data):
        losses = F.cross_entropy(proxy(x.double()), y, label_smoothing=0.2, reduction="none")
        masks.append(torch.zeros(len(y), dtype=torch.bool))
        masks[-1][losses.argsort()[-KEPT:]] = True
        if number % EVERY == 0:
            optimizer.zero_grad()
            (losses * masks[-1]).sum().backward()
            optimizer.step()
    return masks


def train_ours(net: nn.Module, proxy: nn.Module, data: Data) -> Step:
    wanted, cpu = Recipe.model_validate(TABLE), torch.device("cpu")
    step = build_step(wanted, net, Given(data), None, steps_per_epoch=STEPS, device=cpu, proxy=proxy)
    step.begin_epoch(0)
    for x, y in data:
        rows = torch.arange(len(x))
        step(Batch(torch.zeros(len(x), 8, 8, 3, dtype=torch.uint8), rows, y, rows))
    return step


def test_the_model_trains_on_what_a_proxy_trained_before_it_finds_hardest() -> None:
    net, proxy, data = make_net(11), make_net(12), make_data(13, STEPS)
    wide, wide_proxy = copy.deepcopy(net).double(), copy.deepcopy(proxy).double()
    optimizer = sgd(wide)
    for mask, (x, y) in zip(choices(wide_proxy, data), data, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(wide(x.double()[mask]), y[mask], label_smoothing=0.2, reduction="sum").backward()
        optimizer.step()
    step = train_ours(net, proxy, data)
    assert error(net.state_dict(), wide) < 2e-6
    assert error(proxy.state_dict(), wide_proxy) < 2e-6
    assert step.end_epoch()["samples"] == STEPS * KEPT


def selecting(**changes: Any) -> Recipe:
    table = {"share": 0.5, "every": 2, "model": {"name": "speednet", "widths": [4, 4, 4], "whiten_bias_epochs": 0}}
    model = {"name": "speednet", "widths": [8, 8, 8]}
    data = {"source": "synthetic", "subset": 80, "test_subset": 30, "loader": {"name": "resident"}}
    training = {"epochs": 2, "batch_size": 30}  # an odd last batch, of which half is kept too
    tables = {"select": table, "model": model, "data": data, "train": training, "optimizer": {"name": "sgd", "lr": 0.1}}
    return recipe(**(tables | changes))


def run_in(folder: Path, wanted: Recipe, **options: Any) -> None:
    resume = str(folder) if (folder / "recipe.toml").exists() else None
    with open_run(wanted, None if resume else folder, resume) as run:
        train(run.recipe, run, quiet=True, **options)


def test_a_run_resumes_to_the_same_bits_and_counts_what_it_trains_on(tmp_path: Path) -> None:
    run_in(tmp_path / "whole", selecting())
    run_in(tmp_path / "parts", selecting(), stop_after=1)
    run_in(tmp_path / "parts", selecting())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert [row["images"] for row in RunDirectory.open(tmp_path / "whole").metrics()] == [40, 40]


@pytest.mark.parametrize("rate", ["run", "fade"])
def test_a_proxy_stops_learning_after_as_many_epochs_of_the_run_as_its_model_says(rate: str) -> None:
    """It takes fewer steps than the run, of which the frozen parameter's share is that of the run's own steps."""
    proxy = {"name": "speednet", "widths": [4, 4, 4], "whiten_bias_epochs": 1, "whiten_bias_rate": rate}
    tables = {
        "model": proxy, "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.1},
        "train": {"epochs": 3, "batch_size": 8}, "select": {"share": 0.5, "every": EVERY, "model": proxy},
    }  # fmt: skip
    wanted, steps, moved = Recipe.model_validate(TABLE | tables), 8, []
    net, small = (build_model(config, seed=1) for config in (wanted.model, wanted.select.model))
    images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    step = build_step(wanted, net, lambda batch, epoch: images, None, steps, torch.device("cpu"), proxy=small)
    rows = torch.arange(8)
    batch = Batch(torch.zeros(8, 16, 16, 3, dtype=torch.uint8), rows, rows, rows)
    for epoch in range(3):
        step.begin_epoch(epoch)
        for _ in range(steps):
            before = small.whitening.bias.detach().clone()
            step(batch)
            moved.append(not torch.equal(before, small.whitening.bias))
        step.end_epoch()
    assert [number for number, has in enumerate(moved) if has] == [0, 3, 6]


def test_a_proxys_share_of_a_step_is_that_of_the_step_of_the_run() -> None:
    run = step_shares(Learning(2, fade=True), lambda epoch, step: 1.0, epochs=5, steps_per_epoch=5)
    assert every_nth(run, 4).tolist() == pytest.approx([1.0, 0.6, 0.2, 0.0])
    assert torch.equal(every_nth(run, 1), run)
    assert every_nth(run[-1:], 4).tolist() == [0.0]  # what never learns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"name": "mixup"}}, "mix = false"),
        ({"engine": {"device": "cpu", "precision": "fp16"}}, 'other than "fp16"'),
        ({"optimizer": {"name": "torch.optim:SGD", "lr": 0.1}}, "our own optimizers"),
        ({"data": {"resize": [[0.0, 24]]}, "select": {"model": {"name": "vit"}}}, '"vit" has layers made for one size'),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selecting(**changes)


def test_several_devices_are_refused() -> None:
    with pytest.raises(UserError, match="train on one device"):
        check_division(selecting(), 80, 2)
