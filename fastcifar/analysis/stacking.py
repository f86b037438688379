"""Stacking (Wolpert, 1992): a meta-model on the members' logits, as published and honestly.

``published``: fitted on the logits of the very images that the members were trained on, its epoch chosen on the
test set. The members know those images by heart, and the test set has been looked at once an epoch: the accuracy is
no estimate of new images. It is here to be compared with, under its name: the published ladder's last row, of the
article "CIFAR-10 분류 모델 97.78% 달성하기", was obtained so.

``honest``: fitted on the holdout, which no member was trained on; what there is to choose (the MLP's weight decay and
epochs, the logistic regression's penalty) is chosen by cross-validation there, and the test set is scored once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcifar.analysis.ensemble import stratified_folds
from fastcifar.analysis.members import Scores
from fastcifar.analysis.statistics import accuracy

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
DECAYS = (0.1, 0.01)
"""Of the MLP: as published, for members that are nearly always right, and for weaker ones.

Six LeNet-5 of 59% to 60% stacked on 5,000 images came to 59.6% with the former, and to 65.3% with the latter.
"""
PUBLISHED = "published: fitted on the members' training images, epoch chosen on the test set"
PUBLISHED_LAST = "published: fitted on the members' training images, last meta-epoch"
PUBLISHED_LOGISTIC = "published: fitted on the members' training images"
HONEST = "honest: fitted on the holdout by cross-validation, test set scored once"


@dataclass(frozen=True)
class Stacked:
    """What a meta-model says about the test images.

    Attributes:
        logits: float64 (N, K) of the model that counts.
        last_logits: float64 (N, K) after the last meta-epoch, without any choice.
        details: what was chosen for ``logits``, and how; plain values.
        last_details: the same for ``last_logits``.
    """

    logits: np.ndarray
    last_logits: np.ndarray
    details: dict[str, Any]
    last_details: dict[str, Any]


def features(logits: np.ndarray) -> np.ndarray:
    """Return the members' logits side by side: float32 (N, M * K) from (M, N, K), the first member's first."""
    return np.ascontiguousarray(logits.transpose(1, 0, 2).reshape(logits.shape[1], -1), dtype=np.float32)


def stack_published(train: Scores, test: Scores, meta: str, seed: int) -> Stacked:
    """Fit on training-set logits and choose the meta-epoch on the test set, as the published ladder did.

    Args:
        train: the members' logits of the images that they were trained on.
        test: their logits of the test images.
        meta: ``mlp`` or ``logistic`` (which has no epochs: nothing is chosen).
        seed: of the meta-model.
    """
    if meta == "logistic":
        logits = _logistic_logits(_logistic(train, 1.0), test)
        return _without_choice(logits, {"protocol": PUBLISHED_LOGISTIC, "penalty": 1.0})
    from fastcifar.analysis.meta_mlp import fit_mlp, mlp_logits

    inputs = features(test.logits)
    by_epoch: list[np.ndarray] = []
    fit_mlp(
        features(train.logits), train.labels, test.logits.shape[-1], seed,
        after_epoch=lambda epoch, model: by_epoch.append(mlp_logits(model, inputs)),
    )  # fmt: skip
    metrics = [accuracy(logits, test.labels) for logits in by_epoch]
    best = int(np.argmax(metrics))
    chosen = {"protocol": PUBLISHED, "meta_epoch": best + 1, "test_accuracy_by_epoch": metrics}
    return Stacked(
        by_epoch[best], by_epoch[-1], chosen, {"protocol": PUBLISHED_LAST, "meta_epoch": len(by_epoch)}
    )  # fmt: skip


def stack_honest(holdout: Scores, test: Scores, meta: str, seed: int) -> Stacked:
    """Fit on the holdout, choose there by five-fold cross-validation, and score the test images once.

    Args:
        holdout: the members' logits of images that none of them was trained on.
        test: their logits of the test images; the labels are not read.
        meta: ``mlp`` or ``logistic``.
        seed: of the meta-model and of the folds.

    Raises:
        UserError: a class has fewer holdout images than there are folds.
    """
    if meta == "logistic":
        return _honest_logistic(holdout, test, seed)
    from fastcifar.analysis.meta_mlp import fit_mlp, mlp_logits

    metrics = np.array([_mlp_cv_accuracies(holdout, seed, decay) for decay in DECAYS])
    row, column = np.unravel_index(metrics.argmax(), metrics.shape)
    decay, epochs = DECAYS[row], int(column) + 1
    inputs, classes = features(holdout.logits), test.logits.shape[-1]
    model = fit_mlp(inputs, holdout.labels, classes, seed, epochs=epochs, weight_decay=decay)
    logits = mlp_logits(model, features(test.logits))
    chosen = {"meta_epoch": epochs, "weight_decay": decay, "cv_accuracy": float(metrics[row, column])}
    return _without_choice(logits, {"protocol": HONEST, **chosen})


def _mlp_cv_accuracies(holdout: Scores, seed: int, decay: float) -> list[float]:
    """Return the accuracy in percent after each meta-epoch on images that were not fitted on, over all folds."""
    from fastcifar.analysis.meta_mlp import EPOCHS, fit_mlp, mlp_logits

    inputs, labels = features(holdout.logits), holdout.labels
    right = np.zeros(EPOCHS)
    for fitted, left_out in stratified_folds(labels, seed):

        def count(epoch: int, model: Any, rows: np.ndarray = left_out) -> None:
            right[epoch - 1] += (mlp_logits(model, inputs[rows]).argmax(-1) == labels[rows]).sum()

        fit_mlp(
            inputs[fitted], labels[fitted], holdout.logits.shape[-1], seed, weight_decay=decay, after_epoch=count
        )  # fmt: skip
    return [float(value) for value in 100 * right / len(labels)]


def _honest_logistic(holdout: Scores, test: Scores, seed: int) -> Stacked:
    """Choose the penalty by the cross-validated likelihood, fit on the whole holdout, score the test images."""
    from sklearn.model_selection import cross_val_score

    inputs, folds = features(holdout.logits), stratified_folds(holdout.labels, seed)
    scores = [
        cross_val_score(logistic_model(c), inputs, holdout.labels, cv=folds, scoring="neg_log_loss").mean()
        for c in PENALTIES
    ]
    penalty = PENALTIES[int(np.argmax(scores))]
    logits = _logistic_logits(_logistic(holdout, penalty), test)
    return _without_choice(logits, {"protocol": HONEST, "penalty": penalty, "cv_loss": -float(max(scores))})


def _without_choice(logits: np.ndarray, details: dict[str, Any]) -> Stacked:
    """Return what nothing was chosen for on the test set: the model that counts is the last one."""
    return Stacked(logits, logits, details, details)


def logistic_model(penalty: float) -> Any:
    """Return scikit-learn's multinomial logistic regression on standardized logits; ``penalty`` is its C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))


def _logistic(scores: Scores, penalty: float) -> Any:
    return logistic_model(penalty).fit(features(scores.logits), scores.labels)


def _logistic_logits(model: Any, scores: Scores) -> np.ndarray:
    """Return log-probabilities float64 (N, K); a class that the model never saw gets a vanishing probability."""
    result = np.full(scores.logits.shape[1:], np.log(np.finfo(np.float64).tiny))
    result[:, model.classes_] = model.predict_log_proba(features(scores.logits))
    return np.maximum(result, np.log(np.finfo(np.float64).tiny))
