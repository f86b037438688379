"""Voting: hard, soft and weighted, with weights given or fitted on the holdout. Pure functions of arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastcifar.analysis.statistics import accuracy, negative_log_likelihood
from fastcifar.errors import UserError

SHRINKAGES = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDS = 5


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities float64, of the shape of ``logits``, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities float64, of the shape of ``logits``, over the last axis."""
    return np.exp(log_softmax(logits))


def normalized_weights(weights: Sequence[float] | np.ndarray | None, members: int) -> np.ndarray:
    """Return weights float64 (M,) that are not negative and add up to 1; None gives equal ones.

    Raises:
        UserError: a wrong number of weights, a negative or non-finite one, or only zeros.
    """
    if weights is None:
        return np.full(members, 1 / members)
    array = np.asarray(weights, np.float64)
    if array.shape != (members,):
        raise UserError(f"weights: {array.size} given for {members} members; give one per member, in their order")
    if not np.isfinite(array).all() or (array < 0).any() or array.sum() <= 0:
        raise UserError(f"weights: {list(weights)}: each must be 0 or more, and not all 0")
    return array / array.sum()


def hard_vote(probabilities: np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Return each class's share of the votes: float64 (N, K), rows adding up to 1.

    A member votes for its most probable class. Where classes tie, the lowest class number wins when ``argmax`` is
    taken, as in scikit-learn's ``VotingClassifier``.

    Args:
        probabilities: (M, N, K).
        weights: one per member; None for one member, one vote.
    """
    members, samples, classes = probabilities.shape
    share = normalized_weights(weights, members)
    votes = probabilities.argmax(-1)
    result = np.zeros((samples, classes))
    # Unweighted votes are counted in whole numbers, so that rounding cannot break a tie.
    amounts = np.ones(members) if weights is None else share
    for vote, amount in zip(votes, amounts, strict=True):
        result[np.arange(samples), vote] += amount
    return result / amounts.sum()


def soft_vote(probabilities: np.ndarray, weights: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """Return the (weighted) mean of the members' probabilities: float64 (N, K).

    Args:
        probabilities: (M, N, K).
        weights: one per member; None for the plain mean.
    """
    return np.tensordot(normalized_weights(weights, len(probabilities)), probabilities, axes=1)


@dataclass(frozen=True)
class FittedWeights:
    """Member weights fitted on the holdout.

    Attributes:
        weights: float64 (M,), on the simplex.
        shrinkage: 0 (as fitted) to 1 (equal weights), chosen by cross-validation.
        cv_loss: negative log-likelihood of images that were not fitted on, in nats.
        cv_accuracy: accuracy on them, in percent.
        equal_loss: negative log-likelihood of equal weights on the same images.
    """

    weights: np.ndarray
    shrinkage: float
    cv_loss: float
    cv_accuracy: float
    equal_loss: float


def maximum_likelihood_weights(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the weights on the simplex, float64 (M,), under which the mixture makes the labels most likely.

    The loss ``-mean(log(sum_m w_m p_m(label)))`` is convex in w, so the minimum found is the only one.

    Args:
        probabilities: (M, N, K).
        labels: int64 (N,).
    """
    from scipy.optimize import minimize

    chosen = probabilities[:, np.arange(len(labels)), labels]  # (M, N)
    floor = np.finfo(np.float64).tiny

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixture = np.maximum(weights @ chosen, floor)
        return float(-np.log(mixture).mean()), -(chosen / mixture).mean(1)

    members = len(probabilities)
    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(members)}
    start, bounds = normalized_weights(None, members), [(0.0, 1.0)] * members
    options = {"ftol": 1e-12, "maxiter": 500}
    found = minimize(loss, start, jac=True, bounds=bounds, constraints=[sums_to_one], method="SLSQP", options=options)
    return normalized_weights(np.clip(found.x, 0, 1), members)


def fit_weights(probabilities: np.ndarray, labels: np.ndarray, seed: int = 0) -> FittedWeights:
    """Fit weights on the holdout, pulled towards equal ones as far as cross-validation finds it worth.

    Few holdout images decide between good members, so the maximum-likelihood weights overfit. Five folds choose how
    far to shrink them: ``(1 - s) * fitted + s * equal``.

    Args:
        probabilities: (M, N, K) on the holdout.
        labels: int64 (N,).
        seed: of the folds.

    Raises:
        UserError: a class has fewer holdout images than there are folds.
    """
    held_out = _fold_probabilities(probabilities, labels, seed)
    losses = [negative_log_likelihood(held_out[s], labels) for s in SHRINKAGES]
    best = int(np.argmin(losses))
    shrinkage = SHRINKAGES[best]
    weights = _shrink(maximum_likelihood_weights(probabilities, labels), shrinkage)
    return FittedWeights(weights, shrinkage, losses[best], accuracy(held_out[shrinkage], labels), losses[-1])


def _fold_probabilities(probabilities: np.ndarray, labels: np.ndarray, seed: int) -> dict[float, np.ndarray]:
    """Return, for each shrinkage, probabilities (N, K) of images under weights that were fitted without them."""
    results = {s: np.empty(probabilities.shape[1:]) for s in SHRINKAGES}
    for fitted, left_out in stratified_folds(labels, seed):
        weights = maximum_likelihood_weights(probabilities[:, fitted], labels[fitted])
        for shrinkage, result in results.items():
            result[left_out] = soft_vote(probabilities[:, left_out], _shrink(weights, shrinkage))
    return results


def stratified_folds(labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return five (fitted rows, left-out rows), each fold with every class in proportion.

    Raises:
        UserError: a class has fewer images than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    fewest = int(np.bincount(labels)[np.unique(labels)].min())
    if fewest < FOLDS:
        raise UserError(
            f"the holdout has only {fewest} images of one class, and cross-validation needs {FOLDS}; "
            "train the members with a larger data.holdout"
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    return list(folds.split(np.zeros(len(labels)), labels))


def _shrink(weights: np.ndarray, shrinkage: float) -> np.ndarray:
    return (1 - shrinkage) * weights + shrinkage / len(weights)
