"""Distillation: its loss and a whole training against float64, runs that resume, and what is refused."""

import copy
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastcifar.config.schema import DistillConfig, Recipe
from fastcifar.data.batch import Batch
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.open_run import open_run
from fastcifar.run_directory import RunDirectory
from fastcifar.train.distillation import Teacher, divergence
from fastcifar.train.run import train
from fastcifar.train.step import build_step
from tests.train.reference import error, make_data, make_net
from tests.train.test_against_torch import Given
from tests.train.tiny import assert_same_run, recipe

STEPS = 20


def test_the_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    student, teacher = 3 * torch.randn(2, 7, 10, generator=generator)
    ours, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = divergence(ours, teacher, 3.0)
    whole = torch.nn.KLDivLoss(reduction="batchmean")
    expected = 9 * 7 * whole(F.log_softmax(wide / 3, 1), F.softmax(teacher.double() / 3, 1))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)
    assert float(divergence(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_equals_float64(accumulate: int) -> None:
    """The teacher normalizes its images in another way; micro-batches add up to the whole batch's loss."""
    net, data, master = make_net(3), make_data(4, STEPS), make_net(8).eval()
    wide, wide_master = copy.deepcopy(net).double(), copy.deepcopy(master).double()
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    scale, shift = [0.5, 2.0, 1.5], [0.1, -0.2, 0.3]
    for x, y in data:
        moved = x.double() * torch.tensor(scale).double().view(1, 3, 1, 1) + torch.tensor(shift).view(1, 3, 1, 1)
        optimizer.zero_grad()
        parts = -(-len(x) // accumulate)
        total = torch.zeros(())
        for a, b, t in zip(x.double().split(parts), y.split(parts), moved.split(parts), strict=True):
            logits = wide(a)
            with torch.no_grad():
                theirs = F.softmax(wide_master(t) / 4, 1)
            apart = 16 * F.kl_div(F.log_softmax(logits / 4, 1), theirs, reduction="sum") / len(x)
            total = total + 0.3 * F.cross_entropy(logits, b, reduction="sum") / len(x) + 0.7 * apart
        total.backward()
        optimizer.step()
    table = {
        "name": "t", "model": {"name": "lenet5"}, "engine": {"precision": "fp32"},
        "train": {"epochs": 1, "batch_size": 16, "accumulate": accumulate}, "optimizer": {"name": "sgd", "lr": 0.02},
    }  # fmt: skip
    wanted, cpu = Recipe.model_validate(table), torch.device("cpu")
    teacher = Teacher(master, DistillConfig(teacher="x", weight=0.7), scale, shift, cpu)
    step = build_step(wanted, net, Given(data), None, steps_per_epoch=STEPS, device=cpu, teacher=teacher)
    step.begin_epoch(0)
    for x, y in data:
        rows = torch.arange(len(x))
        step(Batch(torch.zeros(len(x), 8, 8, 3, dtype=torch.uint8), rows, y, rows))
    assert error(net.state_dict(), wide) < 2e-6


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    wanted = recipe(train={"epochs": 1, "batch_size": 32})
    train(wanted, RunDirectory.create(folder, wanted, describe()), quiet=True)
    return folder


def student(master: Path, **changes) -> Recipe:
    data = {"source": "synthetic", "subset": 100, "test_subset": 50, "mean": [0.4, 0.5, 0.6]}
    tables = {"distill": {"teacher": str(master)}, "data": data, "train": {"epochs": 2, "batch_size": 50}}
    return recipe(**(tables | changes))


def run_in(folder: Path, wanted: Recipe | None, **options) -> None:
    resume = str(folder) if (folder / "recipe.toml").exists() else None
    with open_run(None if resume else wanted, None if resume else folder, resume) as run:
        train(run.recipe, run, quiet=True, **options)


def test_a_student_resumes_to_the_same_bits_and_learns_something_else(master: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "whole", student(master))
    run_in(tmp_path / "parts", student(master), stop_after=1)
    run_in(tmp_path / "parts", None)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    run_in(tmp_path / "alone", student(master, distill=None))
    weights = [(tmp_path / name / "weights/last.safetensors").read_bytes() for name in ("whole", "alone")]
    assert weights[0] != weights[1]


def test_another_teacher_in_its_place_is_refused(master: Path, tmp_path: Path) -> None:
    shutil.copytree(master, tmp_path / "teacher")
    run_in(tmp_path / "run", student(tmp_path / "teacher"), stop_after=1)
    shutil.rmtree(tmp_path / "teacher")
    wanted = recipe(seed=7, train={"epochs": 1, "batch_size": 32})
    train(wanted, RunDirectory.create(tmp_path / "teacher", wanted, describe()), quiet=True)
    with pytest.raises(UserError, match="has other weights now"):
        run_in(tmp_path / "run", None)


def test_what_is_no_teacher_is_refused(master: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        run_in(tmp_path / "run", student(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
    unfinished = tmp_path / "unfinished"
    wanted = recipe(train={"epochs": 2, "batch_size": 100})
    train(wanted, RunDirectory.create(unfinished, wanted, describe()), quiet=True, stop_after=1)
    with pytest.raises(UserError, match="is not finished"):
        run_in(tmp_path / "run", student(unfinished))
