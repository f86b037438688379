import numpy as np
import pytest
from sklearn.model_selection import StratifiedShuffleSplit

from fastcifar.data.split import holdout_split, subset_rows
from fastcifar.errors import UserError


def test_subset_keeps_the_first_of_each_class(rng):
    labels = rng.integers(0, 7, 500)
    rows = subset_rows(labels, 5)
    expected = sorted(i for c in range(7) for i in [k for k in range(500) if labels[k] == c][:5])
    assert rows.tolist() == expected
    assert subset_rows(labels, 0).tolist() == list(range(500))


def test_holdout_is_a_stratified_partition(rng):
    labels = rng.choice(5, 1003, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    train, holdout = holdout_split(labels, 200, seed=9)
    assert sorted([*train, *holdout]) == list(range(1003))
    assert len(holdout) == 200
    oracle = next(StratifiedShuffleSplit(1, test_size=200).split(labels, labels))[1]
    assert abs(np.bincount(labels[holdout]) - np.bincount(labels[oracle])).max() <= 1


def test_holdout_depends_on_the_seed_alone():
    labels = np.arange(1000) % 10
    first, again, other = (holdout_split(labels, 100, seed)[1] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert np.bincount(labels[first]).tolist() == [10] * 10


def test_holdout_of_everything_is_refused():
    with pytest.raises(UserError, match=r"data\.holdout = 10 leaves none"):
        holdout_split(np.zeros(10, int), 10, 0)
