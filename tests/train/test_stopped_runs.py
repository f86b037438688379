"""What a run directory says of a run that has stopped and gone on: one epoch's results, or none."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcifar import interrupt
from fastcifar.analysis.compare import group_by_recipe
from fastcifar.analysis.predict import load_trained
from fastcifar.config import Recipe
from fastcifar.data.store import resolve_store
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.run_directory import END, RunDirectory
from fastcifar.train.run import choose_rows, train
from fastcifar.train.step import Step
from tests.train.tiny import assert_same_run, recipe

STEPS = 7
"""The steps of an epoch of the tiny recipe."""
FP32 = {"device": "cpu", "precision": "fp32"}
THIRD_BEST = {"engine": FP32, "seed": 1, "optimizer": {"name": "adam", "lr": 3e-3}}
"""What makes the third epoch of the tiny recipe the best so far."""


def run_in(folder: Path, wanted: Recipe, **options: Any) -> dict[str, Any]:
    """Begin a run or go on with it, each time with nothing remembered of the directory."""
    there = (folder / "recipe.toml").exists()
    made = RunDirectory.open(folder) if there else RunDirectory.create(folder, wanted, describe())
    return train(wanted, made, quiet=True, **options)


@contextmanager
def after_step(number: int, act: Any) -> Iterator[None]:
    """Call ``act`` after so many training steps of the block."""
    calls, step = [], Step.__call__

    def counted(self: Step, batch: object) -> None:
        step(self, batch)
        calls.append(batch)
        if len(calls) == number:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", counted)
        yield


def interrupt_after(number: int, folder: Path, wanted: Recipe, **options: Any) -> None:
    """Begin a run or go on with it, and press Ctrl-C after so many steps."""
    with after_step(number, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(interrupt.Interrupted):
        with interrupt.handled("go on"):
            run_in(folder, wanted, **options)


class Killed(BaseException):
    """Ends a run as ``kill -9`` does: nothing is saved after it."""


def kill() -> None:
    raise Killed


@contextmanager
def killed_before(name: str) -> Iterator[None]:
    """Kill the run before it puts a file of this name in its place; what its commit has before it is in place."""
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.name == name:
            raise Killed
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run_in(folder, recipe())
    return folder


# ------------------------------------------------------------------------------------------- no summary of a past epoch


@pytest.mark.parametrize("steps", [2, 2 * STEPS], ids=["within its next epoch", "after two more epochs"])
def test_a_stopped_run_that_goes_on_and_is_interrupted_has_no_summary(whole, tmp_path, steps):
    folder = tmp_path / "run"
    run_in(folder, recipe(), stop_after=1)
    assert all((folder / name).is_file() for name in END)
    interrupt_after(steps, folder, recipe())
    run = RunDirectory.open(folder)
    assert not any((folder / name).exists() for name in END)
    assert not set(END) & set(run.manifest().files)
    with pytest.raises(UserError, match="has no summary yet"):
        group_by_recipe([run])
    assert run_in(folder, recipe())["status"] == "finished"
    assert_same_run(whole, folder)


def test_a_run_object_that_has_read_the_summary_does_not_keep_it(tmp_path):
    run_in(tmp_path / "run", recipe(), stop_after=1)
    run = RunDirectory.open(tmp_path / "run")
    assert run.summary["epochs_done"] == 1
    with after_step(STEPS + 1, kill), pytest.raises(Killed):
        train(recipe(), run, quiet=True)
    assert [row["epoch"] for row in run.metrics()] == [1, 2]
    with pytest.raises(UserError, match="has no summary yet"):
        _ = run.summary


def test_a_stopped_run_that_is_killed_while_an_epoch_is_written_has_no_summary(whole, tmp_path):
    folder = tmp_path / "run"
    run_in(folder, recipe(), stop_after=1)
    with killed_before("metrics.jsonl"), pytest.raises(Killed):
        run_in(folder, recipe())
    assert not RunDirectory.open(folder).has_summary
    assert run_in(folder, recipe())["status"] == "finished"
    assert_same_run(whole, folder)


def test_a_stopped_run_keeps_its_summary_until_it_has_gone_on(tmp_path):
    run_in(tmp_path / "run", recipe(), stop_after=1)
    with after_step(1, kill), pytest.raises(Killed):
        run_in(tmp_path / "run", recipe())
    run = RunDirectory.open(tmp_path / "run")
    assert run.summary["epochs_done"] == len(run.metrics()) == 1


def test_a_run_that_goes_back_to_an_earlier_checkpoint_has_no_summary_of_a_later_one(tmp_path):
    run_in(tmp_path / "run", recipe(), stop_after=3)
    (tmp_path / "run/checkpoints/epoch-00003/state.json").write_text("{}")
    with after_step(1, kill), pytest.raises(Killed):
        run_in(tmp_path / "run", recipe())
    run = RunDirectory.open(tmp_path / "run")
    assert len(run.metrics()) == 2
    assert not run.has_summary


# --------------------------------------------------------------------------- weights, logits and summary of one epoch


def assert_weights_give_the_summary(folder: Path) -> None:
    """Check that the saved weights predict the saved logits, and that the summary tells their accuracy."""
    run = RunDirectory.open(folder)
    store = resolve_store(recipe().data, None)
    rows = choose_rows(recipe().data, store, 0)
    images, labels = torch.from_numpy(store.split("test").images[rows.test]), run.logits("test/labels")
    for which in ("last", "best"):
        if run.summary[which] is None:
            assert not (folder / f"weights/{which}.safetensors").exists()
            continue
        trained = load_trained(run, which)
        with torch.no_grad():
            theirs = trained.model(trained.normalized(images)).numpy()
        np.testing.assert_allclose(run.logits(f"test/{which}/raw"), theirs, atol=1e-4)
        assert run.summary[which]["accuracy"] == pytest.approx(100 * np.mean(theirs.argmax(1) == labels))
    assert run.summary["last"]["epoch"] == run.summary["epochs_done"]


@pytest.mark.parametrize("stop_after", [1, 3], ids=["before the first evaluation", "after it"])
def test_a_run_that_stops_at_an_epoch_without_an_evaluation_tells_the_results_of_that_epoch(tmp_path, stop_after):
    wanted = recipe(eval={"every_epochs": 2}, engine=FP32)
    run_in(tmp_path / "whole", wanted)
    summary = run_in(tmp_path / "run", wanted, stop_after=stop_after)
    assert summary["epochs_done"] == stop_after
    assert (summary["best"] or {}).get("epoch") == (2 if stop_after == 3 else None)
    assert_weights_give_the_summary(tmp_path / "run")
    assert "test" not in RunDirectory.open(tmp_path / "run").metrics()[-1]
    run_in(tmp_path / "run", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_an_epoch_that_was_interrupted_is_finished_before_a_stop_after_an_earlier_one(tmp_path):
    wanted = recipe(engine=FP32)
    run_in(tmp_path / "whole", wanted)
    interrupt_after(2 * STEPS + 3, tmp_path / "run", wanted)
    assert RunDirectory.open(tmp_path / "run").checkpoints()[-1] == "epoch-00002-step-000003"
    assert run_in(tmp_path / "run", wanted, stop_after=2)["epochs_done"] == 3
    assert_weights_give_the_summary(tmp_path / "run")
    run_in(tmp_path / "run", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_the_best_weights_are_those_of_the_checkpoint_that_a_killed_run_goes_on_from(tmp_path):
    wanted = recipe(checkpoint={"every_epochs": 2}, **THIRD_BEST)
    run_in(tmp_path / "whole", wanted)
    accuracies = [row["test"]["raw"]["accuracy"] for row in RunDirectory.open(tmp_path / "whole").metrics()]
    assert accuracies[2] > max(accuracies[:2]), "choose a seed whose third epoch is better than the first two"
    with after_step(3 * STEPS + 1, kill), pytest.raises(Killed):
        run_in(tmp_path / "run", wanted)
    assert len(RunDirectory.open(tmp_path / "run").metrics()) == 3
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    assert run_in(tmp_path / "run", wanted, stop_after=2)["epochs_done"] == 2
    assert_weights_give_the_summary(tmp_path / "run")
    run_in(tmp_path / "killed", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_best_weights_of_an_epoch_after_the_checkpoint_are_not_told_as_those_of_one_before_it(tmp_path, capsys):
    wanted = recipe(**THIRD_BEST)
    run_in(tmp_path / "whole", wanted)
    run_in(tmp_path / "run", wanted, stop_after=3)
    assert RunDirectory.open(tmp_path / "run").summary["best"]["epoch"] == 3
    (tmp_path / "run/checkpoints/epoch-00003/state.json").write_text("{}")
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    assert run_in(tmp_path / "run", wanted, stop_after=2)["best"] is None
    assert "best.safetensors: is not of the best epoch 2 any more: chosen anew" in capsys.readouterr().err
    assert_weights_give_the_summary(tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "damaged"):
        run_in(folder, wanted)
        assert_same_run(tmp_path / "whole", folder)


def test_best_weights_written_by_a_commit_that_was_cut_short_are_not_told_as_those_of_the_checkpoint(tmp_path):
    wanted = recipe(**THIRD_BEST)
    run_in(tmp_path / "whole", wanted)
    run_in(tmp_path / "run", wanted, stop_after=2)
    with killed_before("state.safetensors"), pytest.raises(Killed):
        run_in(tmp_path / "run", wanted)
    assert run_in(tmp_path / "run", wanted, stop_after=2)["best"] is None
    assert_weights_give_the_summary(tmp_path / "run")
    run_in(tmp_path / "run", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------------------ missing checkpoints


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("missing", ["the folder", "their last files"])
def test_a_run_whose_checkpoints_have_gone_is_not_begun_again(tmp_path, capsys, keep, missing):
    wanted = recipe(checkpoint={"keep": keep})
    run_in(tmp_path / "run", wanted, stop_after=2)
    if missing == "the folder":
        shutil.rmtree(tmp_path / "run/checkpoints")
    else:
        for path in (tmp_path / "run/checkpoints").glob("*/state.json"):
            path.unlink()
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint is intact; restore the folder from a copy"):
        run_in(tmp_path / "run", wanted)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert "epoch-00002/state.json: is missing; restore it from a copy" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named_and_the_one_before_is_taken(whole, tmp_path, capsys):
    run_in(tmp_path / "run", recipe(), stop_after=3)
    shutil.rmtree(tmp_path / "run/checkpoints/epoch-00003")
    assert RunDirectory.open(tmp_path / "run").checkpoints() == ["epoch-00002", "epoch-00003"]
    assert run_in(tmp_path / "run", recipe())["status"] == "finished"
    assert_same_run(whole, tmp_path / "run")
    said = capsys.readouterr().err
    assert "epoch-00003/state.json: is missing" in said
    assert "goes on from the one before, epoch-00002" in said


def test_a_run_that_was_killed_before_its_first_checkpoint_says_that_it_begins_again(tmp_path, capsys):
    wanted = recipe(checkpoint={"every_epochs": 3})
    with after_step(2 * STEPS + 1, kill), pytest.raises(Killed):
        run_in(tmp_path / "run", wanted)
    assert run_in(tmp_path / "run", wanted)["status"] == "finished"
    said = capsys.readouterr().err
    assert "has no checkpoint: begins again with the first epoch, metrics.jsonl had 2" in said
