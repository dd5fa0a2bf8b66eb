"""KID's interval: its value is KID's, it leaves out by the book, and covers at the nominal rate."""

import tracemalloc

import numpy as np
import pytest

from iet_sd.errors import UserError
from iet_sd.evaluation import kid
from iet_sd.evaluation.kid import kid_difference, kid_interval
from iet_sd.evaluation.quality import kernel_distance

RNG = np.random.default_rng(0)
GEN, REAL = RNG.random((36, 8), np.float32), RNG.random((30, 8), np.float32) + 0.1
# Units of unequal sizes, whose images do not stand together.
PROMPT = RNG.permutation(np.repeat(np.arange(12), [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5]))
GROUP = RNG.permutation(np.repeat(["a", "b", "c", "d", "e", *map(str, range(10))], 2))


def mean_kernel(a, b, pairs):
    """Over some pairs, one by one."""
    values = [
        (np.dot(a[i].astype(float), b[j].astype(float)) / a.shape[1] + 1) ** 3
        for i in range(len(a))
        for j in range(len(b))
        if pairs[i][j]
    ]
    return np.mean(values)


def naive_kid(gen, real, prompt, group):
    """Its three means; of images of one kind those of different units."""
    return (
        mean_kernel(gen, gen, prompt[:, None] != prompt)
        + mean_kernel(real, real, group[:, None] != group)
        - 2 * mean_kernel(gen, real, np.ones((len(gen), len(real))))
    )


def naive_reach(gen, real, prompt, group):
    """Half the width of the interval: each unit is left out, and KID taken anew."""
    prompts = [prompt != p for p in np.unique(prompt)]
    groups = [group != g for g in np.unique(group)]
    values = (
        [naive_kid(gen[left], real, prompt[left], group) for left in prompts],
        [naive_kid(gen, real[left], prompt, group[left]) for left in groups],
    )
    return 1.959964 * np.sqrt(
        sum((len(v) - 1) / len(v) * np.sum((v - np.mean(v)) ** 2) for v in values)
    )


def test_the_value_is_that_of_torch_fidelity():
    a = RNG.random((30, 8), np.float32)
    value = kid_interval(a, REAL, np.arange(30), np.arange(30)).value
    assert value == pytest.approx(kernel_distance(a, REAL, subsets=2)[0], rel=1e-4)


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("units", ["groups", "images"])
def test_the_value_and_the_interval_are_those_by_hand(units, chunk, monkeypatch):
    monkeypatch.setattr(kid, "CHUNK_ROWS", chunk)
    labels = (PROMPT, GROUP) if units == "groups" else (np.arange(36), np.arange(30))
    found = kid_interval(GEN, REAL, *labels)
    assert found.value == pytest.approx(naive_kid(GEN, REAL, *labels), rel=1e-11)
    reach = naive_reach(GEN, REAL, *labels)
    assert found.high - found.value == pytest.approx(reach, rel=1e-6)
    assert found.value - found.low == pytest.approx(reach, rel=1e-6)


def test_a_difference_of_a_model_with_itself_is_nothing():
    found = kid_difference(GEN, GEN.copy(), REAL, PROMPT, GROUP)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def test_a_difference_is_surer_than_its_parts():
    second = GEN + np.float32(0.05)
    found = kid_difference(GEN, second, REAL, PROMPT, GROUP)
    parts = [kid_interval(each, REAL, PROMPT, GROUP) for each in (GEN, second)]
    assert found.value == pytest.approx(parts[1].value - parts[0].value)
    assert found.high - found.low < 0.7 * (parts[0].high - parts[0].low)


def test_the_interval_covers_the_true_distance():
    """Of a shift whose KID is known from very many images."""
    rng = np.random.default_rng(1)
    many = [rng.normal(0, 1, (4000, 4)), rng.normal(0.5, 1, (4000, 4))]
    true = kid_interval(*many, np.arange(4000), np.arange(4000)).value
    covered = 0
    for _ in range(200):
        a, b = rng.normal(0, 1, (80, 4)), rng.normal(0.5, 1, (80, 4))
        found = kid_interval(a, b, np.arange(80), np.arange(80))
        covered += found.low <= true <= found.high
    assert 176 <= covered <= 199  # 95 % of 200, less four standard deviations


def in_units(rng, units, size):
    """Standard normal features (N, 32), of whose variance the unit makes up 0.8; and labels."""
    labels = np.repeat(np.arange(units), size)
    shared, own = rng.normal(size=(units, 32)), rng.normal(size=(len(labels), 32))
    return np.sqrt(0.8) * shared[labels] + np.sqrt(0.2) * own, labels


@pytest.mark.parametrize(
    ("prompts", "groups"), [((50, 4), (200, 1)), ((100, 1), (20, 5)), ((30, 4), (20, 5))]
)
def test_images_of_one_unit_do_not_count_as_many(prompts, groups):
    """Of one distribution KID is 0, though images of a prompt, or of a group, are much alike."""
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        (gen, prompt), (real, group) = (in_units(rng, *each) for each in (prompts, groups))
        found.append(kid_interval(gen, real, prompt, group))
    values = [each.value for each in found]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    assert np.mean([each.low <= 0 <= each.high for each in found]) >= 0.88


@pytest.mark.parametrize("units", [(2, 30), (36, 2), (1, 1)])
def test_too_few_units_have_no_interval(units):
    labels = np.arange(36) % units[0], np.arange(30) % units[1]
    with pytest.raises(UserError, match=f"3 of each; got {units[0]} and {units[1]}"):
        kid_interval(GEN, REAL, *labels)


def test_memory_is_that_of_a_block(monkeypatch):
    """And not of the kernel, which is 69 MiB for each of its sums here."""
    monkeypatch.setattr(kid, "CHUNK_ROWS", 100)
    many = RNG.random((3000, 8), np.float32)
    tracemalloc.start()
    kid_interval(many, many, np.arange(3000), np.arange(3000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21
