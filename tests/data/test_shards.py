from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iet_sd.data.shards import split, visits
from iet_sd.errors import UserError
from iet_sd.seeding import seed_for

GROUPS = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=60)


def take(number, *address, **options):
    return list(islice(visits(*address, **options), number))


@settings(deadline=None)
@given(groups=GROUPS, num_shards=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_seeded_split(groups, num_shards, seed):
    if len(set(groups)) < num_shards:
        with pytest.raises(UserError, match="--num_shards"):
            split(groups, num_shards, seed, "seeded")
        return
    shard_of = split(groups, num_shards, seed, "seeded")
    assert shard_of.shape == (len(groups),)
    assert shard_of.dtype == torch.int64
    # Every sample is in one shard, groups are whole, and no shard is empty or much too large.
    assert set(shard_of.tolist()) == set(range(num_shards))
    assert len(set(zip(groups, shard_of.tolist(), strict=True))) == len(set(groups))
    sizes = shard_of.bincount(minlength=num_shards)
    assert sizes.max() - sizes.min() <= max(Counter(groups).values())


def test_seeded_split_depends_on_seed_and_groups_only():
    groups = [f"g{i // 2}" for i in range(40)]
    one = split(groups, 4, 0, "seeded")
    assert torch.equal(one, split(groups, 4, 0, "seeded"))
    assert torch.equal(one.flip(0), split(groups[::-1], 4, 0, "seeded"))
    assert not torch.equal(one, split(groups, 4, 1, "seeded"))


def test_ties_do_not_favour_the_first_shards():
    counts = sum(
        split(list("abcde"), 4, seed, "seeded").bincount(minlength=4) for seed in range(80)
    )
    # Five samples in four shards: the extra one falls to each shard 20 of 80 times.
    assert counts.min() > 80 + 5


def test_contiguous_split_leaves_out_the_remainder():
    expected = [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1]
    assert split(["same"] * 11, 3, 0, "contiguous").tolist() == expected


@pytest.mark.parametrize("mode", ["seeded", "contiguous"])
def test_one_image_for_four_shards(mode):
    with pytest.raises(UserError, match=r"1 sample cannot fill 4 shards: lower --num_shards"):
        split(["a"], 4, 0, mode)


def test_every_epoch_visits_all_members_in_a_new_order():
    members = [3, 5, 8, 13, 21, 34, 55]
    order = [visit.index for visit in take(21, 0, 0, 0, members)]
    epochs = [order[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == members for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_of_visits_are_addresses():
    seeds = [visit.seed for visit in take(9, 7, 2, 1, [4, 5, 6])]
    assert seeds == [seed_for(7, "visit", 2, 1, position) for position in range(9)]


@pytest.mark.parametrize("start", range(12))
def test_start_skips_visits(start):
    members = range(5)
    assert take(20, 1, 2, 3, members)[start:] == take(20 - start, 1, 2, 3, members, start=start)


def test_start_costs_nothing():
    (visit,) = take(1, 0, 0, 0, [1, 2], start=10**15)
    assert visit.seed == seed_for(0, "visit", 0, 0, 10**15)


def test_order_depends_on_seed_round_shard_and_members_only():
    members = list(range(20))
    order = take(40, 0, 1, 2, members)
    assert order == take(40, 0, 1, 2, members[::-1])
    for other in [(1, 1, 2), (0, 2, 2), (0, 1, 3)]:
        assert [v.index for v in order] != [v.index for v in take(40, *other, members)]
        assert not {v.seed for v in order} & {v.seed for v in take(40, *other, members)}
