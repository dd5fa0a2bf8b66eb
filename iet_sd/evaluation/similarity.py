"""Statistics of how similar each generation is to its nearest training image. Shape: G images."""

from collections.abc import Sequence

import numpy as np


def summarize(value_G: np.ndarray, thresholds: Sequence[float] = (0.5,)) -> dict[str, float]:
    """Mean, std, percentiles and share above each threshold, as Somepalli et al. 2023 report them.

    Percentiles interpolate linearly, the share counts strictly above, std is the population's.
    The memorization score of the IET papers (arXiv 2407.15328) is ``p95``. Keys: ``mean``,
    ``std``, ``p75``, ``p90``, ``p95``, ``share_above_0.5``.
    """
    percentiles = dict(
        zip(("p75", "p90", "p95"), np.percentile(value_G, (75, 90, 95)), strict=True)
    )
    shares = {f"share_above_{t:g}": np.mean(value_G > t) for t in thresholds}
    values = {"mean": np.mean(value_G, dtype=np.float64), "std": np.std(value_G, dtype=np.float64)}
    return {name: float(value) for name, value in (values | percentiles | shares).items()}
