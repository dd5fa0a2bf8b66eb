"""Comparing what two runs made."""

import torch


def equal(one, other):
    """Two sets of named tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
