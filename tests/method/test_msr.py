"""MSR against the authors' exchange written with lists, and its properties on any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iet_sd.method.msr import redistribute

FRACTIONS = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9])
TIES = st.sampled_from(["seed", "index"])


@st.composite
def populations(draw, min_shards: int = 1):
    """(shard of each sample or -1, skips of each sample, number of shards)."""
    shards = draw(st.integers(min_shards, 5))
    samples = st.tuples(st.integers(-1, shards - 1), st.integers(0, 4))
    drawn = draw(st.lists(samples, max_size=40))
    return [shard for shard, _ in drawn], [skips for _, skips in drawn], shards


def move(shard_of, skips, shards, fraction, *, min_skips=0, ties="index", seed=0):
    """`redistribute` on lists."""
    new, moved = redistribute(
        torch.tensor(shard_of, dtype=torch.int64),
        torch.tensor(skips, dtype=torch.int64),
        shards,
        fraction,
        min_skips,
        ties,
        seed,
    )
    return new.tolist(), moved.tolist()


def authors_exchange(shard_of: list[int], skips: list[int], shards: int, fraction: float):
    """The exchange as in the authors' code, with lists of samples passed on shard after shard.

    A receiver gets samples before its own turn comes, but counts only what it had at first.
    """
    samples = [[i for i, s in enumerate(shard_of) if s == k] for k in range(shards)]
    counts = [[skips[i] for i in members] for members in samples]
    moved = []
    for k in range(shards):
        top = int(len(counts[k]) * fraction)
        values = sorted(counts[k], reverse=True)[:top]
        positions = [p for p, count in enumerate(counts[k]) if count in values][:top]
        samples[(k + 1) % shards] += [samples[k][p] for p in positions]
        samples[k] = [sample for p, sample in enumerate(samples[k]) if p not in positions]
        moved.append(len(positions))
    result = list(shard_of)
    for k, members in enumerate(samples):
        for sample in members:
            result[sample] = k
    return result, moved


@settings(deadline=None)
@given(populations(min_shards=2), FRACTIONS)
def test_order_of_positions_moves_what_the_authors_exchange_moves(population, fraction):
    assert move(*population, fraction) == authors_exchange(*population, fraction)


@settings(deadline=None)
@given(populations(), FRACTIONS, st.integers(0, 3), TIES, st.integers(0, 2**63 - 1))
def test_no_sample_is_lost_or_doubled_and_each_goes_one_shard_on_or_stays(
    population, fraction, min_skips, ties, seed
):
    shard_of, skips, shards = population
    new, moved = move(*population, fraction, min_skips=min_skips, ties=ties, seed=seed)
    assert len(new) == len(shard_of)
    leaving = [0] * shards
    for sample, (before, after) in enumerate(zip(shard_of, new, strict=True)):
        if after == before:
            continue
        assert before >= 0
        assert after == (before + 1) % shards
        assert skips[sample] >= min_skips
        leaving[before] += 1
    assert moved == leaving
    assert all(n <= int(shard_of.count(k) * fraction) for k, n in enumerate(moved))


@settings(deadline=None)
@given(populations(min_shards=2), FRACTIONS, st.integers(0, 3), st.integers(0, 2**63 - 1))
def test_order_by_seed_moves_the_most_skipped_and_as_many_as_are_due(
    population, fraction, min_skips, seed
):
    shard_of, skips, shards = population
    new, moved = move(*population, fraction, min_skips=min_skips, ties="seed", seed=seed)
    for k in range(shards):
        members = [i for i, shard in enumerate(shard_of) if shard == k]
        eligible = [i for i in members if skips[i] >= min_skips]
        movers = [i for i in members if new[i] != k]
        due = min(int(len(members) * fraction), len(eligible))
        assert moved[k] == len(movers) == due
        most = sorted((skips[i] for i in eligible), reverse=True)[:due]
        assert sorted((skips[i] for i in movers), reverse=True) == most


def test_order_of_positions_lets_a_low_count_displace_a_high_one():
    shard_of = [0] * 8 + [1] * 8
    skips = [1, 1, 0, 9, 0, 0, 0, 0] + [0] * 8
    # The two largest counts are 9 and 1; three samples have one of them; the first two go.
    new, moved = move(shard_of, skips, 2, 0.25)
    assert [i for i in range(8) if new[i] == 1] == [0, 1]
    # No sample of shard 1 was ever skipped: its first two go all the same.
    assert [i for i in range(8, 16) if new[i] == 0] == [8, 9]
    assert moved == [2, 2]
    by_seed, moved = move(shard_of, skips, 2, 0.25, min_skips=1, ties="seed")
    assert by_seed[3] == 1
    assert sum(by_seed[:2]) == 1
    assert moved == [2, 0]


def test_ties_by_seed_depend_on_the_seed_alone():
    shard_of, skips = [0, 1] * 40, [2] * 80
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        first = move(shard_of, skips, 2, 0.25, min_skips=1, ties="seed", seed=seed)
        torch.manual_seed(100)
        state = torch.get_rng_state()
        again = move(shard_of, skips, 2, 0.25, min_skips=1, ties="seed", seed=seed)
        assert first == again
        assert torch.equal(torch.get_rng_state(), state)
        results.append(first[0])
    assert len({tuple(new) for new in results}) == 4


def test_ties_by_seed_treat_all_positions_alike():
    times = torch.zeros(8)
    for seed in range(400):
        new, _ = move([0] * 8, [1] * 8, 2, 0.25, min_skips=1, ties="seed", seed=seed)
        times += torch.tensor(new)
    # Each of 8 goes with chance 1/4: 100 of 400 times, standard deviation 8.7.
    assert times.sum() == 800
    assert ((times - 100).abs() < 45).all()


@pytest.mark.parametrize("ties", ["seed", "index"])
def test_with_one_shard_nothing_moves(ties):
    assert move([0, 0, 0, -1], [3, 2, 1, 9], 1, 0.5, ties=ties) == ([0, 0, 0, -1], [0])


@pytest.mark.parametrize("ties", ["seed", "index"])
def test_the_old_membership_is_left_as_it_was(ties):
    shard_of, skips = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 0, 0, 4])
    new, moved = redistribute(shard_of, skips, 2, 0.5, 1, ties, 0)
    assert new.tolist() == [1, 0, 1, 0]
    assert moved.tolist() == [1, 1]
    assert (new.dtype, moved.dtype) == (torch.int64, torch.int64)
    assert shard_of.tolist() == [0, 0, 1, 1]
    assert skips.tolist() == [3, 0, 0, 4]
