"""Voting against scikit-learn's VotingClassifier, fitted weights against the conditions of their optimum."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier
from sklearn.metrics import log_loss
from sklearn.preprocessing import LabelEncoder

from fastcifar.analysis import ensemble
from fastcifar.analysis.statistics import negative_log_likelihood
from fastcifar.errors import UserError
from tests.run_directories import logits_for


class Fixed(ClassifierMixin, BaseEstimator):
    """A fitted classifier whose probabilities are known: row X[i, 0] of a table."""

    def __init__(self, table):
        self.table = table

    def fit(self, x, y):
        self.classes_ = np.arange(self.table.shape[1])
        return self

    def predict_proba(self, x):
        return self.table[x[:, 0].astype(int)]

    def predict(self, x):
        return self.predict_proba(x).argmax(1)


def voting_classifier(probabilities, voting, weights=None):
    """Return scikit-learn's voter over members with these probabilities (M, N, K), and its input."""
    _, samples, classes = probabilities.shape
    voter = VotingClassifier([(str(i), Fixed(p)) for i, p in enumerate(probabilities)], voting=voting, weights=weights)
    voter.estimators_ = [Fixed(p).fit(None, None) for p in probabilities]
    voter.le_ = LabelEncoder().fit(np.arange(classes))
    voter.classes_ = voter.le_.classes_
    return voter, np.arange(samples)[:, None]


@pytest.fixture(params=range(5))
def probabilities(request):
    """Probabilities (M, N, K) of 2 to 6 members: few classes and little skill, so that ties are common."""
    rng = np.random.default_rng(request.param)
    members, classes = 2 + request.param, (3, 10, 4, 10, 5)[request.param]
    return softmax(rng.normal(size=(members, 2000, classes)), axis=-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("voting", ["hard", "soft"])
def test_votes_are_those_of_scikit_learn(probabilities, voting, weighted):
    weights = np.random.default_rng(9).uniform(0.1, 2, len(probabilities)) if weighted else None
    voter, rows = voting_classifier(probabilities, voting, weights)
    vote = ensemble.hard_vote if voting == "hard" else ensemble.soft_vote
    ours = vote(probabilities, weights)
    np.testing.assert_array_equal(ours.argmax(1), voter.predict(rows))
    np.testing.assert_allclose(ours.sum(1), 1)
    if voting == "soft":
        np.testing.assert_allclose(ours, voter.predict_proba(rows))


def test_a_tie_goes_to_the_lowest_class():
    votes = np.zeros((3, 1, 5))
    votes[0, 0, 4] = votes[1, 0, 1] = votes[2, 0, 3] = 1
    assert ensemble.hard_vote(votes).argmax(1) == [1]


def test_seven_votes_of_seven_are_counted_exactly():
    # In steps of 1/7 rounding could break the tie of three and three.
    votes = np.eye(3)[[2, 0, 2, 0, 2, 0, 1]][:, None]
    assert ensemble.hard_vote(votes).argmax(1) == [0]


def test_softmax_is_scipys():
    logits = np.random.default_rng(1).normal(scale=50, size=(40, 10)).astype(np.float32)
    np.testing.assert_allclose(ensemble.softmax(logits), softmax(logits.astype(np.float64), axis=-1))
    np.testing.assert_allclose(ensemble.log_softmax(logits), log_softmax(logits.astype(np.float64), axis=-1))


def test_negative_log_likelihood_is_scikit_learns_log_loss(probabilities):
    labels = np.random.default_rng(2).integers(probabilities.shape[-1], size=2000)
    ours = negative_log_likelihood(probabilities[0], labels)
    assert ours == pytest.approx(log_loss(labels, probabilities[0], labels=range(probabilities.shape[-1])))


@pytest.fixture
def members():
    """Holdout probabilities (4, 1000, 10) of members from useless to good, and the labels."""
    rng = np.random.default_rng(11)
    labels = rng.integers(10, size=1000)
    return softmax(np.stack([logits_for(labels, rng, skill) for skill in (0, 1, 2, 2.2)]), axis=-1), labels


def test_fitted_weights_satisfy_the_conditions_of_a_minimum_on_the_simplex(members):
    probabilities, labels = members
    weights = ensemble.maximum_likelihood_weights(probabilities, labels)
    chosen = probabilities[:, np.arange(1000), labels]
    slope = (chosen / (weights @ chosen)).mean(1)  # of the log-likelihood; 1 where a weight is above 0, else at most 1
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    np.testing.assert_allclose(slope[weights > 1e-6], 1, atol=1e-3)
    assert (slope <= 1 + 1e-3).all()


def test_no_grid_point_is_more_likely_than_the_fitted_weights(members):
    probabilities, labels = members
    fitted = ensemble.maximum_likelihood_weights(probabilities, labels)
    loss = negative_log_likelihood(ensemble.soft_vote(probabilities, fitted), labels)
    rng = np.random.default_rng(0)
    for weights in rng.dirichlet(np.full(4, 0.5), size=300):
        assert loss <= negative_log_likelihood(ensemble.soft_vote(probabilities, weights), labels) + 1e-9


def test_fitted_weights_are_no_worse_than_equal_ones_where_not_fitted(members):
    fitted = ensemble.fit_weights(*members)
    assert fitted.cv_loss <= fitted.equal_loss
    assert fitted.weights[0] < 0.05 < fitted.weights[3]


def test_equal_members_keep_equal_weights(members):
    probabilities, labels = members
    same = np.stack([probabilities[2]] * 3)
    np.testing.assert_allclose(ensemble.fit_weights(same, labels).weights, 1 / 3, atol=1e-6)


@pytest.mark.parametrize("weights", [[1, 2], [1, -1, 2], [0, 0, 0], [1, np.nan, 1]])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        ensemble.normalized_weights(weights, 3)


def test_too_small_a_holdout_is_refused():
    with pytest.raises(UserError, match=r"larger data\.holdout"):
        ensemble.stratified_folds(np.array([0, 0, 0, 0, 0, 1]), 0)
