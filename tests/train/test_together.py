"""Seeds side by side in one process: each is to the bit what it is alone, however it is stopped."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from fastcifar import interrupt
from fastcifar.config import to_toml
from fastcifar.data.loaders.resident import ResidentLoader
from fastcifar.environment import describe
from fastcifar.run_directory import RunDirectory
from fastcifar.train.run import train
from fastcifar.train.step import Step
from fastcifar.train.together import train_together
from tests.command import fastcifar
from tests.forked import Forked
from tests.train.tiny import assert_same_run, recipe

SEEDS = (42, 43)
# Dropout draws from torch's generator, ShakeDrop from our own; the last batch of 50 images is an odd one.
EVERYTHING = {
    "data": {"source": "synthetic", "subset": 50, "test_subset": 20, "loader": {"name": "resident"}},
    "augment": ["crop(4)", "flip"],
    "mix": {"name": "cutmix_or_mixup", "p": 0.5},
    "model": {"name": "wide_resnet", "depth": 10, "widen": 1, "shakedrop": 0.3, "dropout": 0.2},
    "optimizer": {"name": "sgd", "lr": 0.02},
    "asam": {"rho": 0.5},
    "ema": {"decay": 0.9},
    "train": {"epochs": 2, "batch_size": 20},
    "engine": {"device": "cpu", "precision": "fp32"},  # bf16 takes a CPU several times as long
}


def begin(folder: Path, **changes) -> list[RunDirectory]:
    """Return a run directory for each seed, new or as they are."""
    wanted = [recipe(**changes, seed=seed) for seed in SEEDS]
    folders = [folder / f"seed-{seed}" for seed in SEEDS]
    return [
        RunDirectory.open(path) if path.exists() else RunDirectory.create(path, one, describe())
        for path, one in zip(folders, wanted, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The seeds one after the other, each by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for run, seed in zip(begin(folder, **EVERYTHING), SEEDS, strict=True):
        train(recipe(**EVERYTHING, seed=seed), run, quiet=True)
    return folder


def assert_same_runs(one: Path, other: Path) -> None:
    for seed in SEEDS:
        assert_same_run(one / f"seed-{seed}", other / f"seed-{seed}")


def test_each_seed_is_what_it_is_alone(alone, tmp_path):
    together = train_together(begin(tmp_path, **EVERYTHING), quiet=True)
    assert_same_runs(alone, tmp_path)
    assert [lane.summary["together"] for lane in together] == [2, 2]


def test_the_process_keeps_its_own_random_numbers(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_together(begin(tmp_path, train={"epochs": 1, "batch_size": 100}), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_images_are_there_once(tmp_path, monkeypatch):
    loaders, make = [], ResidentLoader.__init__

    def watched(self: ResidentLoader, *args: object) -> None:
        make(self, *args)
        loaders.append(self.images)

    monkeypatch.setattr(ResidentLoader, "__init__", watched)
    train_together(begin(tmp_path, train={"epochs": 1, "batch_size": 100}), quiet=True)
    assert len(loaders) == 2
    assert len({images.data_ptr() for images in loaders}) == 1


def test_interrupted_and_resumed_together_and_alone_it_ends_in_the_same_bits(alone, tmp_path, monkeypatch):
    calls, step = [], Step.__call__

    def stop(self: Step, batch: object) -> None:
        step(self, batch)
        calls.append(self.recipe.seed)
        # In an epoch, at its end and at the run's; while the one or the other seed had its turn.
        if len(calls) in (1, 4, 7, 12):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", stop)
    for _ in range(4):
        runs = begin(tmp_path, **EVERYTHING)
        with pytest.raises(interrupt.Interrupted) as stopped, interrupt.handled("go on"):
            train_together(runs, quiet=True)
        assert stopped.value.status == 143
    one, other = begin(tmp_path, **EVERYTHING)
    train(recipe(**EVERYTHING, seed=SEEDS[0]), one, quiet=True)
    train_together([other], quiet=True)
    assert len(calls) == 2 * 6, "no step is taken twice"
    assert_same_runs(alone, tmp_path)


def test_a_seed_that_diverges_leaves_the_others_going(alone, tmp_path, monkeypatch, capsys):
    inputs = Step.inputs

    def spoil(self: Step, batch: object) -> tuple:
        images, target = inputs(self, batch)
        return (images * float("nan") if self.recipe.seed == 42 else images), target

    monkeypatch.setattr(Step, "inputs", spoil)
    together = train_together(begin(tmp_path, **EVERYTHING), quiet=True)
    assert [lane.error is None for lane in together] == [False, True]
    assert "seed 42: the loss was not finite at step 1 of epoch 1" in capsys.readouterr().err
    assert_same_run(alone / "seed-43", tmp_path / "seed-43")
    assert not RunDirectory.open(tmp_path / "seed-42").has_summary


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["graph", "auto"])
def test_on_a_gpu_each_seed_draws_and_learns_what_it_does_alone(tmp_path, mode):
    """Not to the bit: cuDNN chooses its algorithms by timing them. Other dropout moves the loss by several percent."""
    changes = {**EVERYTHING, "engine": {"device": "cuda", "precision": "fp32", "mode": mode, "strict": True}}
    for run, seed in zip(begin(tmp_path / "alone", **changes), SEEDS, strict=True):
        train(recipe(**changes, seed=seed), run, quiet=True)
    train_together(begin(tmp_path / "together", **changes), quiet=True)
    for seed in SEEDS:
        rows = [RunDirectory.open(tmp_path / how / f"seed-{seed}").metrics() for how in ("alone", "together")]
        for one, other in zip(*rows, strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-3)


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def tiny(tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(to_toml(recipe(seed=0, train={"epochs": 2, "batch_size": 60})))
    return tmp_path


def test_the_command_makes_a_run_for_each_seed(tiny):
    done = fastcifar("run", "tiny.toml", "--seeds", "2", "--out", "all", "--stop-after", "1", "--json", cwd=tiny)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)["runs"]
    assert [(run["run"], run["status"]) for run in first] == [("all/seed-0", "stopped"), ("all/seed-1", "stopped")]
    assert "seed 1: epoch 1/2" in done.stderr
    assert "stopped at epoch 1 of 2; the same command with `--resume auto` goes on with every seed" in done.stderr
    done = fastcifar("run", "tiny.toml", "--seeds", "2", "--out", "all", "--resume", "auto", cwd=tiny)
    assert done.returncode == 0, done.stderr
    assert "seed 0  last" in done.stdout
    assert "n = 2" in done.stdout
    assert fastcifar("run", "tiny.toml", "--set", "seed=1", "--out", "one", "--quiet", cwd=tiny).returncode == 0
    assert_same_run(tiny / "one", tiny / "all/seed-1")


def test_a_finished_seed_is_not_trained_again(tiny):
    words = ["run", "tiny.toml", "--seeds", "2", "--json", "--quiet"]
    done = fastcifar("run", "tiny.toml", "--json", "--quiet", cwd=tiny)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert fastcifar(*words, "--set", "seed=1", "--stop-after", "1", cwd=tiny).returncode == 0
    begun = sorted((tiny / "runs").iterdir())
    done = fastcifar(*words, "--resume", "auto", cwd=tiny)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert runs[0]["run"] == first["run"]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    assert sorted((tiny / "runs").iterdir()) == begun, "a run was made anew"


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_folder_that_is_refused_is_so_before_the_others_are_begun(tiny, resume):
    other = recipe(seed=1, train={"epochs": 3, "batch_size": 60})
    RunDirectory.create(tiny / "all/seed-1", other, {})
    done = fastcifar("run", "tiny.toml", "--seeds", "3", "--out", "all", *resume, cwd=tiny)
    assert done.returncode == 2
    assert "all/seed-1: " in done.stderr
    assert [path.name for path in (tiny / "all").iterdir()] == ["seed-1"]


def test_a_failed_seed_is_named_and_the_status_is_2(tiny):
    settings = ["--set", "optimizer={name='sgd',lr=1e6}", "--set", "engine.precision=fp32"]
    done = fastcifar("run", "tiny.toml", "--seeds", "2", "--out", "all", *settings, cwd=tiny)
    assert done.returncode == 2
    assert "2 of 2 seeds failed, for the reasons above: seed 0 (all/seed-0), seed 1 (all/seed-1)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_leaves_a_checkpoint_of_every_seed(tiny):
    words = ["run", "tiny.toml", "--seeds", "2", "--out", "all", "--set", "train.epochs=5000"]
    child = Forked(*words, cwd=tiny)
    try:
        child.wait_for("all/seed-1/checkpoints/epoch-*/state.json", tiny)
        os.kill(child.pid, signal.SIGINT)
        assert child.status() == 130, child.printed()
    finally:
        child.kill()
    assert "the same command with `--resume auto` goes on with every seed" in child.printed()
    assert "Traceback" not in child.printed()
    done = [RunDirectory.open(tiny / f"all/seed-{seed}").checkpoints()[-1] for seed in (0, 1)]
    assert abs(steps_of(done[0]) - steps_of(done[1])) <= 1, done
    assert fastcifar(*words, "--resume", "auto", "--stop-after", "1", "--quiet", cwd=tiny).returncode == 0


def steps_of(checkpoint: str) -> int:
    """Return the steps before a checkpoint such as epoch-00003-step-000002; an epoch has four."""
    numbers = [int(word) for word in checkpoint.split("-") if word.isdecimal()]
    return 4 * numbers[0] + sum(numbers[1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "2", "--devices", "2"], "several runs in this process; leave it or --devices away"),
        (["--seeds", "2", "--resume", "runs/x"], "leave it or --resume RUN_DIR away"),
        (["--seeds", "2", "--check-nan"], "leave it or --check-nan away"),
        (["--seeds", "2", "--profile", "1:2"], "leave it or --profile away"),
        (["--seeds", "2", "--set", "data.loader.name=torchvision"], "which the torchvision loader does not have"),
        (["--seeds", "2", "--set", "track=['wandb']"], "wandb knows one run of a process at a time"),
        (["--seeds", "33"], "less than or equal to 32"),
        (["--seeds", "2", "--set", "seed=18446744073709551615"], "seed"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(tiny, words, message):
    done = fastcifar("run", "tiny.toml", *words, cwd=tiny)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tiny / "runs").exists()


def test_a_combination_and_no_recipe_are_refused(tiny):
    assert "which recipe?" in fastcifar("run", "--seeds", "2", cwd=tiny).stderr
    assert "is a combination" in fastcifar("run", "ensemble-soft", "--seeds", "2", cwd=tiny).stderr
