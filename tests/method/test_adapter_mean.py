"""The mean of adapters against numpy's SVD of dense products."""

import numpy as np
import pytest
import torch

from iet_sd.method.aggregate import AdapterMean, factor_gap, shard_weights
from tests.method.averaging import (
    PAIR,
    draw_factors,
    draw_models,
    filled,
    mean_by_hand,
    numbers_held,
    stream,
)


def products(models, weights, pairs=(PAIR,), refactor=True):
    return filled(AdapterMean(weights, pairs, refactor), models)


def test_adapters_take_the_memory_of_their_factors_and_never_more_than_of_their_products():
    """Rank 2, 40 x 30: a model's factors are 140 numbers, a product 1200."""
    for count, held in ((2, 2 * 140), (8, 8 * 140), (9, 1200), (30, 1200)):
        mean = products(draw_factors(count, inputs=40, outputs=30), [1 / count] * count)
        assert numbers_held(mean) == 140 + held


@pytest.mark.parametrize("refactor", [True, False])
@pytest.mark.parametrize("width", [6, 60], ids=["product", "factors"])
def test_totals_of_processes_add_up(refactor, width):
    """Each model added on one of two processes, then totals summed."""
    models, weights = draw_factors(3, inputs=width, outputs=width), [0.2, 0.3, 0.5]
    whole = products(models, weights, refactor=refactor)
    parts = [AdapterMean(weights, [PAIR], refactor) for _ in range(2)]
    for number, model in enumerate(models):
        parts[number % 2].add(number, model)
    assert [*parts[0].totals] == [*parts[1].totals]
    parts[0].totals = {name: t + parts[1].totals[name] for name, t in parts[0].totals.items()}
    torch.testing.assert_close(parts[0].result(), whole.result())
    assert parts[0].gaps() == pytest.approx(whole.gaps(), rel=1e-5)


def dense(models, weights):
    """The mean of BA, in double precision."""
    return sum(
        w * m["lora_B"].double().numpy() @ m["lora_A"].double().numpy()
        for m, w in zip(models, weights, strict=True)
    )


def gap_by_hand(models, weights):
    mean, product = mean_by_hand(models, weights), dense(models, weights)
    return np.linalg.norm(product - mean["lora_B"] @ mean["lora_A"]) / np.linalg.norm(product)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize(("inputs", "outputs"), [(9, 7), (50, 90), (90, 50), (4, 200)])
def test_the_product_is_the_best_of_its_rank_to_the_mean_product(count, inputs, outputs):
    models = draw_factors(count, rank=3, inputs=inputs, outputs=outputs)
    weights = shard_weights(range(1, count + 1), "size")
    mean = products(models, weights)
    result, product = mean.result(), dense(models, weights)
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    best = u[:, :3] * s[:3] @ vt[:3]
    assert result["lora_A"].shape == (3, inputs)
    assert result["lora_B"].shape == (outputs, 3)
    assert {value.dtype for value in result.values()} == {torch.float32}
    merged = (result["lora_B"] @ result["lora_A"]).numpy()
    np.testing.assert_allclose(merged, best, rtol=1e-4, atol=1e-5)
    lost = np.linalg.norm(merged - product)
    assert lost == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-4, abs=1e-4)
    assert [*mean.gaps().values()] == pytest.approx([gap_by_hand(models, weights)], rel=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 7), (50, 90), (4, 200)])
def test_without_refactoring_factors_are_averaged_and_the_gap_is_the_same(inputs, outputs):
    models, weights = draw_factors(4, inputs=inputs, outputs=outputs), [0.1, 0.2, 0.3, 0.4]
    mean = products(models, weights, refactor=False)
    torch.testing.assert_close(mean.result(), stream(models, weights))
    assert [*mean.gaps().values()] == pytest.approx([gap_by_hand(models, weights)], rel=1e-5)
    assert next(iter(mean.gaps().values())) > 0.1


def test_factors_of_convolutions_are_matrices():
    shapes = {"lora_A": (2, 3, 3, 3), "lora_B": (40, 2, 1, 1)}
    models, weights = draw_models(2, shapes), [0.5, 0.5]
    flat = [{name: value.flatten(1) for name, value in model.items()} for model in models]
    mean = products(models, weights)
    assert mean.gaps() == products(flat, weights).gaps()
    for name, value in mean.result().items():
        assert value.shape == shapes[name]
        torch.testing.assert_close(value.flatten(1), products(flat, weights).result()[name])


@pytest.mark.parametrize("width", [6, 60], ids=["product", "factors"])
def test_one_proxy_keeps_its_product_and_has_no_gap(width):
    (model,) = draw_factors(1, inputs=width, outputs=width)
    mean = products([model], [1.0])
    result = mean.result()
    torch.testing.assert_close(
        result["lora_B"] @ result["lora_A"], model["lora_B"] @ model["lora_A"]
    )
    assert [*mean.gaps().values()] == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize("width", [6, 60], ids=["product", "factors"])
def test_a_shared_factor_makes_the_product_of_means_exact(width):
    models = draw_factors(3, inputs=width, outputs=width)
    for model in models:
        model["lora_A"] = models[0]["lora_A"]
    mean = products(models, [1 / 3] * 3)
    product, factors = mean.result(), stream(models, [1 / 3] * 3)
    torch.testing.assert_close(
        product["lora_B"] @ product["lora_A"], factors["lora_B"] @ factors["lora_A"]
    )
    assert [*mean.gaps().values()] == pytest.approx([0.0], abs=1e-6)


def test_each_pair_has_its_own_gap_and_other_names_are_averaged():
    first, second = draw_factors(2, seed=1), draw_factors(2, seed=2, inputs=60, outputs=50)
    plain, half = draw_models(2, seed=3), [0.5, 0.5]
    models = [
        {f"a.{name}": value for name, value in a.items()}
        | {f"b.{name}": value for name, value in b.items()}
        | {f"c.{name}": value for name, value in c.items()}
        for a, b, c in zip(first, second, plain, strict=True)
    ]
    mean = products(models, half, [("a.lora_A", "a.lora_B"), ("b.lora_A", "b.lora_B")])
    result, gaps_alone = mean.result(), []
    assert result.keys() == models[0].keys()
    for where, part in {"a": first, "b": second}.items():
        alone = products(part, half)
        gaps_alone += alone.gaps().values()
        alone = alone.result()
        torch.testing.assert_close(
            result[f"{where}.lora_B"] @ result[f"{where}.lora_A"], alone["lora_B"] @ alone["lora_A"]
        )
    assert [*mean.gaps()] == ["a.lora_B", "b.lora_B"]
    assert [*mean.gaps().values()] == pytest.approx(gaps_alone)
    for name, value in stream(plain, half).items():
        torch.testing.assert_close(result[f"c.{name}"], value)


@pytest.mark.parametrize("width", [6, 60], ids=["product", "factors"])
def test_adapters_that_are_still_zero_stay_zero_without_a_gap(width):
    models = draw_factors(3, inputs=width, outputs=width)
    for model in models:
        model["lora_B"].zero_()
    mean = products(models, [1 / 3] * 3)
    result = mean.result()
    assert not (result["lora_B"] @ result["lora_A"]).any()
    assert [*mean.gaps().values()] == [0.0]


@pytest.mark.parametrize("right", [None, torch.ones(3, 6)], ids=["product", "factors"])
def test_the_gap_of_a_zero_product_is_zero(right):
    left = torch.zeros(5, 6 if right is None else 3)
    assert factor_gap(left, right, torch.randn(2, 6), torch.zeros(5, 2)) == 0.0
