"""Memory samples redistribute: the samples a shard skips most move on to the next shard.

Guan et al. 2025 (arXiv 2502.09434). Shapes: N samples of the data set, K shards.
"""

from typing import Literal

import torch
from torch import Tensor


def redistribute(
    shard_of_N: Tensor,
    skips_N: Tensor,
    num_shards: int,
    fraction: float,
    min_skips: int,
    ties: Literal["seed", "index"],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The top ``fraction`` of each shard by skip count goes from shard k to (k + 1) mod K.

    Only samples skipped at least ``min_skips`` times go. Membership is one number a sample (-1: in
    no shard), so none can be lost or doubled; all shards send by the membership before the move.
    The authors pass the ring one shard after another, with the same moves, since what just arrived
    is not sent on.

    Returns the new membership, int64 (N,), and how many left each shard, int64 (K,).
    """
    moved_K = torch.zeros(num_shards, dtype=torch.int64)
    if num_shards == 1:
        return shard_of_N.clone(), moved_K
    new_shard_of_N = shard_of_N.clone()
    generator = torch.Generator().manual_seed(seed)
    for shard in range(num_shards):
        members = (shard_of_N == shard).nonzero().flatten()
        top = int(len(members) * fraction)
        members = members[skips_N[members] >= min_skips]
        if ties == "seed":
            members = members[torch.randperm(len(members), generator=generator)]
        leaving = members[_top_by_count(skips_N[members], top, in_order=ties == "seed")]
        new_shard_of_N[leaving] = (shard + 1) % num_shards
        moved_K[shard] = len(leaving)
    return new_shard_of_N, moved_K


def _top_by_count(counts: Tensor, top: int, in_order: bool) -> Tensor:
    """Positions of the ``top`` largest counts; equal counts by position.

    Without ``in_order``, the authors' rule: of all positions whose count is among the ``top``
    largest values, the first ones, so that a low position can displace a higher count.
    """
    order = counts.argsort(descending=True, stable=True)[:top]
    if in_order:
        return order
    return torch.isin(counts, counts[order]).nonzero().flatten()[:top]
