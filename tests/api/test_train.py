"""`fastcifar.train` is `fastcifar run`: the same bits, resumed too; callbacks are told; metrics come as arrays."""

import json
import os
import signal

import numpy as np
import pytest

import fastcifar
from fastcifar.train.step import Step
from tests.train.tiny import TABLE, assert_same_run, recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fastcifar.train(recipe(eval={"every_epochs": 2}), out=tmp_path_factory.mktemp("api") / "whole", quiet=True)


class Told(fastcifar.Callback):
    def __init__(self):
        self.calls = []

    def on_run_begin(self, run, recipe):
        self.calls.append(("begin", len(run.metrics()), recipe.name))

    def on_epoch_end(self, run, row):
        assert run.metrics()[-1] == row, "it is on disk by then"
        self.calls.append(("epoch", row["epoch"]))

    def on_run_end(self, run, summary):
        self.calls.append(("end", summary and summary["status"]))


def test_in_parts_and_with_callbacks_it_comes_to_the_same_bits(whole, tmp_path):
    told = Told()
    made = recipe(eval={"every_epochs": 2})
    fastcifar.train(made, out=tmp_path / "run", stop_after=1, quiet=True, callbacks=[told])
    run = fastcifar.train(resume=tmp_path / "run", quiet=True, callbacks=[told])
    assert_same_run(whole.folder, run.folder)
    assert told.calls == [
        ("begin", 0, "tiny"), ("epoch", 1), ("end", "stopped"),
        ("begin", 1, "tiny"), ("epoch", 2), ("epoch", 3), ("epoch", 4), ("end", "finished"),
    ]  # fmt: skip


def test_an_error_of_a_callback_is_its_own_and_loses_nothing(whole, tmp_path):
    class Broken(Told):
        def on_epoch_end(self, run, row):
            raise RuntimeError("mine")

    broken = Broken()
    with pytest.raises(RuntimeError, match="mine"):
        fastcifar.train(recipe(eval={"every_epochs": 2}), out=tmp_path / "run", quiet=True, callbacks=[broken])
    assert broken.calls == [("begin", 0, "tiny"), ("end", None)]
    assert_same_run(whole.folder, fastcifar.train(resume=tmp_path / "run", quiet=True).folder)


@pytest.mark.parametrize("moment", ["on_run_begin", "on_epoch_end"])
def test_a_run_that_is_moved_while_it_trains_says_so_and_goes_on_in_its_new_place(whole, tmp_path, moment):
    told = Told()
    setattr(told, moment, lambda run, _: run.folder.rename(tmp_path / "new"))
    with pytest.raises(fastcifar.UserError, match=r"its folder is gone, moved .*--resume NEW_PLACE`"):
        fastcifar.train(recipe(eval={"every_epochs": 2}), out=tmp_path / "old", quiet=True, callbacks=[told])
    assert not (tmp_path / "old").exists()
    run = fastcifar.train(resume=tmp_path / "new", quiet=True)
    assert_same_run(whole.folder, run.folder)


def test_metrics_are_arrays_of_the_lines(whole):
    arrays = whole.metrics_arrays()
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert arrays["epoch"].tolist() == [1, 2, 3, 4]
    assert arrays["train_loss"].tolist() == [line["train_loss"] for line in lines]
    expected = [np.nan, lines[1]["test"]["raw"]["accuracy"], np.nan, lines[3]["test"]["raw"]["accuracy"]]
    np.testing.assert_array_equal(arrays["test/raw/accuracy"], expected)
    assert whole.logits("test/last/raw").shape == (100, 10)


def convolutions(folder):
    """Return how many convolutions the trace of a run has; LeNet-5 has two a step."""
    trace = json.loads((folder / "profile" / "trace.json").read_text())
    return sum(event.get("name") == "aten::convolution" for event in trace["traceEvents"])


def test_a_profile_has_the_steps_asked_for(tmp_path):
    run = fastcifar.train(recipe(train={"epochs": 1, "batch_size": 50}), out=tmp_path / "r", quiet=True, profile="1:3")
    assert convolutions(run.folder) == 2 * 2, "LeNet-5 has two, the trace two steps"
    for wrong in ("10", "5:5", "a:b", "0:100000"):
        with pytest.raises(fastcifar.UserError, match="--profile"):
            fastcifar.train(recipe(), out=tmp_path / "wrong", profile=wrong)
    assert not (tmp_path / "wrong").exists()


def test_a_profile_of_a_run_that_goes_on_within_an_epoch_counts_no_step_of_the_earlier_process(tmp_path, monkeypatch):
    step, calls = Step.__call__, []

    def stop(self, batch):
        step(self, batch)
        calls.append(batch)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Step, "__call__", stop)
    made = recipe(train={"epochs": 2, "batch_size": 50})
    with pytest.raises(KeyboardInterrupt):
        fastcifar.train(made, out=tmp_path / "r", quiet=True)
    run = fastcifar.train(resume=tmp_path / "r", quiet=True, profile="1:3")
    assert len(calls) == 8
    assert convolutions(run.folder) == 2 * 2, "the second epoch's first two steps"


def test_a_profile_of_steps_beyond_the_end_says_that_there_is_none(tmp_path, capsys):
    made = recipe(train={"epochs": 1, "batch_size": 50})
    run = fastcifar.train(made, out=tmp_path / "r", quiet=True, profile="4:6")
    assert "--profile 4:6: no trace was written, for this process took only 4 steps" in capsys.readouterr().err
    assert not (run.folder / "profile").exists()


def test_load_recipe_takes_keys_as_a_dict_or_as_texts():
    keys = {"train.epochs": 2, "augment": ["flip"], "ema": {"decay": 0.5}, "title": "a"}
    made = fastcifar.load_recipe("lenet5", set=keys)
    assert (made.train.epochs, str(made.augment.ops[0]), made.ema.decay, made.title) == (2, "flip", 0.5, "a")
    assert fastcifar.load_recipe("lenet5", set=["train.epochs=2"]).train.epochs == 2
    for wrong in ("train.epochs=2", {"train.epochs": object()}):
        with pytest.raises(fastcifar.UserError):
            fastcifar.load_recipe("lenet5", set=wrong)


def test_bad_input_makes_no_directory(tmp_path):
    table = TABLE | {"data": {"source": "cifar10"}}
    with pytest.raises(fastcifar.UserError, match="nowhere"):
        fastcifar.train(fastcifar.Recipe.model_validate(table), data="nowhere", out=tmp_path / "x")
    with pytest.raises(fastcifar.UserError, match="stop_after: 0 is below 1"):
        fastcifar.train(fastcifar.Recipe.model_validate(TABLE), out=tmp_path / "x", stop_after=0)
    with pytest.raises(fastcifar.UserError, match=r'which recipe\? Give recipe="lenet5"'):
        fastcifar.train(out=tmp_path / "x")
    with pytest.raises(fastcifar.UserError, match="load_recipe: 3: give a file"):
        fastcifar.load_recipe(3)
    assert not (tmp_path / "x").exists()
