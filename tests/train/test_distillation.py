"""Distillation: its loss and a whole training against float64, runs that resume, and what is refused."""

import copy
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcifar.analysis.combine import run_combine
from fastcifar.augment import Augmentation
from fastcifar.config.schema import CombineRecipe, DistillConfig, Recipe
from fastcifar.data.batch import Batch
from fastcifar.data.loaders.base import Blocks
from fastcifar.data.store import resolve_store
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.models.trained import trained_model
from fastcifar.open_run import open_run
from fastcifar.run_directory import RunDirectory
from fastcifar.teachers import teacher_runs, teachers_digest
from fastcifar.train import teacher_logits
from fastcifar.train.checks import check_division
from fastcifar.train.distillation import TaughtBy, Teacher, divergence
from fastcifar.train.run import choose_rows, train, with_order
from fastcifar.train.step import build_step
from fastcifar.train.teacher_logits import plan_key
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
    teacher = Teacher([TaughtBy(master, scale, shift)], DistillConfig(teacher="x", weight=0.7), cpu)
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


# ------------------------------------------------------------------------------------------------- several teachers


def test_several_teachers_say_the_mean_of_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    student, *teachers = 3 * torch.randn(3, 7, 10, generator=generator)
    weights = torch.tensor([0.8, 0.2])
    said = sum(w * F.softmax(t.double() / 3, 1) for w, t in zip(weights.double(), teachers, strict=True))
    expected = 9 * torch.nn.KLDivLoss(reduction="sum")(F.log_softmax(student.double() / 3, 1), said)
    found = divergence(student, torch.stack(teachers), 3.0, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    alone = divergence(student, teachers[0][None], 3.0, torch.ones(1))
    assert torch.equal(alone, divergence(student, teachers[0], 3.0))


@pytest.fixture(scope="module")
def ensemble(master: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weighted combination of the teacher and a less trained one; it and its members lie beside each other."""
    parent = tmp_path_factory.mktemp("ensemble")
    shutil.copytree(master, parent / "one")
    wanted = recipe(name="other", seed=7, train={"epochs": 1, "batch_size": 100})
    train(wanted, RunDirectory.create(parent / "two", wanted, describe()), quiet=True)
    members = {name: RunDirectory.open(parent / place) for name, place in (("tiny", "one"), ("other", "two"))}
    table = {"how": "weighted", "members": ["tiny", "other"], "weights": [3.0, 1.0]}
    run_combine(CombineRecipe.model_validate({"name": "both", "combine": table}), members, parent / "both")
    return parent / "both"


def test_a_combination_teaches_with_its_members_and_weights(ensemble: Path, tmp_path: Path) -> None:
    teachers = teacher_runs(DistillConfig(teacher=str(ensemble)))
    assert [(each.run.folder.name, each.which, each.weight) for each in teachers] == [
        ("one", "last", 0.75), ("two", "last", 0.25),
    ]  # fmt: skip
    shutil.copytree(ensemble.parent, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "two")
    moved = teacher_runs(DistillConfig(teacher=str(tmp_path / "moved" / "both")))
    assert moved[1].run.folder == ensemble.parent / "two"
    one, both = (teachers_digest(DistillConfig(teacher=str(ensemble.parent / name))) for name in ("one", "both"))
    assert one != both
    with pytest.raises(UserError, match="has no selected weights"):
        teacher_runs(DistillConfig(teacher=str(ensemble), weights="selected"))


def in_rows(ensemble: Path, ladder: Path) -> Path:
    """Lay the combination and its members out as a ladder does; return where the combination is."""
    members = {}
    for name, row, run in (("tiny", "net-a", "one"), ("other", "net-b", "two")):
        shutil.copytree(ensemble.parent / run, ladder / row / "seed-42")
        members[name] = RunDirectory.open(ladder / row / "seed-42")
    run_combine(RunDirectory.open(ensemble).recipe, members, ladder / "both" / "seed-42")
    return ladder / "both" / "seed-42"


def test_a_ladders_combination_teaches_from_any_folder_and_after_a_move(
    ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taught_by(teacher: Path) -> list[Path]:
        return [each.run.folder.resolve() for each in teacher_runs(DistillConfig(teacher=str(teacher)))]

    monkeypatch.chdir(tmp_path)
    there = [tmp_path / "lad" / row / "seed-42" for row in ("net-a", "net-b")]
    assert taught_by(place := in_rows(ensemble, Path("lad"))) == there
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert taught_by(".." / place) == there
    (tmp_path / "lad").rename(tmp_path / "new")
    new = tmp_path / "new"
    assert taught_by(new / "both" / "seed-42") == [new / row / "seed-42" for row in ("net-a", "net-b")]


def test_a_member_that_is_gone_is_named_and_no_other_run_taken_for_it(ensemble: Path, tmp_path: Path) -> None:
    place = in_rows(ensemble, tmp_path)
    (tmp_path / "net-b").rename(tmp_path / "away")
    shutil.copytree(ensemble.parent / "one", tmp_path / "net-b" / "seed-42")  # a run of another recipe
    with pytest.raises(UserError, match=r"both/seed-42: its member other is neither at .*seed-42 nor beside .*; move"):
        teacher_runs(DistillConfig(teacher=str(place)))


def test_a_combination_without_probabilities_is_refused(ensemble: Path, tmp_path: Path) -> None:
    members = {name: RunDirectory.open(ensemble.parent / place) for name, place in (("tiny", "one"), ("other", "two"))}
    table = {"how": "hard", "members": ["tiny", "other"]}
    run_combine(CombineRecipe.model_validate({"name": "votes", "combine": table}), members, tmp_path / "votes")
    with pytest.raises(UserError, match="how = soft or weighted"):
        teacher_runs(DistillConfig(teacher=str(tmp_path / "votes")))


# ----------------------------------------------------------------------------------------------------- kept logits


def cached(ensemble: Path, **changes) -> Recipe:
    tables = {"distill": {"teacher": str(ensemble), "cache": True}, "mix": {"name": "mixup"}}
    return student(ensemble, **(tables | changes))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teacher_logits, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "teacher-logits"


def test_kept_logits_are_computed_once_and_mean_the_same(
    ensemble: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_in(tmp_path / "first", cached(ensemble))
    files = sorted(own_cache.glob("*/epoch-*.npz"))
    assert [path.name for path in files] == ["epoch-0.npz", "epoch-1.npz"]
    files[1].write_bytes(files[1].read_bytes()[:-100])
    asked = []
    see = Teacher.see
    monkeypatch.setattr(Teacher, "see", lambda self, images: asked.append(len(images)) or see(self, images))
    run_in(tmp_path / "second", cached(ensemble))
    assert asked == [50, 50]  # of the damaged epoch alone
    assert_same_run(tmp_path / "first", tmp_path / "second")
    run_in(tmp_path / "online", cached(ensemble, distill={"teacher": str(ensemble)}))
    kept, online = (RunDirectory.open(tmp_path / name).metrics() for name in ("first", "online"))
    for one, other in zip(kept, online, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)


def test_what_is_kept_is_what_the_teachers_say_of_the_augmented_images(
    ensemble: Path, tmp_path: Path, own_cache: Path
) -> None:
    """Image by image, with the augmentation's own entry and the teachers' runs; nothing of the step."""
    wanted = cached(ensemble, mix=None, engine={"device": "cpu", "precision": "fp32"})
    run_in(tmp_path / "run", wanted)
    store = resolve_store(wanted.data, None)
    rows = choose_rows(wanted.data, store, wanted.seed).train
    augment = Augmentation(["crop(4)", "flip"], mean=wanted.data.mean, std=wanted.data.std, seed=wanted.seed)
    raw = torch.from_numpy(store.split("train").images[rows])
    images = augment(raw, indices=torch.from_numpy(rows), epoch=1).float()
    pixels = images * torch.tensor(wanted.data.std).view(3, 1, 1) + torch.tensor(wanted.data.mean).view(3, 1, 1)
    (path,) = own_cache.glob("*/epoch-1.npz")
    kept = torch.from_numpy(np.load(path)["logits"])[:, rows].float()
    for said, each in zip(kept, teacher_runs(wanted.distill), strict=True):
        model = trained_model(each.run, each.which).model
        with torch.no_grad():
            torch.testing.assert_close(said, model((pixels - 0.5) / 0.5), rtol=2e-3, atol=2e-3)


def test_runs_share_what_is_kept_where_they_see_the_same_images(master: Path) -> None:
    def key(**changes) -> str:
        tables = {"distill": {"teacher": str(master), "cache": True}, **changes}
        return plan_key(student(master, **tables), "content", torch.device("cpu"))

    same = [
        {"optimizer": {"name": "sgd", "lr": 0.1}}, {"train": {"epochs": 9, "batch_size": 7}},
        {"model": {"name": "deep_baseline"}}, {"distill": {"teacher": str(master), "temperature": 1.0}},
    ]  # fmt: skip
    other = [
        {"seed": 1}, {"augment": ["flip"]}, {"mix": {"name": "mixup"}},
        {"train": {"epochs": 2, "batch_size": 50, "drop_last": True}},
    ]  # fmt: skip
    assert {key(**changes) for changes in same} == {key()}
    assert len({key(), *(key(**changes) for changes in other)}) == 5


@pytest.mark.parametrize(
    ("changes", "matters"),
    [
        ({"mix": {"name": "mixup"}}, True),
        ({"train": {"epochs": 2, "batch_size": 50, "drop_last": True}}, True),
        ({}, False),
    ],
)
def test_the_order_counts_where_it_decides_who_is_mixed_or_left_out(master: Path, changes, matters: bool) -> None:
    wanted = student(master, **({"distill": {"teacher": str(master), "cache": True}} | changes))
    orders = [with_order(wanted, order) for order in ("random", "block", "native")]
    assert len({plan_key(each, "content", torch.device("cpu")) for each in orders}) == (3 if matters else 1)


def test_runs_whose_loaders_have_one_order_share_what_is_kept(
    ensemble: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan has become counts: one that is block order on this machine may be random order on another."""
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(10, 2)))

    def run(name: str, order: str) -> None:
        data = {"source": "synthetic", "subset": 100, "test_subset": 40, "loader": {"name": "resident", "order": order}}
        run_in(tmp_path / name, cached(ensemble, data=data))

    run("random", "random")
    run("plan", "plan")
    assert len(list(own_cache.iterdir())) == 1
    run("block", "block")
    monkeypatch.setattr("fastcifar.train.run.decide_order", lambda *arguments: "block")
    run("plan elsewhere", "plan")
    assert len(list(own_cache.iterdir())) == 2
    for one, other in (("random", "plan"), ("block", "plan elsewhere")):
        assert_same_run(tmp_path / one, tmp_path / other)


def test_images_that_stay_the_same_are_seen_once(
    master: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = {"distill": {"teacher": str(master), "cache": True}, "augment": []}
    run_in(tmp_path / "first", student(master, **still))
    assert [path.name for path in own_cache.glob("*/*")] == ["epoch-0.npz"]
    run_in(tmp_path / "online", student(master, augment=[]))
    kept, online = (RunDirectory.open(tmp_path / name).metrics() for name in ("first", "online"))
    assert len(kept) == 2
    for one, other in zip(kept, online, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
    monkeypatch.setattr(Teacher, "see", lambda self, images: pytest.fail("asked again"))
    run_in(tmp_path / "longer", student(master, **still, train={"epochs": 3, "batch_size": 20}))


def test_seeds_share_what_does_not_depend_on_them(master: Path) -> None:
    def keys(**changes) -> set[str]:
        tables = {"distill": {"teacher": str(master), "cache": True}, "data": {"source": "synthetic"}, "augment": []}
        recipes = [student(master, **(tables | changes), seed=seed) for seed in (1, 2)]
        return {plan_key(each, "content", torch.device("cpu")) for each in recipes}

    assert len(keys()) == 1
    for change in (
        {"augment": ["flip"]}, {"data": {"source": "synthetic", "subset": 100}}, {"mix": {"name": "mixup"}},
        {"data": {"source": "synthetic", "holdout": 100}},
        {"data": {"source": "synthetic", "resize": [[0.0, 24]]}, "model": {"name": "wide_resnet", "depth": 10}},
        {"train": {"epochs": 2, "batch_size": 50, "drop_last": True}},
    ):  # fmt: skip
        assert len(keys(**change)) == 2, change


def test_several_devices_do_not_fill_the_cache(master: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.cache is filled by one device"):
        check_division(student(master, distill={"teacher": str(master), "cache": True}), 100, 2)
