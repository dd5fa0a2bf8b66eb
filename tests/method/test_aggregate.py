"""Aggregation against the mean by hand, and against numpy's SVD for products of factors."""

import gc
import types

import numpy as np
import pytest
import torch

from iet_sd.method.aggregate import StreamingMean, StreamingProduct, factor_gap, shard_weights

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


def stream(accumulator, models, weights):
    for model, weight in zip(models, weights, strict=True):
        accumulator.add(model, weight)
    return accumulator.result()


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
    result, expected = stream(StreamingMean(), models, weights), mean_by_hand(models, weights)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(
            result[name], torch.tensor(value, dtype=torch.float32), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["size", "uniform"])
def test_the_order_of_the_proxies_does_not_matter(mode):
    models, weights = draw_models(5), shard_weights([1, 2, 3, 4, 5], mode)
    forward = stream(StreamingMean(), models, weights)
    backward = stream(StreamingMean(), models[::-1], weights[::-1])
    torch.testing.assert_close(forward, backward)


def test_one_proxy_comes_back_bit_for_bit():
    (model,) = draw_models(1)
    model["tiny"] = torch.tensor([1e-40, -0.0, 3.0e38])
    result = stream(StreamingMean(), [model], shard_weights([9], "size"))
    for name, value in model.items():
        assert torch.equal(result[name].view(torch.int32), value.view(torch.int32))


def test_equal_proxies_average_to_themselves():
    models = draw_models(1) * 4
    result = stream(StreamingMean(), models, shard_weights([1] * 4, "uniform"))
    torch.testing.assert_close(result, models[0])


def test_half_precision_proxies_average_in_single_precision():
    models = [{"w": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(2)]
    models[1]["w"] += 2**-7  # the next number up: the mean of both is none of bfloat16's
    result = stream(StreamingMean(), models, [0.5, 0.5])
    assert result["w"].dtype == torch.float32
    assert result["w"].item() == 1 + 2**-8


@pytest.mark.parametrize("make", [StreamingMean, lambda: StreamingProduct([PAIR])])
def test_a_proxy_that_trains_on_after_it_was_added_changes_nothing(make):
    models, other = draw_factors(2), draw_factors(2)
    kept, accumulator = stream(make(), other, [0.5, 0.5]), make()
    for model in models:
        accumulator.add(model, 0.5)
        for value in model.values():
            value.zero_()
    torch.testing.assert_close(accumulator.result(), kept)


@pytest.mark.parametrize("make", [StreamingMean, lambda: StreamingProduct([PAIR])])
def test_memory_does_not_grow_with_the_number_of_proxies(make):
    few, many = make(), make()
    for model in draw_factors(2):
        few.add(model, 0.5)
    for model in draw_factors(30):
        many.add(model, 1 / 30)
    assert 0 < numbers_held(many) == numbers_held(few)


def test_the_mean_holds_the_numbers_of_one_model():
    mean = StreamingMean()
    models = draw_models(3)
    for model in models:
        mean.add(model, 1 / 3)
    assert numbers_held(mean) == sum(value.numel() for value in models[0].values())


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_product_is_the_best_of_its_rank_to_the_mean_product(count):
    models = draw_factors(count, rank=3, inputs=9, outputs=7)
    weights = shard_weights(range(1, count + 1), "size")
    result, gaps = stream(StreamingProduct([PAIR]), models, weights)
    product = sum(
        w * m["lora_B"].double().numpy() @ m["lora_A"].double().numpy()
        for m, w in zip(models, weights, strict=True)
    )
    u, s, vt = np.linalg.svd(product)
    best = u[:, :3] * s[:3] @ vt[:3]
    assert result["lora_A"].shape == (3, 9)
    assert result["lora_B"].shape == (7, 3)
    assert {value.dtype for value in result.values()} == {torch.float32}
    merged = (result["lora_B"] @ result["lora_A"]).numpy()
    np.testing.assert_allclose(merged, best, rtol=1e-4, atol=1e-5)
    lost = np.linalg.norm(merged - product)
    assert lost == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-4, abs=1e-5)

    mean = mean_by_hand(models, weights)
    gap = np.linalg.norm(product - mean["lora_B"] @ mean["lora_A"]) / np.linalg.norm(product)
    assert list(gaps.values()) == pytest.approx([gap], rel=1e-4)
    assert gap > 0.1


def test_one_proxy_keeps_its_product_and_has_no_gap():
    (model,) = draw_factors(1)
    result, gaps = stream(StreamingProduct([PAIR]), [model], [1.0])
    torch.testing.assert_close(
        result["lora_B"] @ result["lora_A"], model["lora_B"] @ model["lora_A"]
    )
    assert list(gaps.values()) == pytest.approx([0.0], abs=1e-5)


def test_a_shared_factor_makes_the_product_of_means_exact():
    models = draw_factors(3)
    for model in models:
        model["lora_A"] = models[0]["lora_A"]
    product, gaps = stream(StreamingProduct([PAIR]), models, [1 / 3] * 3)
    factors = stream(StreamingMean(), models, [1 / 3] * 3)
    torch.testing.assert_close(
        product["lora_B"] @ product["lora_A"], factors["lora_B"] @ factors["lora_A"]
    )
    assert list(gaps.values()) == pytest.approx([0.0], abs=1e-5)


def test_each_pair_has_its_own_gap_and_other_names_are_averaged():
    first, second, plain = draw_factors(2, seed=1), draw_factors(2, seed=2), draw_models(2, seed=3)
    models = [
        {f"a.{name}": value for name, value in a.items()}
        | {f"b.{name}": value for name, value in b.items()}
        | {f"c.{name}": value for name, value in c.items()}
        for a, b, c in zip(first, second, plain, strict=True)
    ]
    pairs = [("a.lora_A", "a.lora_B"), ("b.lora_A", "b.lora_B")]
    result, gaps = stream(StreamingProduct(pairs), models, [0.5, 0.5])
    assert result.keys() == models[0].keys()
    gaps_alone = []
    for where, part in {"a": first, "b": second}.items():
        alone, gap = stream(StreamingProduct([PAIR]), part, [0.5, 0.5])
        torch.testing.assert_close(
            result[f"{where}.lora_B"] @ result[f"{where}.lora_A"], alone["lora_B"] @ alone["lora_A"]
        )
        gaps_alone += gap.values()
    assert list(gaps.values()) == pytest.approx(gaps_alone)
    for name, value in stream(StreamingMean(), plain, [0.5, 0.5]).items():
        torch.testing.assert_close(result[f"c.{name}"], value)


def test_adapters_that_are_still_zero_stay_zero_without_a_gap():
    models = draw_factors(3)
    for model in models:
        model["lora_B"].zero_()
    result, gaps = stream(StreamingProduct([PAIR]), models, [1 / 3] * 3)
    assert not (result["lora_B"] @ result["lora_A"]).any()
    assert list(gaps.values()) == [0.0]


def test_the_factor_gap_is_the_distance_relative_to_the_mean_product():
    models, weights = draw_factors(4), [0.1, 0.2, 0.3, 0.4]
    product = sum(w * m["lora_B"] @ m["lora_A"] for m, w in zip(models, weights, strict=True))
    mean = stream(StreamingMean(), models, weights)
    hand = mean_by_hand(models, weights)
    difference = product.double().numpy() - hand["lora_B"] @ hand["lora_A"]
    expected = np.linalg.norm(difference) / np.linalg.norm(product.double().numpy())
    assert factor_gap(product, mean["lora_A"], mean["lora_B"]) == pytest.approx(expected, rel=1e-4)


def test_the_factor_gap_of_a_zero_product_is_zero():
    assert factor_gap(torch.zeros(5, 6), torch.randn(2, 6), torch.zeros(5, 2)) == 0.0
