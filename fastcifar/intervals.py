"""The confidence interval of an accuracy; apart, because a run directory writes it before anything is analysed."""

import math
import statistics


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an accuracy, in percent (Wilson, 1927).

    Unlike the normal one it stays within 0..100 and says something for 0 or all images right.

    Args:
        right: images that were called right, 0..images.
        images: at least 1.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    share, grown = right / images, 1 + z * z / images
    middle = (share + z * z / (2 * images)) / grown
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images)) / grown
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
