"""Which sample belongs to which shard, and the order in which a shard visits its samples.

Letters in shapes: N samples, K shards.
"""

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iet_sd.errors import UserError
from iet_sd.seeding import seed_for


@dataclass(frozen=True)
class Visit:
    """One look at one sample; all that is random about it follows from ``seed``."""

    index: int
    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for the draws of one purpose."""
        return torch.Generator().manual_seed(seed_for(self.seed, purpose))


def split(
    groups: Sequence[str], num_shards: int, seed: int, mode: Literal["seeded", "contiguous"]
) -> Tensor:
    """The shard of every sample: (N,) int64, in 0 to K - 1, or -1 for in no shard.

    seeded: every sample has a shard, equal ``groups`` share one, and shard sizes differ by no more
    than the largest group. Depends on the seed and the groups, not on the order of the samples.
    contiguous: slices of N // K in the order of the samples; the remainder is in no shard.

    groups: (N,) one name a sample.
    Errors: `UserError` if there is nothing for some shard.
    """
    if len(groups) < num_shards:
        raise UserError(
            f"{_count(len(groups), 'sample')} cannot fill {num_shards} shards: lower --num_shards, "
            "or use more images."
        )
    if mode == "contiguous":
        shard_of = torch.arange(len(groups)) // (len(groups) // num_shards)
        return shard_of.where(shard_of < num_shards, -1)
    shard_of_group = _spread(Counter(groups), num_shards, seed)
    return torch.tensor([shard_of_group[group] for group in groups])


def visits(
    seed: int, round: int, shard: int, members: Sequence[int], start: int = 0
) -> Iterator[Visit]:
    """Endless visits to ``members``, all once an epoch, each epoch in a new order.

    Depends on (seed, round, shard) and ``members`` only, not on their order. A member that is
    there several times is visited so often.

    start: visits to skip, at no cost.
    """
    members = sorted(members)
    assert members, f"shard {shard} is empty"
    first_epoch, offset = divmod(start, len(members))
    for epoch in itertools.count(first_epoch):
        order = _order(seed, round, shard, epoch, len(members))
        for place in range(offset if epoch == first_epoch else 0, len(members)):
            position = epoch * len(members) + place
            yield Visit(members[order[place]], _visit_seed(seed, round, shard, position))


def batches(
    seed: int,
    round: int,
    shard: int,
    members: Sequence[int],
    batch_size: int,
    size_of: Sequence[Hashable],
    start: int = 0,
) -> Iterator[list[Visit]]:
    """Endless batches of visits, each batch of one size of image.

    If all members are of one size, batches are the next ``batch_size`` of `visits` each. If not,
    an epoch has the same visits, cut into batches by size, in an order by seed; the last batch of
    each size may be smaller, so that a rare size is not left waiting. Depends on the same as
    `visits`, and on ``size_of`` the members.

    size_of: (N,) of all samples. start: batches to skip, at no cost.
    """
    members = sorted(members)
    if len({size_of[index] for index in members}) <= 1:
        order = visits(seed, round, shard, members, start * batch_size)
        while True:
            yield list(itertools.islice(order, batch_size))
    first_epoch, offset = divmod(start, batches_per_epoch(members, batch_size, size_of))
    for epoch in itertools.count(first_epoch):
        order = _order(seed, round, shard, epoch, len(members))
        places = defaultdict(list)
        for place, member in enumerate(order):
            places[size_of[members[member]]].append(place)
        cut = [
            same[first : first + batch_size]
            for same in places.values()
            for first in range(0, len(same), batch_size)
        ]
        numbers = _permutation(len(cut), seed_for(seed, "batches", round, shard, epoch))
        for number in numbers[offset if epoch == first_epoch else 0 :]:
            yield [
                Visit(
                    members[order[place]],
                    _visit_seed(seed, round, shard, epoch * len(members) + place),
                )
                for place in cut[number]
            ]


def batches_per_epoch(members: Sequence[int], batch_size: int, size_of: Sequence[Hashable]) -> int:
    """How many batches of one size each hold all ``members`` once."""
    counts = Counter(size_of[index] for index in members)
    return sum(math.ceil(count / batch_size) for count in counts.values())


def _order(seed: int, round: int, shard: int, epoch: int, length: int) -> list[int]:
    return _permutation(length, seed_for(seed, "order", round, shard, epoch))


def _visit_seed(seed: int, round: int, shard: int, position: int) -> int:
    return seed_for(seed, "visit", round, shard, position)


def _spread(sizes: Counter[str], num_shards: int, seed: int) -> dict[str, int]:
    """The shard of every group: the largest first, each to the shard that is smallest so far."""
    if len(sizes) < num_shards:
        raise UserError(
            f"{_count(len(sizes), 'group')} of near-duplicate images cannot fill {num_shards} "
            "shards, since a group stays in one shard: lower --num_shards, or use more images."
        )
    names = sorted(sizes)
    order = _permutation(len(names), seed_for(seed, "shards", "groups"))
    ties = _permutation(num_shards, seed_for(seed, "shards", "ties"))
    # The entries (size, tie, shard) of a heap come out smallest first.
    shards = sorted((0, tie, shard) for shard, tie in enumerate(ties))
    shard_of = {}
    for name in sorted((names[i] for i in order), key=lambda name: -sizes[name]):
        size, tie, shard = shards[0]
        shard_of[name] = shard
        heapq.heapreplace(shards, (size + sizes[name], tie, shard))
    return shard_of


def _permutation(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
