"""Several ranks train the model of one: two processes over gloo against the run of one process."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fastcifar.run_directory import RunDirectory
from fastcifar.train.ranks import ALONE
from tests.forked import CONTEXT
from tests.train.rank_checks import CASES, rank, run_in

DEADLINE_S = 600
# In float32 the gradients of two parts are added up in another order; 6 or 9 steps multiply the difference.
BOUND = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of two ranks that ran all cases."""
    folder = tmp_path_factory.mktemp("two")
    ranks = [CONTEXT.Process(target=rank, args=(number, folder)) for number in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(DEADLINE_S)
        assert [process.exitcode for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The folder of one process that ran the cases in which the number of ranks does not matter."""
    folder = tmp_path_factory.mktemp("one")
    for case in ("sgd", "asam", "sync"):
        run_in(folder / case, CASES[case], ALONE)
    return folder


def test_all_ranks_hold_the_same_bits(two):
    ours, theirs = (np.load(two / f"rank-{rank}.npz") for rank in range(2))
    assert set(theirs) <= set(ours)
    assert {key.split("/")[0] for key in theirs} == {*CASES, "resized", "cut"}
    for key in theirs:
        assert np.array_equal(ours[key].view(np.int32), theirs[key].view(np.int32)), key


@pytest.mark.parametrize("case", ["sgd", "asam", "sync"])
def test_they_are_the_run_of_one_process(one, two, case):
    """Weights, predictions and metrics, with batches and a last batch that two do not divide."""
    whole, divided = (RunDirectory.open(folder / case) for folder in (one, two))
    for name, tensor in whole.weights("last").items():
        torch.testing.assert_close(divided.weights("last")[name], tensor, **BOUND, msg=lambda m, n=name: f"{n}: {m}")
    assert whole.logits_keys() == divided.logits_keys()
    for key in whole.logits_keys():
        if "/best/" not in key and "/selected/" not in key:  # the epoch may be another, where two come out even
            np.testing.assert_allclose(divided.logits(key), whole.logits(key), rtol=1e-2, atol=1e-3, err_msg=key)
    for ours, theirs in zip(whole.metrics(), divided.metrics(), strict=True):
        assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-4)
        assert theirs["train_accuracy"] == pytest.approx(ours["train_accuracy"], abs=1.01 * 100 / 90)
        assert (theirs["images"], theirs["epoch"]) == (ours["images"], ours["epoch"])


def test_a_run_goes_on_with_another_number_of_ranks(two):
    """Two ranks, one, and two again: the first epoch to the bit, the others within rounding."""
    whole, resized = (RunDirectory.open(two / name) for name in ("sgd", "resized"))
    assert resized.summary["status"] == "finished"
    assert resized.metrics()[0]["test"] == whole.metrics()[0]["test"]
    for name, tensor in whole.weights("last").items():
        torch.testing.assert_close(resized.weights("last")[name], tensor, **BOUND)


def test_a_signal_to_one_rank_stops_all_and_loses_nothing(two):
    """Its dropout masks, of two generators, go on where they were."""
    ours = np.load(two / "rank-0.npz")
    for epoch in range(2):
        assert np.array_equal(ours[f"cut/{epoch}"], ours[f"local/{epoch}"])
    # The running statistics became a mean once more on the way, which rounds.
    np.testing.assert_allclose(ours["cut/1/stats"], ours["local/1/stats"], rtol=1e-5, atol=1e-7)
