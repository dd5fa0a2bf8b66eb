"""How much nearer the nearest training image is than the next ones: small where it was copied.

Both take Euclidean distances (G, K) of each generation to its nearest training images, ascending,
in the pixels' unit [0, 1]: of ``nearest(..., k=50, metric="l2", flipped_QD=...)``. With fewer than
n neighbours all are used. Distances that are all 0 (only copies of one image) have ratio 0.
"""

from collections.abc import Sequence

import numpy as np

from iet_sd.errors import UserError

MQ_CUTOFFS = (15, 20, 30, 40, 50, 60, 70, 80, 90)


def l2_ratio(distance_GK: np.ndarray, n: int = 50, alpha: float = 0.5) -> np.ndarray:
    """d_1 / (alpha * mean of d_1 ... d_n), Carlini et al. 2023 (arXiv 2301.13188): float64 (G,).

    Below 1: memorized, by their rule. Errors: `UserError` for fewer than 2 neighbours.
    """
    return _first_to_mean(distance_GK.astype(np.float64), n) / alpha


def mq(distance_GK: np.ndarray, cutoffs: Sequence[int] = MQ_CUTOFFS, n: int = 50) -> dict[int, int]:
    """MQ_c: how many generations have 100 d_1^2 / mean(d_1^2 ... d_n^2) < c.

    Of IET-AGC (arXiv 2407.15328), on squared distances. The authors read the ratio back from file
    names, where 9.5e-07, an exact copy, counts as 9.5; here no copy is lost.
    Errors: `UserError` for fewer than 2 neighbours.
    """
    percent_G = 100 * _first_to_mean(distance_GK.astype(np.float64) ** 2, n)
    return {cutoff: int(np.count_nonzero(percent_G < cutoff)) for cutoff in cutoffs}


def _first_to_mean(distance_GK: np.ndarray, n: int) -> np.ndarray:
    if distance_GK.shape[1] < 2:
        raise UserError(
            "The distance ratio needs at least 2 training images to compare with, but there is "
            f"{distance_GK.shape[1]}. Give more training images."
        )
    mean_G = distance_GK[:, :n].mean(axis=1)
    return np.divide(distance_GK[:, 0], mean_G, out=np.zeros_like(mean_G), where=mean_G > 0)
