"""A run from end to end on synthetic images: its record, its result, and every way in which it can stop."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastcifar import interrupt, run_directory
from fastcifar.analysis.predict import load_trained
from fastcifar.config import Recipe
from fastcifar.data import loaders
from fastcifar.data.loaders.base import Blocks
from fastcifar.data.store import open_store, resolve_store
from fastcifar.device import pick_device
from fastcifar.environment import describe
from fastcifar.errors import UserError
from fastcifar.run_directory import RunDirectory
from fastcifar.train.ranks import Ranks
from fastcifar.train.run import choose_rows, evaluation_sets, open_data, train, with_order
from fastcifar.train.step import Step
from tests.forked import CONTEXT
from tests.train.tiny import assert_same_run, recipe


def run_in(folder: Path, wanted: Recipe, **options) -> dict:
    there = (folder / "recipe.toml").exists()
    made = RunDirectory.open(folder) if there else RunDirectory.create(folder, wanted, describe())
    return train(wanted, made, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of the tiny recipe."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run_in(folder, recipe())
    return folder


def test_the_record_is_complete(whole):
    run = RunDirectory.open(whole)
    assert run.recipe == recipe()
    assert [row["epoch"] for row in run.metrics()] == [1, 2, 3, 4]
    assert run.summary["status"] == "finished"
    assert run.summary["images"] == 4 * 200
    assert set(run.summary["clocks"]) == {"total_s", "training_s", "compilation_s"}
    assert run.environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert run.checkpoints() == ["epoch-00003", "epoch-00004"]
    assert not list(whole.rglob("*.tmp"))


def test_a_run_goes_on_in_the_order_that_it_began_with(tmp_path, monkeypatch):
    """It began where the set was streamed, in blocks, and goes on where the set is resident: to the same bits."""
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, shape: cls(10, 2)))
    data = {"source": "synthetic", "subset": 200, "test_subset": 100, "loader": {"workers": 1}}
    wanted, loaded = recipe(data=data, train={"epochs": 2, "batch_size": 32}), []
    for name, free in (("whole", [1 << 20]), ("parts", [1 << 20, 1 << 40])):
        RunDirectory.create(tmp_path / name, wanted, describe() | {"memory_bytes": 1 << 19})
        for epochs, memory in enumerate(free, 3 - len(free)):
            monkeypatch.setattr(loaders, "free_memory", lambda device, memory=memory: memory)
            loaded.append(run_in(tmp_path / name, wanted, stop_after=epochs)["loader"])
        assert RunDirectory.open(tmp_path / name).environment["epoch_order"] == "block"
    assert loaded[1] == loaded[0] != loaded[2] == "resident"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_first_rank_says_what_order_all_have():
    class Second(Ranks):
        def from_first(self, value):
            assert value == "random"  # what this rank has decided
            return "block"

    wanted = recipe()
    _, _, loader, order = open_data(wanted, None, torch.device("cpu"), True, Second())
    loader.close()
    assert order == "block"
    assert loader.reason.endswith("; block order: as the run began")
    assert with_order(wanted, order).data.loader.order == "block"


def test_an_order_that_the_recipe_says_is_not_kept_beside_it(tmp_path):
    data = {"source": "synthetic", "subset": 64, "test_subset": 30, "loader": {"name": "resident", "order": "random"}}
    run_in(tmp_path, recipe(data=data, train={"epochs": 1, "batch_size": 32}))
    assert "epoch_order" not in RunDirectory.open(tmp_path).environment


def test_metrics_follow_from_the_saved_logits(whole):
    run = RunDirectory.open(whole)
    labels = run.logits("test/labels")
    for which in ("last", "best"):
        logits = run.logits(f"test/{which}/raw").astype(np.float64)
        assert run.summary[which]["accuracy"] == pytest.approx(100 * np.mean(logits.argmax(1) == labels))
        log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        loss = -log_softmax[np.arange(len(labels)), labels].mean()
        assert run.summary[which]["loss"] == pytest.approx(loss, rel=1e-5)
    assert run.summary["best"]["accuracy"] == max(row["test"]["raw"]["accuracy"] for row in run.metrics())


def test_best_is_the_first_epoch_of_the_highest_accuracy(whole):
    run = RunDirectory.open(whole)
    accuracy = [row["test"]["raw"]["accuracy"] for row in run.metrics()]
    assert run.summary["best"]["epoch"] == 1 + int(np.argmax(accuracy))


def test_another_seed_gives_another_run(whole, tmp_path):
    run_in(tmp_path / "other", recipe(seed=7))
    one, other = (load_file(f / "weights/last.safetensors") for f in (whole, tmp_path / "other"))
    assert any(not np.array_equal(one[k], other[k]) for k in one)


def test_the_same_seed_gives_the_same_bits(whole, tmp_path):
    run_in(tmp_path / "again", recipe())
    assert_same_run(whole, tmp_path / "again")


def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path):
    summary = run_in(tmp_path / "cut", recipe(), stop_after=1)
    assert (summary["status"], summary["epochs_done"]) == ("stopped", 1)
    run_in(tmp_path / "cut", recipe(), stop_after=3)
    assert run_in(tmp_path / "cut", recipe())["status"] == "finished"
    assert_same_run(whole, tmp_path / "cut")


def test_clocks_add_up_over_a_resume(tmp_path):
    first = run_in(tmp_path / "cut", recipe(), stop_after=2)["clocks"]
    second = run_in(tmp_path / "cut", recipe())["clocks"]
    assert all(second[name] > first[name] for name in first)


EVERYTHING = {
    "data": {"source": "synthetic", "subset": 200, "test_subset": 100, "holdout": 40, "loader": {"name": "resident"}},
    "augment": ["crop(4)", "flip", "autoaugment", "cutout(8)"],
    "mix": {"name": "cutmix_or_mixup", "p": 0.5},
    "model": {"name": "wide_resnet", "depth": 10, "widen": 1, "shakedrop": 0.3, "dropout": 0.2},
    "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 5e-4},
    "asam": {"rho": 0.5},
    "ema": {"decay": 0.9},
    "train": {"epochs": 2, "batch_size": 50},
    "eval": {"tta": "flip", "train_logits": True},
}


def test_resume_is_exact_with_every_part_switched_on(tmp_path):
    wanted = recipe(**EVERYTHING)
    run_in(tmp_path / "whole", wanted)
    run_in(tmp_path / "cut", wanted, stop_after=1)
    run_in(tmp_path / "cut", wanted)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    run = RunDirectory.open(tmp_path / "cut")
    assert {f"{s}/last/{k}" for s in ("test", "holdout", "train") for k in ("raw", "ema")} <= set(run.logits_keys())
    wanted_keys = {"test/last/ema/tta", "test/selected/ema", "train/best/ema", "train/selected/ema", "holdout/indices"}
    assert wanted_keys <= set(run.logits_keys())
    holdout = [row["holdout"]["ema"]["accuracy"] for row in run.metrics()]
    assert run.summary["selected"]["epoch"] == 1 + int(np.argmax(holdout))
    assert run.summary["weights"] == "ema"


def test_training_logits_are_those_of_the_saved_weights(tmp_path):
    wanted = recipe(eval={"train_logits": True}, engine={"precision": "fp32"})
    run_in(tmp_path / "run", wanted)
    run = RunDirectory.open(tmp_path / "run")
    assert run.summary["best"]["epoch"] < run.summary["last"]["epoch"], "choose a seed of which the two differ"
    images = torch.from_numpy(resolve_store(wanted.data, None).split("train").images[:200])
    for which in ("last", "best"):
        trained = load_trained(run, which)
        with torch.no_grad():
            theirs = trained.model(trained.normalized(images)).numpy()
        np.testing.assert_allclose(run.logits(f"train/{which}/raw"), theirs, atol=1e-4)
    assert not np.allclose(run.logits("train/last/raw"), run.logits("train/best/raw"), atol=1e-2)
    assert np.array_equal(run.logits("train/labels"), resolve_store(wanted.data, None).split("train").labels[:200])


def test_the_holdout_is_stratified_and_not_trained_on():
    wanted = recipe(data={"source": "synthetic", "subset": 200, "holdout": 50})
    store = resolve_store(wanted.data, None)
    rows = choose_rows(wanted.data, store, wanted.seed)
    assert not set(rows.train) & set(rows.holdout)
    assert len(rows.train) + len(rows.holdout) == 200
    assert np.bincount(store.split("train").labels[rows.holdout]).tolist() == [5] * 10


def test_a_holdout_seed_chooses_the_same_images_for_every_seed():
    wanted = recipe(data={"source": "synthetic", "holdout": 50, "subset": 200, "holdout_seed": 7})
    store = resolve_store(wanted.data, None)
    one, other = (choose_rows(wanted.data, store, seed) for seed in (1, 2))
    own = wanted.data.model_copy(update={"holdout_seed": None})
    assert np.array_equal(one.holdout, other.holdout)
    assert np.array_equal(choose_rows(own, store, 7).holdout, one.holdout)
    assert not np.array_equal(choose_rows(own, store, 1).holdout, one.holdout)


def test_the_whitening_layer_is_fitted_to_the_training_images(tmp_path):
    speed = {"name": "speednet", "widths": [8, 8, 8]}
    run_in(tmp_path / "run", recipe(model=speed, train={"epochs": 1, "batch_size": 100}))
    filters = load_file(tmp_path / "run/weights/last.safetensors")["whitening.weight"]
    flat = filters.reshape(len(filters), -1).astype(np.float64)
    rows = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    half = rows[: len(rows) // 2]
    # Whitening filters are orthogonal, random ones are not.
    np.testing.assert_allclose(half @ half.T, np.eye(len(half)), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------- kill -9


def _train_in_child(folder: str) -> None:
    torch.set_num_threads(1)
    run_in(Path(folder), recipe())


def test_killed_at_twenty_random_moments_it_ends_in_the_same_bits(whole, tmp_path, seed):
    chance, kills, finished = random.Random(seed), 0, 0
    folder = tmp_path / "victim-0"
    longest_s = 0.2
    while kills < 20 or not finished:
        start, child = time.perf_counter(), CONTEXT.Process(target=_train_in_child, args=(str(folder),))
        child.start()
        child.join(None if kills >= 20 else chance.uniform(0, longest_s))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            # A child that was killed before it finished an epoch each time would never end.
            longest_s *= 1.1
        else:
            assert child.exitcode == 0
            assert_same_run(whole, folder)
            longest_s = time.perf_counter() - start
            finished += 1
            folder = tmp_path / f"victim-{finished}"
    assert finished >= 1


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    bad = recipe(optimizer={"name": "sgd", "lr": 1e6}, engine={"device": "cpu", "precision": "fp32"})
    with pytest.raises(UserError, match=r"not finite at step \d+ of epoch 1: lower optimizer.lr"):
        run_in(tmp_path / "bad", bad)


def test_a_full_disk_is_named_and_the_last_checkpoint_survives(tmp_path, monkeypatch):
    run_in(tmp_path / "full", recipe(), stop_after=2)

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "_write_synced", full)
    with pytest.raises(UserError, match=r"No space left on device\. Free some space"):
        run_in(tmp_path / "full", recipe())
    monkeypatch.undo()
    assert RunDirectory.open(tmp_path / "full").checkpoints() == ["epoch-00001", "epoch-00002"]
    assert not list((tmp_path / "full").rglob("*.tmp"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(whole, tmp_path, capsys):
    run_in(tmp_path / "run", recipe(), stop_after=3)
    flip(tmp_path / "run/checkpoints/epoch-00003/state.safetensors")
    assert run_in(tmp_path / "run", recipe())["status"] == "finished"
    assert_same_run(whole, tmp_path / "run")
    said = capsys.readouterr().err
    assert "epoch-00003/state.safetensors: is damaged" in said
    assert "goes on from the one before, epoch-00002" in said


def test_without_an_intact_checkpoint_nothing_is_trained(tmp_path):
    run_in(tmp_path / "run", recipe(), stop_after=1)
    (tmp_path / "run/checkpoints/epoch-00001/state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is intact"):
        run_in(tmp_path / "run", recipe())


@pytest.mark.parametrize("which", ["last", "best"])
def test_damaged_weights_are_not_used(whole, tmp_path, which):
    shutil.copytree(whole, tmp_path / "copy")
    flip(tmp_path / f"copy/weights/{which}.safetensors")
    with pytest.raises(UserError, match=f"{which}.safetensors: is damaged"):
        load_trained(RunDirectory.open(tmp_path / "copy"), which)


def test_a_run_whose_best_weights_have_gone_is_not_resumed(tmp_path):
    """A later epoch writes them only if it is better, so that the run could end without them."""
    run_in(tmp_path / "run", recipe(), stop_after=2)
    (tmp_path / "run/weights/best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best\.safetensors: is missing, so that the run is damaged"):
        run_in(tmp_path / "run", recipe())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)


def test_test_images_that_rot_after_they_were_hashed_are_not_used(tmp_path, synthetic_store):
    store = open_store(Path(shutil.copytree(synthetic_store.root, tmp_path / "set")))
    with (store.root / "test_images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    evaluator: Any = None  # is not asked for anything
    with pytest.raises(UserError, match=r"test_images\.npy: damaged"):
        evaluation_sets(recipe(), store, choose_rows(recipe().data, store, 0), evaluator)


def test_divergence_in_an_epochs_last_step_is_no_success(tmp_path, monkeypatch):
    calls, step = [], Step.__call__

    def spoil(self: Step, batch: object) -> None:
        step(self, batch)
        calls.append(batch)
        if len(calls) == 21:  # the last of the third epoch
            self.flat.weights[3] = float("nan")

    monkeypatch.setattr(Step, "__call__", spoil)
    with pytest.raises(UserError, match="weights are not finite after epoch 3"):
        run_in(tmp_path / "run", recipe())
    run = RunDirectory.open(tmp_path / "run")
    assert run.checkpoints() == ["epoch-00001", "epoch-00002"]
    assert len(run.metrics()) == 2
    assert not run.has_summary


SKIPPING = {
    "sgd with SAM, averages and BatchNorm": {**EVERYTHING, "eval": {}},
    "adam": {},
}


@pytest.mark.parametrize("changes", SKIPPING.values(), ids=SKIPPING)
def test_a_step_that_is_not_finite_is_left_out(tmp_path, monkeypatch, changes):
    inputs, before, after = Step.inputs, [], []

    def spoil(self: Step, batch: object) -> tuple:
        images, target = inputs(self, batch)
        if len(before) == 2:
            images = images * float("nan")
        return images, target

    def look(self: Step, batch: object, execute=Step.execute) -> None:
        state = {k: v.clone() for k, v in self.state_dict().items() if k.startswith("flat.") and "ema" not in k}
        before.append(state)
        execute(self, batch)
        if len(before) == 2:
            after.append({k: v.clone() for k, v in self.state_dict().items() if k in state})

    monkeypatch.setattr(Step, "inputs", spoil)
    monkeypatch.setattr(Step, "execute", look)
    wanted = recipe(**{**changes, "engine": {"device": "cpu", "on_nonfinite": "skip"}})
    assert run_in(tmp_path / "run", wanted, stop_after=1)["status"] in ("stopped", "finished")
    assert len(before) > 2
    for name, value in before[1].items():
        assert torch.equal(after[0][name], value), name
    assert np.isfinite(RunDirectory.open(tmp_path / "run").metrics()[0]["train_loss"])


def test_interrupted_within_epochs_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    wanted = recipe(**EVERYTHING)
    run_in(tmp_path / "whole", wanted)
    calls, step = [], Step.__call__

    def stop(self: Step, batch: object) -> None:
        step(self, batch)
        calls.append(batch)
        if len(calls) in (1, 4, 6, 8):  # the first, the last and a middle step of an epoch, and the run's last
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", stop)
    interrupts = 0
    while True:
        try:
            with interrupt.handled("go on"):
                run_in(tmp_path / "cut", wanted)
            break
        except interrupt.Interrupted as interrupted:
            interrupts += 1
            assert interrupted.status == 143  # noqa: PT017
    assert interrupts == 4
    assert len(calls) == 8, "no step is taken twice"
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(UserError, match="no CUDA GPU is available"):
        pick_device(recipe(engine={"device": "cuda"}).engine)
