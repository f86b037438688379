import numpy as np
import pytest
from sklearn.model_selection import StratifiedShuffleSplit

from fastcifar.data.split import holdout_split, subset_rows
from fastcifar.errors import UserError


def test_subset_keeps_the_first_of_each_class(rng):
    labels = rng.permutation(np.repeat(np.arange(7), 100))
    rows = subset_rows(labels, 35)
    expected = sorted(i for c in range(7) for i in [k for k in range(700) if labels[k] == c][:5])
    assert rows.tolist() == expected
    for everything in (0, 700, 701):
        assert subset_rows(labels, everything).tolist() == list(range(700))


def test_subset_counts_in_total_and_in_proportion(rng):
    labels = rng.choice(5, 1003, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    for count in (5, 99, 500, 1002):
        rows = subset_rows(labels, count)
        assert len(rows) == count
        exact = np.bincount(labels) * count / 1003
        assert np.abs(np.bincount(labels[rows], minlength=5) - exact).max() < 1
        assert rows.tolist() == subset_rows(labels, count).tolist()


def test_a_subset_of_fewer_images_than_classes_is_refused():
    with pytest.raises(UserError, match=r"subset = 5 is less .* 10 classes; .* data\.subset = 50 keeps 5 of each"):
        subset_rows(np.arange(100) % 10, 5)


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
