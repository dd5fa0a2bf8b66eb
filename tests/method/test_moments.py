"""Moments of AdamW, averaged, against the weighted means of gradients that they are."""

import numpy as np
import pytest
import torch

from iet_sd.method.aggregate import MomentMean, shard_weights
from tests.method.averaging import filled


def draw_moments(steps, seed=0):
    """Moments as AdamW makes them in ``steps`` updates, by a loop over drawn gradients."""
    generator = torch.Generator().manual_seed(seed)
    m, v = torch.zeros(4), torch.zeros(4)
    for _ in range(steps):
        gradient = torch.randn(4, generator=generator)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
    return {"w/step": torch.tensor(float(steps)), "w/exp_avg": m, "w/exp_avg_sq": v}


@pytest.mark.parametrize("steps", [(5, 5), (1, 3, 20), (0, 2, 5), (300, 2)], ids=str)
def test_moments_average_as_the_weighted_means_of_gradients_that_they_are(steps):
    weights = shard_weights([*range(1, len(steps) + 1)], "size")
    models = [draw_moments(count, seed) for seed, count in enumerate(steps)]
    result = filled(MomentMean(weights, (0.9, 0.99)), models).result()
    t = result["w/step"].item()
    assert t == max(1, round(sum(w * n for w, n in zip(weights, steps, strict=True))))
    for name, beta in (("w/exp_avg", 0.9), ("w/exp_avg_sq", 0.99)):
        total = sum(w * m[name].double().numpy() for w, m in zip(weights, models, strict=True))
        weight = sum(w * (1 - beta**n) for w, n in zip(weights, steps, strict=True))
        # What AdamW divides by when it next uses the moment.
        np.testing.assert_allclose(result[name] / (1 - beta**t), total / weight, rtol=1e-5)
        if len(set(steps)) == 1:
            np.testing.assert_allclose(result[name], total, rtol=1e-6)


def test_moments_of_no_update_at_all_are_those_of_a_new_optimizer():
    result = filled(MomentMean([0.5, 0.5], (0.9, 0.99)), [draw_moments(0)] * 2).result()
    torch.testing.assert_close(result, draw_moments(0))
