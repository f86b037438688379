"""Stacking against scikit-learn, and what the published protocol makes of labels that mean nothing."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from fastcifar.analysis import stacking
from fastcifar.analysis.members import Scores
from fastcifar.analysis.meta_mlp import EPOCHS, build_mlp, fit_mlp, mlp_logits
from fastcifar.analysis.statistics import accuracy
from fastcifar.kernels.philox import epoch_order
from fastcifar.train.step_state import torch_seed
from tests.run_directories import logits_for

IMAGES = 6000  # with random labels, in all test sets together


def scores(rng, samples, skills=(1.0, 2.0), classes=10, labels=None):
    labels = rng.integers(classes, size=samples) if labels is None else labels
    return Scores([str(s) for s in skills], np.stack([logits_for(labels, rng, s, classes) for s in skills]), labels)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_features_are_the_members_logits_side_by_side(rng):
    logits = rng.normal(size=(3, 7, 10)).astype(np.float32)
    np.testing.assert_array_equal(stacking.features(logits), np.concatenate(list(logits), axis=1))


def test_logistic_is_scikit_learns_on_the_same_logits(rng):
    train, test = scores(rng, 600), scores(rng, 300)
    ours = stacking.stack_published(train, test, "logistic", 250).logits
    scaler = StandardScaler().fit(np.concatenate(list(train.logits), axis=1))
    model = LogisticRegression(max_iter=2000)
    model.fit(scaler.transform(np.concatenate(list(train.logits), axis=1)), train.labels)
    theirs = model.predict_log_proba(scaler.transform(np.concatenate(list(test.logits), axis=1)))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


class Unread(Scores):
    """Scores whose labels nobody may read."""

    def __getattribute__(self, name):
        assert name != "labels", "the labels were read"
        return super().__getattribute__(name)


def unread(given):
    return Unread(given.names, given.logits, given.labels)


def test_labels_that_nobody_may_read_are_noticed(rng):
    with pytest.raises(AssertionError, match="the labels were read"):
        stacking.stack_published(scores(rng, 40), unread(scores(rng, 20)), "mlp", 250)


@pytest.mark.parametrize("meta", ["mlp", "logistic"])
def test_honest_stacking_beats_its_members_and_never_reads_the_test_labels(rng, meta):
    holdout, test = scores(rng, 1000), scores(rng, 2000)
    stacked = stacking.stack_honest(holdout, unread(test), meta, 250)
    alone = max(accuracy(logits, test.labels) for logits in test.logits)
    assert accuracy(stacked.logits, test.labels) > alone + 1


def test_weak_members_get_a_weaker_decay(rng):
    """With the published one the meta-model of such members is no better than one of them."""
    holdout, test = scores(rng, 600, (0.8,) * 6), scores(rng, 2000, (0.8,) * 6)
    stacked = stacking.stack_honest(holdout, test, "mlp", 250)
    alone = max(accuracy(logits, test.labels) for logits in test.logits)
    assert stacked.details["weight_decay"] == 0.01
    assert accuracy(stacked.logits, test.labels) > alone + 10


def test_a_class_that_the_holdout_lacks_gets_no_probability(rng):
    holdout = scores(rng, 100, labels=rng.integers(9, size=100))
    stacked = stacking.stack_published(holdout, scores(rng, 50), "logistic", 0)
    assert (stacked.logits[:, 9] < -500).all()
    assert np.isfinite(stacked.logits).all()


def random_labels(rng, count, images):
    """Return ``count`` pairs of scores to fit on and of ``images`` to test on, whose labels mean nothing."""
    balanced = [rng.permutation(np.arange(120) % 10) for _ in range(count)]  # folds need every class
    return [(scores(rng, 120, (0, 0), labels=labels), scores(rng, images, (0, 0))) for labels in balanced]


def mean_accuracy(stack, pairs):
    found = [stack(fitted_on, test, "mlp", seed) for seed, (fitted_on, test) in enumerate(pairs)]
    return np.mean([accuracy(s.logits, test.labels) for s, (_, test) in zip(found, pairs, strict=True)])


def test_the_published_protocol_finds_skill_in_random_labels_and_the_honest_one_does_not(rng):
    """The leak: choosing the epoch on the test set beats chance there, however random its labels are.

    The honest protocol fits eleven times, so it gets fewer but larger test sets, of as many images in all.
    """
    error = 100 * np.sqrt(0.1 * 0.9 / IMAGES)  # binomial standard error of the mean, in points
    assert mean_accuracy(stacking.stack_published, random_labels(rng, 30, IMAGES // 30)) > 10 + 4 * error
    assert abs(mean_accuracy(stacking.stack_honest, random_labels(rng, 2, IMAGES // 2)) - 10) < 3 * error


def test_members_that_know_their_images_by_heart_fool_the_published_meta_model(rng):
    """The other half of the leak: on the images that it is fitted on everything looks perfect."""
    labels = rng.integers(10, size=640)
    by_heart = Scores(["a", "b"], np.stack([logits_for(labels, rng, 20.0)] * 2), labels)
    test = scores(rng, 500, skills=(0, 0))
    model = fit_mlp(stacking.features(by_heart.logits), labels, 10, 0)
    seen = accuracy(mlp_logits(model, stacking.features(by_heart.logits)), labels)
    new = accuracy(mlp_logits(model, stacking.features(test.logits)), test.labels)
    assert seen > 95
    assert new < 20


def test_published_details_name_the_protocol_and_the_choice(rng):
    stacked = stacking.stack_published(scores(rng, 300), scores(rng, 200), "mlp", 250)
    metrics = stacked.details["test_accuracy_by_epoch"]
    assert stacked.details["protocol"].startswith("published")
    assert len(metrics) == 20
    assert stacked.details["meta_epoch"] == int(np.argmax(metrics)) + 1


def test_the_network_is_the_published_one():
    model = build_mlp(30, 10)
    kinds = [type(layer).__name__ for layer in model]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == [*hidden, "Dropout", *hidden, "Dropout", *hidden, "Linear"]
    assert [(m.in_features, m.out_features) for m in model if isinstance(m, torch.nn.Linear)] == [
        (30, 256), (256, 128), (128, 64), (64, 10),
    ]  # fmt: skip
    assert {m.p for m in model if isinstance(m, torch.nn.Dropout)} == {0.3}


def test_the_meta_model_is_what_torchs_adam_cosine_and_loss_make_of_it(rng):
    train = scores(rng, 600)
    x, labels = stacking.features(train.logits), torch.from_numpy(train.labels)
    ours = mlp_logits(fit_mlp(x, train.labels, 10, 250, epochs=3), x)
    torch.manual_seed(torch_seed(250, EPOCHS))
    model = build_mlp(20, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for epoch in range(3):
        torch.manual_seed(torch_seed(250, epoch))
        for rows in epoch_order(600, 250, epoch).split(128):
            loss = F.cross_entropy(model(torch.from_numpy(x)[rows]), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours, mlp_logits(model.eval(), x), atol=1e-4)


def test_the_meta_model_depends_on_its_seed_alone(rng):
    train = scores(rng, 257)  # the last batch holds one sample
    x = stacking.features(train.logits)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = mlp_logits(fit_mlp(x, train.labels, 10, 250, epochs=2), x)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_array_equal(first, mlp_logits(fit_mlp(x, train.labels, 10, 250, epochs=2), x))
    assert not np.array_equal(first, mlp_logits(fit_mlp(x, train.labels, 10, 251, epochs=2), x))
