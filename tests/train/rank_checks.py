"""What two ranks do in `test_ranks`: one process each, started together with a folder, all cases one after the other.

Each writes the weights that it holds after each epoch of each case to ``FOLDER/rank-N.npz``; rank 0 also leaves the run
directories.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import interrupt
from fastcifar.config import Recipe
from fastcifar.environment import describe
from fastcifar.launch import place
from fastcifar.models.batch_norm import BatchNorm2d, use_sync_batch_norm
from fastcifar.run_directory import RunDirectory
from fastcifar.train.follower import Follower
from fastcifar.train.ranks import ALONE, Ranks, join, leave
from fastcifar.train.run import train
from fastcifar.train.step import Step
from tests.train.tiny import recipe

SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4}
EXACT = {"device": "cpu", "precision": "fp32", "batch_norm": "sync"}
DATA = {"source": "synthetic", "subset": 130, "test_subset": 70, "holdout": 40, "loader": {"name": "resident"}}
# 90 images in batches of 33: 17 and 16 samples, and a last one of 24.
SHARED: dict[str, Any] = {
    "data": DATA, "optimizer": SGD, "engine": EXACT, "train": {"epochs": 3, "batch_size": 33},
    "eval": {"batch_size": 30},
}
SHORT = {"train": {"epochs": 2, "batch_size": 33}}
WIDE = {"name": "wide_resnet", "depth": 10, "widen": 1, "dropout": 0.0}
CASES: dict[str, Recipe] = {
    "sgd": recipe(**SHARED, mix={"name": "cutmix", "p": 0.5}, ema={"decay": 0.9}),
    "asam": recipe(**SHARED | SHORT, asam={"rho": 0.5}, loss={"class_weights": [1.0, 2.0] * 5, "label_smoothing": 0.1}),
    "sync": recipe(
        **SHARED | SHORT | {"eval": {"batch_size": 30, "tta": "flip", "train_logits": True}},
        model=WIDE | {"shakedrop": 0.5, "shakedrop_gate": "sample"},
        mix={"name": "cutmix_or_mixup", "per_sample": True},
    ),
    "local": recipe(
        **SHARED | {"engine": {"device": "cpu", "on_nonfinite": "skip"}, "train": {"epochs": 2, "batch_size": 32}},
        model=WIDE | {"dropout": 0.3}, asam={"rho": 0.5, "norm": "rank"}, ema={"decay": 0.9},
    ),
}  # fmt: skip
"""Within rounding "sgd", "asam" and "sync" are the run of one process; "local" is a run of its own."""


@contextmanager
def smooth() -> Iterator[None]:
    """SiLU for ReLU: where rounding puts an input of ReLU on the other side of zero, its gradient jumps."""
    functional = torch.nn.functional
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "relu", lambda x, inplace=False: functional.silu(x))
        yield


def run_in(folder: Path, wanted: Recipe, ranks: Ranks, **options: Any) -> None:
    """Train in a folder, or follow."""
    run: RunDirectory | Follower = Follower()
    if ranks.first:
        there = (folder / "recipe.toml").exists()
        run = RunDirectory.open(folder) if there else RunDirectory.create(folder, wanted, describe())
    with smooth():
        train(wanted, run, quiet=True, ranks=ranks, **options)


def check_sync_batch_norm(ranks: Ranks) -> None:
    """Both ranks' parts of a batch, 5 and 2 samples, against the layer on all of it in float64."""
    group, generator = ranks.on(torch.device("cpu")).data, torch.Generator().manual_seed(1)
    x, grad = (torch.randn(7, 3, 4, 5, dtype=torch.float64, generator=generator) + 2 for _ in range(2))
    whole, parted, compiled = torch.nn.BatchNorm2d(3).double(), BatchNorm2d(3).double(), BatchNorm2d(3).double()
    own, results = slice(0, 5) if ranks.first else slice(5, 7), []
    for layer, part in ((whole, slice(0, 7)), (parted, own), (compiled, own)):
        use_sync_batch_norm(layer, group)
        leaf = x[part].clone().requires_grad_()
        torch.nn.init.constant_(layer.bias, 0.5)
        torch.nn.init.constant_(layer.weight, 1.5)
        forward = torch.compile(layer, backend="aot_eager", dynamic=False) if layer is compiled else layer
        output = forward(leaf)
        output.backward(grad[part])
        results.append([output, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    expected, *of_parts = results
    for found in of_parts:
        for tensor in found[2:4]:
            ranks.on(torch.device("cpu")).sum(tensor)
        for ours, theirs in zip(found, [expected[0][own], expected[1][own], *expected[2:]], strict=True):
            torch.testing.assert_close(ours, theirs)


def check_broadcast(ranks: Ranks) -> None:
    """A view with holes, as padded weights are, gets rank 0's values, and what lies in the holes stays."""
    memory = torch.full((2, 8, 3, 3), float(ranks.first)).contiguous(memory_format=torch.channels_last)
    ranks.on(torch.device("cpu")).broadcast([memory[:, :5]])
    assert bool((memory[:, :5] == 1).all())
    assert bool((memory[:, 5:] == float(ranks.first)).all())


class Recorder:
    """Keeps the weights after each epoch of each case, and can send a signal's number after a step."""

    def __init__(self) -> None:
        self.case, self.weights, self.stop_at = "", {}, 0
        self._end, self._call = Step.end_epoch, Step.__call__

    def install(self) -> None:
        recorder = self

        def end_epoch(step: Step) -> dict[str, Any]:
            result = recorder._end(step)
            epoch = int(step.cursor.epoch)
            recorder.weights[f"{recorder.case}/{epoch}"] = step.flat.weights.numpy().copy()
            recorder.weights[f"{recorder.case}/{epoch}/stats"] = step.flat.stats.numpy().copy()
            return result

        def call(step: Step, batch: Any) -> None:
            recorder._call(step, batch)
            recorder.stop_at -= 1
            if recorder.stop_at == 0:
                interrupt.request(15)

        Step.end_epoch, Step.__call__ = end_epoch, call


def check(folder: Path) -> None:
    here = place()
    store = torch.distributed.FileStore(str(folder / "store"), here.world)
    ranks, recorder = join(here, store), Recorder()
    recorder.install()
    check_sync_batch_norm(ranks)
    check_broadcast(ranks)
    for case, wanted in CASES.items():
        recorder.case = case
        run_in(folder / case, wanted, ranks)
    # Two ranks, then one, then two.
    recorder.case, changed = "resized", folder / "resized"
    run_in(changed, CASES["sgd"], ranks, stop_after=1)
    if here.rank == 0:
        run_in(changed, CASES["sgd"], ALONE, stop_after=2)
    ranks.wait_for_all()
    run_in(changed, CASES["sgd"], ranks)
    # A signal to rank 1 only, in the second epoch: both stop after the same step; then on to the same bits.
    recorder.case, cut = "cut", folder / "cut"
    recorder.stop_at = 4 if here.rank else 0
    with interrupt.handled("stopped"), pytest.raises(interrupt.Interrupted):
        run_in(cut, CASES["local"], ranks)
    run_in(cut, CASES["local"], ranks)
    np.savez(folder / f"rank-{here.rank}.npz", **recorder.weights)
    ranks.wait_for_all()
    leave()


def rank(number: int, folder: Path) -> None:
    """Be one of two ranks in this process."""
    place_of_two = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ.update(place_of_two)
    torch.set_num_threads(1)
    check(folder)
