"""A small network with BatchNorm and dropout, synthetic images, and steps on them."""

from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.augment.mix import build_mix
from fastcifar.config.schema import Recipe
from fastcifar.data.batch import Batch
from fastcifar.train.step import Step, build_step

COUNT, BATCH, STEPS = 96, 16, 6


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Normalize:
    """Stands for the augmentation: normalizes on any device, and can spoil chosen calls."""

    def __init__(self, spoil_at: int = 0) -> None:
        self.calls, self.spoil_at = 0, spoil_at

    def __call__(self, batch: Batch, epoch: int | Tensor) -> Tensor:
        self.calls += 1
        images = batch.gathered().permute(0, 3, 1, 2).float() / 127.5 - 1
        return images * float("nan") if self.calls == self.spoil_at else images


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return uint8 (COUNT, 8, 8, 3) whose brightness tells the class, and int64 labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (COUNT,), generator=generator)
    noise = torch.randint(0, 60, (COUNT, 8, 8, 3), generator=generator)
    return (noise + 19 * labels[:, None, None, None]).to(torch.uint8), labels


def recipe(**tables: Any) -> Recipe:
    base = {
        "name": "t", "model": {"name": "lenet5"}, "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4},
        "train": {"epochs": 4, "batch_size": BATCH},
    }  # fmt: skip
    engine = {"precision": "fp32"} | tables.pop("engine", {})
    return Recipe.model_validate(base | tables | {"engine": engine})


def make_step(config: Recipe, device: str = "cpu", dropout: float = 0.1, augment: Any = None) -> Step:
    torch.manual_seed(5)
    model = Net(dropout).to(memory_format=torch.channels_last)
    mix = build_mix(config.mix, seed=config.seed, epochs=config.train.epochs, steps_per_epoch=STEPS)
    augment = augment or Normalize()
    return build_step(config, model, augment, mix, steps_per_epoch=STEPS, device=torch.device(device))


def batches(epoch: int, device: str = "cpu", size: int = BATCH) -> list[Batch]:
    pixels, labels = (t.to(device) for t in images())
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(epoch)).to(device)
    return [Batch(pixels, rows, labels[rows], rows) for rows in order.split(size)]


def train(step: Step, first: int, last: int, device: str = "cpu", size: int = BATCH) -> list[dict[str, Any]]:
    """Train epochs ``first`` to ``last - 1``; return their results, each with the curve of losses."""
    results = []
    for epoch in range(first, last):
        step.begin_epoch(epoch)
        for batch in batches(epoch, device, size):
            step(batch)
        results.append(step.end_epoch() | {"curve": step.step_losses()})
    return results


def state(step: Step) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in step.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
