"""The outer step against torch's own SGD."""

import pytest
import torch

from iet_sd.method.aggregate import outer_step
from tests.method.averaging import draw_models


@pytest.mark.parametrize(
    ("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0), (1.0, 0.0)], ids=str
)
def test_the_outer_step_is_torchs_nesterov_on_what_the_round_changed(rate, momentum):
    rounds = draw_models(5)
    weights = draw_models(1, seed=9)[0]
    parameters = [torch.nn.Parameter(value.clone()) for value in weights.values()]
    sgd = torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0)
    velocity = {}
    for averaged in rounds:
        for parameter, average in zip(parameters, averaged.values(), strict=True):
            parameter.grad = parameter.detach() - average
        sgd.step()
        before, weights = weights, dict(averaged)
        outer_step(before, weights, velocity, rate, momentum)
        for parameter, value in zip(parameters, weights.values(), strict=True):
            torch.testing.assert_close(value, parameter.detach())
    assert velocity.keys() == (weights.keys() if momentum else set())


def test_the_plain_outer_step_is_the_average_bit_for_bit():
    (average,) = draw_models(1)
    average["tiny"] = torch.tensor([1e-40, -0.0, 3.0e38])
    result = dict(average)
    outer_step({name: value + 1 for name, value in average.items()}, result, {}, 1.0, 0.0)
    assert all(result[name] is average[name] for name in average)
