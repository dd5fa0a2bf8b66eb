"""Anti-gradient control: a sample whose loss is abnormally low is memorized, so skip it.

Liu, Guan et al. 2024 (arXiv 2407.15328). A bank holds a running mean of the loss per timestep;
one bank a shard. Shapes: B samples of a batch, T bins of the bank.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Bank(NamedTuple):
    """Running means of the loss: ``value_T`` float32, starting at 0, and ``visits_T`` int64."""

    value_T: Tensor
    visits_T: Tensor


def empty_bank(bins: int) -> Bank:
    """A bank that no sample has visited."""
    return Bank(torch.zeros(bins), torch.zeros(bins, dtype=torch.int64))


def bin_of(timesteps_B: Tensor, bins: int, num_train_timesteps: int = 1000) -> Tensor:
    """Bins of equal width over the timesteps: int64 (B,)."""
    return timesteps_B * bins // num_train_timesteps


def reference(
    bank: Bank, bins_B: Tensor, decay: float, bias: Literal["raw", "corrected"]
) -> Tensor:
    """The mean loss b that each sample is compared with: float32 (B,), 0 where its bin is empty.

    A running mean that starts at 0 is too low by 1 - decay**visits: ``corrected`` divides by that
    (as Adam does, Kingma & Ba 2015), ``raw`` leaves it, so that the first ten visits are lenient.
    """
    value_B = bank.value_T[bins_B]
    if bias == "raw":
        return value_B
    weight_B = 1 - decay ** bank.visits_T[bins_B].to(value_B.dtype)
    return torch.where(weight_B > 0, value_B / weight_B, 0.0)


def keep_mask(loss_B: Tensor, reference_B: Tensor, threshold: float) -> Tensor:
    """Keep a sample iff its loss is at least ``threshold`` times the mean: bool (B,)."""
    return loss_B >= threshold * reference_B


def update_bank(bank: Bank, bins_B: Tensor, loss_B: Tensor, decay: float) -> Bank:
    """b <- decay b + (1 - decay) l for every sample in order, the skipped ones too.

    In closed form, equal to the loop: of m visits to a bin in one batch, the i-th has been decayed
    m - i times when the last is done.
    """
    same_BB = bins_B[:, None] == bins_B[None, :]
    later_B = same_BB.triu(1).sum(1)
    counts_T = torch.zeros_like(bank.visits_T).index_add_(0, bins_B, torch.ones_like(bins_B))
    share_B = (1 - decay) * decay ** later_B.to(loss_B.dtype)
    value_T = bank.value_T * decay ** counts_T.to(loss_B.dtype)
    return Bank(value_T.index_add(0, bins_B, share_B * loss_B), bank.visits_T + counts_T)
