"""Weights of proxies, and the mean of their models against the mean by hand."""

import pytest
import torch

from iet_sd.method.aggregate import AdapterMean, StreamingMean, shard_weights
from tests.method.averaging import (
    PAIR,
    draw_factors,
    draw_models,
    filled,
    mean_by_hand,
    numbers_held,
    stream,
)


def test_uniform_weights_are_equal_whatever_the_sizes():
    assert shard_weights([10, 0, 5, 1], "uniform") == pytest.approx([0.25] * 4)


def test_size_weights_are_the_share_of_the_samples():
    assert shard_weights([10, 0, 5, 1], "size") == pytest.approx([10 / 16, 0, 5 / 16, 1 / 16])


@pytest.mark.parametrize("mode", ["size", "uniform"])
@pytest.mark.parametrize("sizes", [[7], [3, 3, 3], [1, 2, 3, 4, 5, 6, 7]])
def test_weights_sum_to_one(sizes, mode):
    assert sum(shard_weights(sizes, mode)) == pytest.approx(1.0)
    assert len(shard_weights(sizes, mode)) == len(sizes)


@pytest.mark.parametrize("mode", ["size", "uniform"])
@pytest.mark.parametrize("sizes", [[4], [3, 9], [1, 0, 5, 7, 2]])
def test_the_streaming_mean_equals_the_mean_by_hand(sizes, mode):
    models, weights = draw_models(len(sizes)), shard_weights(sizes, mode)
    result, expected = stream(models, weights), mean_by_hand(models, weights)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(
            result[name], torch.tensor(value, dtype=torch.float32), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["size", "uniform"])
def test_the_order_of_the_proxies_does_not_matter(mode):
    models, weights = draw_models(5), shard_weights([1, 2, 3, 4, 5], mode)
    forward = stream(models, weights)
    backward = stream(models[::-1], weights[::-1])
    torch.testing.assert_close(forward, backward)


def test_one_proxy_comes_back_bit_for_bit():
    (model,) = draw_models(1)
    model["tiny"] = torch.tensor([1e-40, -0.0, 3.0e38])
    result = stream([model], shard_weights([9], "size"))
    for name, value in model.items():
        assert torch.equal(result[name].view(torch.int32), value.view(torch.int32))


def test_equal_proxies_average_to_themselves():
    models = draw_models(1) * 4
    result = stream(models, shard_weights([1] * 4, "uniform"))
    torch.testing.assert_close(result, models[0])


def test_half_precision_proxies_average_in_single_precision():
    models = [{"w": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(2)]
    models[1]["w"] += 2**-7  # the next number up: the mean of both is none of bfloat16's
    result = stream(models, [0.5, 0.5])
    assert result["w"].dtype == torch.float32
    assert result["w"].item() == 1 + 2**-8


MEANS = [
    StreamingMean,
    lambda weights: AdapterMean(weights, [PAIR], refactor=True),
    lambda weights: AdapterMean(weights, [PAIR], refactor=False),
]


@pytest.mark.parametrize("make", MEANS)
@pytest.mark.parametrize("width", [6, 60], ids=["product", "factors"])
def test_a_proxy_that_trains_on_after_it_was_added_changes_nothing(make, width):
    weights = [0.5, 0.5]
    kept = filled(make(weights), draw_factors(2, inputs=width, outputs=width)).result()
    mean = make(weights)
    for number, model in enumerate(draw_factors(2, inputs=width, outputs=width)):
        mean.add(number, model)
        for value in model.values():
            value.zero_()
    torch.testing.assert_close(mean.result(), kept)


def test_memory_does_not_grow_with_the_number_of_proxies():
    few, many = (filled(StreamingMean([1 / k] * k), draw_models(k)) for k in (2, 30))
    assert 0 < numbers_held(few) == numbers_held(many)


def test_the_mean_holds_the_numbers_of_one_model():
    models = draw_models(3)
    mean = filled(StreamingMean([1 / 3] * 3), models)
    assert numbers_held(mean) == sum(value.numel() for value in models[0].values())
