"""Calibration against scikit-learn and torch, label errors against cleanlab, the disputed labels against their file."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from fastcifar.analysis import disputed
from fastcifar.analysis.calibration import calibration, calibration_error, fit_temperature, reliability
from fastcifar.analysis.comparison import paired
from fastcifar.analysis.label_errors import _whole_numbers, find_label_errors
from tests.run_directories import logits_for


@pytest.fixture
def case(rng):
    labels = rng.integers(10, size=3000)
    return 1.7 * logits_for(labels, rng, 2.0), labels


def test_the_reliability_diagram_is_scikit_learns(case):
    logits, labels = case
    p = softmax(logits.astype(np.float64), axis=1)
    right, confidence = p.argmax(1) == labels, p.max(1)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    found = reliability(logits, labels)
    np.testing.assert_allclose([b.accuracy for b in found], accuracy)
    np.testing.assert_allclose([b.confidence for b in found], mean)
    assert sum(b.images for b in found) == len(labels)
    images, _ = np.histogram(confidence, np.linspace(0, 1, 16))
    expected = (images[images > 0] * np.abs(accuracy - mean)).sum() / len(labels)
    assert calibration_error(found) == pytest.approx(100 * expected)


def test_a_model_that_is_always_sure_and_right_half_the_time_is_off_by_half():
    logits = np.tile([50.0, 0.0], (100, 1))
    assert calibration_error(reliability(logits, np.arange(100) % 2)) == pytest.approx(50)


def test_the_temperature_is_where_torchs_gradient_vanishes(case):
    logits, labels = case
    inverse = torch.tensor(1 / fit_temperature(logits, labels), dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(inverse * torch.from_numpy(logits).double(), torch.from_numpy(labels))
    loss.backward()
    assert abs(inverse.grad) < 1e-4
    # Noise of deviation 1, the label's mean at 2: the posterior is softmax(2 * logits); here they are 1.7 times that.
    assert 1 / inverse.item() == pytest.approx(1.7 / 2, rel=0.1)


def test_the_temperature_comes_from_the_holdout_alone(case):
    logits, labels = 2 * case[0], case[1]  # far from calibrated: the held out thousand have to show it
    held = logits[:1000], labels[:1000]
    found = calibration(logits[1000:], labels[1000:], held)
    assert found["with_temperature"]["temperature"] == fit_temperature(*held)
    assert found["with_temperature"]["loss"] < found["as_trained"]["loss"]
    assert found["with_temperature"]["calibration_error"] < 1 + found["as_trained"]["calibration_error"]
    assert calibration(logits, labels)["with_temperature"] is None


@pytest.mark.parametrize("skill", [3.0, 5.0])
def test_label_errors_are_cleanlabs(rng, skill):
    cleanlab = pytest.importorskip("cleanlab")
    true = rng.integers(10, size=3000)
    labels = true.copy()
    wrong = rng.choice(3000, 90, replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, size=90)) % 10
    p = softmax(2.0 * logits_for(true, rng, skill).astype(np.float64), axis=1)
    found = find_label_errors(p, labels)
    # cleanlab rounds the joint to whole numbers; where two remainders are equal, either rounding is as good.
    assert np.abs(found.joint - cleanlab.count.compute_confident_joint(labels, p)).max() < 1
    np.testing.assert_allclose(found.thresholds, cleanlab.count.get_confident_thresholds(labels, p))
    theirs = cleanlab.filter.find_label_issues(
        labels, p, confident_joint=_whole_numbers(found.joint), filter_by="prune_by_noise_rate", n_jobs=1
    )
    assert set(found.rows.tolist()) == set(np.flatnonzero(theirs).tolist())


def test_the_disputed_labels_are_the_54_of_the_paper():
    known = disputed.disputed_labels()
    rows = [entry["row"] for entry in known["rows"]]
    assert len(set(rows)) == 54
    assert rows == sorted(rows)
    assert all(entry["votes_given"] < 3 for entry in known["rows"])
    assert all(sum(v for k, v in entry.items() if k.startswith("votes_")) == 5 for entry in known["rows"])
    frog = next(entry for entry in known["rows"] if entry["row"] == 2405)  # the cat of the paper's first picture
    assert (frog["given"], frog["other"], frog["votes_other"]) == (3, 6, 5)


def test_accuracy_without_the_disputed_images(rng):
    labels = rng.integers(10, size=10_000)
    entries = disputed.disputed_labels()["rows"]
    for entry in entries:
        labels[entry["row"]] = entry["given"]
    assert disputed.applies("cifar10", labels)
    assert not disputed.applies("cifar100", labels)
    assert not disputed.applies("cifar10", labels[:9000])
    assert not disputed.applies("cifar10", (labels + 1) % 10)
    logits = np.eye(10)[labels] * 9
    for entry in entries[:20]:  # wrong on twenty of them and on nothing else, as the annotators see it
        logits[entry["row"]] = np.eye(10)[entry["other"]]
    found = disputed.about_the_test_set(logits, labels)
    assert (found["mistakes"], found["mistakes_disputed"]) == (20, 20)
    assert found["accuracy"] == pytest.approx(99.8)
    assert found["accuracy_without"] == 100
    assert found["as_annotators"] == sum(entry["votes_other"] >= 3 for entry in entries[:20])


def test_a_paired_difference_has_the_spread_of_the_images_differences(rng):
    first, second = rng.random((2, 500)) < 0.7
    test = {"only_first": int((first & ~second).sum()), "only_second": int((second & ~first).sum())}
    differences = second.astype(float) - first
    found = paired(test, 500)
    assert found["points"] == pytest.approx(100 * differences.mean())
    assert found["standard_error"] == pytest.approx(100 * differences.std() / np.sqrt(500))
