from collections import Counter
from itertools import count, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iet_sd.data.shards import batches, batches_per_epoch, split, visits
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


# Batches of one size of image


@st.composite
def shards(draw):
    """Members of a shard, some several times, and the size of image of every sample."""
    number = draw(st.integers(1, 30))
    size_of = draw(st.lists(st.sampled_from("abcd"), min_size=number, max_size=number))
    members = draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=40))
    return members, size_of


def taken(number, members, size_of, batch_size, start=0, address=(0, 1, 2)):
    return list(islice(batches(*address, members, batch_size, size_of, start), number))


def naive_batches(address, members, batch_size, size_of):
    """Batch by batch: an epoch's visits in their order, dealt out to boxes, the boxes shuffled."""
    seed, round, shard = address
    order = visits(*address, members)
    for epoch in count():
        done, boxes = [], {}
        for visit in islice(order, len(members)):
            box = boxes.setdefault(size_of[visit.index], [])
            if not box:
                done.append((visit, box))
            box.append(visit)
            if len(box) == batch_size:
                del boxes[size_of[visit.index]]
        # As the library cuts them: sizes as they first come, the batches of a size in a row.
        firsts = list(dict.fromkeys(size_of[visit.index] for visit, _ in done))
        done.sort(key=lambda pair: firsts.index(size_of[pair[0].index]))
        generator = torch.Generator().manual_seed(seed_for(seed, "batches", round, shard, epoch))
        yield from (done[i][1] for i in torch.randperm(len(done), generator=generator).tolist())


@settings(deadline=None, max_examples=150)
@given(shard=shards(), batch_size=st.integers(1, 7))
def test_batches_are_those_of_a_naive_computation(shard, batch_size):
    members, size_of = shard
    found = taken(12, members, size_of, batch_size)
    if len({size_of[i] for i in members}) == 1:
        order = visits(0, 1, 2, members)
        expected = [list(islice(order, batch_size)) for _ in range(12)]
    else:
        expected = list(islice(naive_batches((0, 1, 2), members, batch_size, size_of), 12))
    assert found == expected


@settings(deadline=None, max_examples=150)
@given(shard=shards(), batch_size=st.integers(1, 7))
def test_an_epoch_of_batches_visits_every_member_as_often_as_it_is_there(shard, batch_size):
    members, size_of = shard
    several = len({size_of[i] for i in members}) > 1
    epochs = 3 if several else batch_size  # of one size, so many epochs are whole batches
    number = epochs * batches_per_epoch(members, batch_size, size_of) if several else len(members)
    found = taken(number, members, size_of, batch_size)
    assert all(len({size_of[v.index] for v in batch}) == 1 for batch in found)
    assert all(1 <= len(batch) <= batch_size for batch in found)
    flat = [visit for batch in found for visit in batch]
    # The very visits that there are without sizes, epoch by epoch.
    expected = list(islice(visits(0, 1, 2, members), len(flat)))
    for first in range(0, len(flat), len(members)):
        epoch = flat[first : first + len(members)]
        assert Counter(visit.index for visit in epoch) == Counter(members)
        assert set(epoch) == set(expected[first : first + len(members)])
    assert len(flat) == epochs * len(members)
    if several:
        sizes = Counter(size_of[i] for i in members)
        small = [batch for batch in found if len(batch) < batch_size]
        assert len(small) == epochs * sum(n % batch_size > 0 for n in sizes.values())


@settings(deadline=None, max_examples=150)
@given(shard=shards(), batch_size=st.integers(1, 7), start=st.integers(0, 60))
def test_start_skips_batches(shard, batch_size, start):
    members, size_of = shard
    found = taken(start + 5, members, size_of, batch_size)
    assert taken(5, members, size_of, batch_size, start) == found[start:]


def test_start_of_batches_costs_nothing():
    (batch,) = taken(1, [1, 2, 2, 3], "aabb", 2, start=3 * 10**14)
    assert {v.seed for v in batch} <= {
        seed_for(0, "visit", 1, 2, 4 * 10**14 + place) for place in range(4)
    }


def test_batches_depend_on_seed_round_shard_and_members_only():
    members, size_of = list(range(20)), "ab" * 10
    found = taken(20, members, size_of, 3)
    assert found == taken(20, members[::-1], size_of, 3)
    # What other samples there are, and how large, does not matter.
    assert found == taken(20, members, size_of + "cdcd", 3)
    for other in [(1, 1, 2), (0, 2, 2), (0, 1, 3)]:
        assert found != taken(20, members, size_of, 3, address=other)


def test_a_rare_size_is_not_left_to_the_end_of_an_epoch():
    size_of = ["common"] * 40 + ["rare"]
    places = [
        next(
            place
            for place, batch in enumerate(taken(11, range(41), size_of, 4, address=(seed, 1, 0)))
            if batch[0].index == 40
        )
        for seed in range(200)
    ]
    assert all(5 < places.count(place) < 40 for place in range(11))


def test_one_size_goes_on_from_one_epoch_to_the_next():
    found = taken(3, [0, 1, 2], "aaa", 2)
    assert [len(batch) for batch in found] == [2, 2, 2]
    assert [v for batch in found for v in batch] == take(6, 0, 1, 2, [0, 1, 2])
