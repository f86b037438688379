"""Confusion, hard images, comparisons and label errors against scikit-learn, torch, scipy and injected errors."""

import os

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import binom, sem, t
from sklearn.metrics import confusion_matrix, recall_score

from fastcifar.analysis import confusion
from fastcifar.analysis.compare import group_by_recipe, left_out
from fastcifar.analysis.comparison import comparison
from fastcifar.analysis.label_errors import find_label_errors
from fastcifar.analysis.statistics import mcnemar, mean_of, p_value
from fastcifar.analysis.top_loss import losses, top_loss
from tests.run_directories import logits_for, make_run, recipe, stopped


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def test_confusion_is_scikit_learns(rng):
    labels, predicted = rng.integers(7, size=500), rng.integers(7, size=500)
    ours = confusion.confusion_matrix(labels, predicted, 7)
    np.testing.assert_array_equal(ours, confusion_matrix(labels, predicted, labels=range(7)))
    np.testing.assert_allclose(confusion.recall_percent(ours), 100 * recall_score(labels, predicted, average=None))


def test_largest_confusions_leave_out_the_diagonal():
    pairs = confusion.largest_confusions(np.array([[9, 2, 0], [5, 9, 1], [0, 0, 9]]))
    assert [tuple(pair) for pair in pairs] == [(1, 0, 5), (0, 1, 2), (1, 2, 1)]


def test_losses_are_torchs_and_the_hardest_come_first(rng):
    labels = rng.integers(10, size=200)
    logits = logits_for(labels, rng, 2.0)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), reduction="none"
    ).numpy()
    np.testing.assert_allclose(losses(logits, labels), expected)
    hard = top_loss(logits, labels, 5)
    assert [image.row for image in hard] == np.argsort(-expected)[:5].tolist()
    assert hard[0].label_probability == pytest.approx(float(np.exp(-expected.max())))


def test_injected_label_errors_are_found(rng):
    true = rng.integers(10, size=4000)
    labels = true.copy()
    wrong = rng.choice(4000, 120, replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, size=120)) % 10
    found = find_label_errors(softmax(2 * logits_for(true, rng, 5.0), axis=1), labels)
    hits = len(set(found.rows) & set(wrong))
    assert hits > 100
    assert hits / len(found.rows) > 0.8
    assert found.estimated_errors == pytest.approx(120, rel=0.25)
    assert (np.diff(found.margins) >= 0).all()


@pytest.mark.parametrize("lonely", [0, 2])
def test_the_last_image_of_a_label_is_no_suspect_whatever_its_number(lonely):
    others = [k for k in range(3) if k != lonely]
    labels = np.array([others[0]] * 5 + [others[1]] * 5 + [lonely])
    sure = np.full((11, 3), 0.05)
    sure[np.arange(11), [others[0]] * 5 + [others[1]] * 5 + [others[0]]] = 0.9
    assert len(find_label_errors(sure, labels).rows) == 0


def test_mcnemar_is_the_two_sided_binomial_test():
    labels = np.zeros(20, int)
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = np.array([right] * 12 + [wrong] * 8)
    b = np.array([right] * 10 + [wrong] * 2 + [right] * 8)
    found = mcnemar(a, b, labels)
    assert (found["only_first"], found["only_second"]) == (2, 8)
    assert found["p_value"] == pytest.approx(2 * binom.cdf(2, 10, 0.5))


def test_standard_errors_are_scipys(rng):
    values = rng.normal(size=9)
    assert mean_of(values).error == pytest.approx(sem(values))
    assert mean_of([3.0]).row() == {"mean": 3.0, "standard_error": None, "n": 1}


def test_the_p_value_is_that_of_students_t(rng):
    values = rng.normal(60.0, 0.5, size=4).tolist()
    statistic = (np.mean(values) - 59.48) / (np.std(values, ddof=1) * np.sqrt(1 + 1 / 4))
    assert p_value(values, 59.48) == pytest.approx(2 * t.sf(abs(statistic), 3))
    assert p_value([60.0, 61.0], 60.5) == pytest.approx(1.0)


def test_a_published_run_that_is_one_of_ours_has_a_small_p_value_as_often_as_it_says(rng):
    runs = rng.normal(60.0, 0.5, size=(2000, 4)).tolist()
    small = [p_value(ours, published) < 0.05 for *ours, published in runs]
    # Five standard deviations of a share of 2,000.
    assert np.mean(small) == pytest.approx(0.05, abs=5 * np.sqrt(0.05 * 0.95 / 2000))


@pytest.mark.parametrize("values", [[], [60.0], [60.0, 60.0, 60.0]])
def test_without_a_spread_there_is_no_test(values):
    assert p_value(values, 59.48) is None


def test_runs_are_grouped_by_recipe_over_seeds(tmp_path, rng):
    labels = rng.integers(10, size=100)
    runs = []
    for i, made in enumerate([recipe("a", seed=1), recipe("a", seed=2), recipe("b", seed=1)]):
        arrays = {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 2.0)}
        runs.append(make_run(tmp_path / str(i), arrays, made))
    rows = group_by_recipe(runs)
    assert [(row["name"], row["seeds"]) for row in rows] == [("a", [1, 2]), ("b", [1])]
    accuracies = [run.summary["last"]["accuracy"] for run in runs[:2]]
    assert rows[0]["last"]["mean"] == pytest.approx(np.mean(accuracies))
    assert rows[0]["best"] is None


def seeds_of(name, folder, rng, seeds):
    """Return a finished run of three epochs for each seed, on the same images."""
    labels, runs = rng.integers(10, size=100), []
    for seed in seeds:
        arrays = {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 2.0)}
        runs.append(make_run(folder / f"{name}-{seed}", arrays, recipe(name, seed=seed)))
    return runs


def test_unfinished_runs_are_in_no_mean(tmp_path, rng):
    runs = seeds_of("a", tmp_path, rng, [1, 2, 3])
    runs[1] = stopped(runs[1])
    (row,) = group_by_recipe(runs)
    assert row["seeds"] == [1, 3]
    assert (row["last"]["n"], row["stopped"]) == (2, None)
    assert row["last"]["mean"] == pytest.approx(np.mean([run.summary["last"]["accuracy"] for run in runs[::2]]))
    found = comparison(runs)
    assert found["curves"][0]["epochs"] == [1, 2, 3]
    assert found["left_out"] == [str(runs[1].folder)]
    assert f"{runs[1].folder} (stopped at epoch 1 of 3)" in found["note"]
    assert [entry["name"] for entry in found["time"]] == ["a-1", "a-3"]
    assert found["pairs"][0]["names"] == ["a-1", "a-2, stopped at epoch 1 of 3"]


def test_a_repeated_seed_counts_once(tmp_path, rng):
    runs = seeds_of("a", tmp_path / "old", rng, [1, 2]) + seeds_of("a", tmp_path / "new", rng, [1])
    os.utime(runs[0].folder / "summary.json", (0, 0))
    (row,) = group_by_recipe(runs)
    assert (row["seeds"], row["last"]["n"], row["runs"]) == ([2, 1], 2, [str(run.folder) for run in runs[1:]])
    assert row["last"]["mean"] == pytest.approx(np.mean([run.summary["last"]["accuracy"] for run in runs[1:]]))
    found = comparison(runs)
    assert found["left_out"] == [str(runs[0].folder)]
    assert f"{runs[0].folder} (seed 1): a newer run has the same recipe and seed" in found["note"]
    assert [entry["name"] for entry in found["time"]] == [str(run.folder) for run in runs[1:]]
    assert group_by_recipe(runs[::2])[0]["last"]["standard_error"] is None


def test_without_a_finished_run_the_unfinished_ones_are_shown_one_by_one(tmp_path, rng):
    runs = [stopped(run, epoch) for epoch, run in enumerate(seeds_of("a", tmp_path, rng, [1, 2]), 1)]
    rows = group_by_recipe(runs)
    assert [row["label"] for row in rows] == ["a (a-1), stopped at epoch 1 of 3", "a (a-2), stopped at epoch 2 of 3"]
    assert [row["last"]["mean"] for row in rows] == [run.summary["last"]["accuracy"] for run in runs]
    assert left_out(runs) == []
