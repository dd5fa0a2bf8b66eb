"""Which sample belongs to which shard, and the order in which a shard visits its samples.

Letters in shapes: N samples, K shards.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
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

    Depends on (seed, round, shard) and the set of members only.

    start: visits to skip, at no cost.
    """
    members = sorted(members)
    assert members, f"shard {shard} is empty"
    first_epoch, offset = divmod(start, len(members))
    for epoch in itertools.count(first_epoch):
        order = _permutation(len(members), seed_for(seed, "order", round, shard, epoch))
        for place in range(offset if epoch == first_epoch else 0, len(members)):
            position = epoch * len(members) + place
            yield Visit(members[order[place]], seed_for(seed, "visit", round, shard, position))


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
