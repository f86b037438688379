"""The statistics of this project, once: means over seeds, standard errors, tests, accuracies and likelihoods.

Nothing heavy is imported before it is needed, because lists of recipes show means too.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastcifar.intervals import wilson_interval

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Difference", "Mean", "accuracy", "binomial_error", "difference", "mcnemar", "mean_of", "negative_log_likelihood",
    "p_value", "p_value_above", "wilson_interval",
]  # fmt: skip

TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: in percent.
        error: its standard error in points; from the seeds' spread, None for a single seed.
        n: seeds.
    """

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.error is None else f"{self.mean:.2f} ± {self.error:.2f}"

    def row(self) -> dict[str, float | int | None]:
        """Return it as plain values, for JSON."""
        return {"mean": self.mean, "standard_error": self.error, "n": self.n}


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Return the mean of the values that are there, or None where there is none."""
    known = [float(v) for v in values if v is not None]
    if not known:
        return None
    # n - 1 degrees of freedom: the mean that the deviations are taken from comes from the same values.
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Mean(statistics.fmean(known), error, len(known))


def binomial_error(accuracy: float, images: int = TEST_IMAGES) -> float:
    """Return the standard error, in points, of one model's accuracy (percent) on so many test images."""
    share = accuracy / 100
    return 100 * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Difference:
    """Ours minus the published metric, in points, with the standard error of that difference."""

    points: float
    error: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} ± {self.error:.2f}"


def difference(ours: Mean | None, published: float | None) -> Difference | None:
    """Compare a mean with a published metric of one run, both in percent.

    The error joins ours (over seeds, or binomial for a single one) and the published run's binomial one; what the
    published run would vary by from seed to seed is not known.
    """
    if ours is None or published is None:
        return None
    own = ours.error if ours.error is not None else binomial_error(ours.mean)
    return Difference(ours.mean - published, math.hypot(own, binomial_error(published)))


def p_value(values: Sequence[float], published: float) -> float | None:
    """Return the p-value of a two-sided t-test (Student, 1908) of a published run as one more of ours.

    The null hypothesis is that the published number is drawn from the normal distribution that our seeds come from. It
    is of one run, whose spread is not known and is taken for ours, and the mean of n seeds is not known exactly either:
    with their standard deviation s, the difference is divided by s sqrt(1 + 1/n), with n - 1 degrees of freedom.

    Args:
        values: one accuracy per seed, in percent.
        published: in percent.

    Returns:
        The p-value in 0..1; None for fewer than two seeds, and for seeds that are all equal, where there is no spread
        to test with.
    """
    if len(set(values)) < 2:
        return None
    from scipy.stats import ttest_ind_from_stats

    ours = (statistics.fmean(values), statistics.stdev(values), len(values))
    return float(ttest_ind_from_stats(*ours, published, 0.0, 1).pvalue)


def p_value_above(values: Sequence[float], target: float) -> float | None:
    """Return the p-value of a one-sided one-sample t-test (Student, 1908) of seeds against a target.

    The null hypothesis is that the mean over seeds is no more than the target: a small value speaks for a mean above.
    Arguments and None as for `p_value`.
    """
    if len(set(values)) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(values, target, alternative="greater").pvalue)


def accuracy(scores: "np.ndarray", labels: "np.ndarray") -> float:
    """Return the accuracy in percent of logits or probabilities (N, K) against labels int64 (N,)."""
    return 100 * float((scores.argmax(-1) == labels).mean())


def negative_log_likelihood(probabilities: "np.ndarray", labels: "np.ndarray") -> float:
    """Return the mean of -log p(label), in nats; probabilities (N, K), labels int64 (N,)."""
    import numpy as np

    chosen = probabilities[np.arange(len(labels)), labels]
    # The smallest normal number in the place of 0: one certain error must not make the mean infinite.
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())


def mcnemar(logits_a: "np.ndarray", logits_b: "np.ndarray", labels: "np.ndarray") -> dict[str, float | int]:
    """Test whether two models are equally often right on the same images (McNemar, 1947; exact, two-sided).

    Only images that one has right and the other wrong count: under equality each falls to either with probability 1/2.

    Args:
        logits_a: (N, K) of the first model.
        logits_b: (N, K) of the second.
        labels: int64 (N,).

    Returns:
        ``only_first`` and ``only_second``: images that only this one has right; ``p_value``.
    """
    from scipy.stats import binomtest

    right_a, right_b = logits_a.argmax(1) == labels, logits_b.argmax(1) == labels
    first, second = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return {"only_first": first, "only_second": second, "p_value": p}
