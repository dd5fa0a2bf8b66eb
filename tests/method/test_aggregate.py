"""Aggregation against the mean by hand, numpy's SVD of dense products, and torch's own SGD."""

import gc
import types

import numpy as np
import pytest
import torch

from iet_sd.method.aggregate import (
    AdapterMean,
    MomentMean,
    StreamingMean,
    factor_gap,
    outer_step,
    shard_weights,
)

SHAPES = {"conv.weight": (3, 2, 3, 3), "linear.weight": (5, 4), "scale": ()}
PAIR = ("lora_A", "lora_B")


def draw_models(count: int, shapes=None, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(shape, generator=generator)
            for name, shape in (shapes or SHAPES).items()
        }
        for _ in range(count)
    ]


def draw_factors(count: int, *, rank=2, inputs=6, outputs=5, seed=0):
    return draw_models(count, {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}, seed)


def filled(mean, models):
    for number, model in enumerate(models):
        mean.add(number, model)
    return mean


def stream(models, weights):
    return filled(StreamingMean(weights), models).result()


def products(models, weights, pairs=(PAIR,), refactor=True):
    return filled(AdapterMean(weights, pairs, refactor), models)


def mean_by_hand(models, weights) -> dict[str, np.ndarray]:
    return {
        name: sum(
            w * model[name].double().numpy() for model, w in zip(models, weights, strict=True)
        )
        for name in models[0]
    }


def numbers_held(root: object) -> int:
    """Elements of all tensors that can be reached from ``root``."""
    code = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
    found, queue = {}, [root]
    while queue:
        item = queue.pop()
        if id(item) in found or isinstance(item, code):
            continue
        found[id(item)] = item
        if not isinstance(item, torch.Tensor):
            queue += gc.get_referents(item)
    return sum(
        t.untyped_storage().nbytes() // t.element_size()
        for t in found.values()
        if isinstance(t, torch.Tensor)
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


def test_the_mean_holds_the_numbers_of_one_model():
    models = draw_models(3)
    mean = filled(StreamingMean([1 / 3] * 3), models)
    assert numbers_held(mean) == sum(value.numel() for value in models[0].values())


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
