"""How often intervals hold what is known, and tests raise the alarm, over many draws.

Rates are over 200 draws, so that a true 95% varies by 1.5% (one standard deviation); intervals of
200 resamples, and of a p95, are themselves a little narrow.
"""

import math

import numpy as np

REPEATS = 200
FAST = {"resamples": 200}


def p95(values):
    """`np.quantile(values, 0.95)`, faster for few values."""
    place = 0.95 * (len(values) - 1)
    low = int(place)
    values = np.partition(values, [low, low + 1])
    return values[low] + (place - low) * (values[low + 1] - values[low])


def coverage(make, truth, repeats=REPEATS):
    """Share of the intervals ``make(rng, seed)`` that hold the truth, for each number given."""
    hits = [
        [est.low <= true <= est.high for est, true in zip(found, truth, strict=True)]
        for found in (make(np.random.default_rng(seed), seed) for seed in range(repeats))
    ]
    return np.mean(hits, axis=0)


def clustered(rng, units, size, share=0.9):
    """Standard normal values (N,) and labels: the unit makes up ``share`` of the variance."""
    labels = np.repeat(np.arange(units), size)
    unit_part = rng.normal(size=units)[labels] * math.sqrt(share)
    order = rng.permutation(len(labels))
    values = unit_part + rng.normal(size=len(labels)) * math.sqrt(1 - share)
    return values[order], labels[order]


def is_nominal(rates):
    return np.all((np.asarray(rates) > 0.88) & (np.asarray(rates) < 0.99))


def alarms(test, repeats=REPEATS):
    """Share of ``test(rng)``'s p-values at or below 5%."""
    return np.mean([test(np.random.default_rng(seed)) <= 0.05 for seed in range(repeats)])
