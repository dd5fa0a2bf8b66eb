"""Iterative ensemble training: the proxies' weights are averaged, theta = sum_k w_k theta_k.

Liu, Guan et al. 2024 (arXiv 2407.15328). Streaming: a mean holds one model, however many proxies
are added. Low-rank factors can be averaged apart, or as their product (see `StreamingProduct`).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor


def shard_weights(sizes: Sequence[int], mode: Literal["size", "uniform"]) -> list[float]:
    """Weight of each proxy: |D_k| / N, or 1 / K. They sum to 1."""
    if mode == "uniform":
        return [1 / len(sizes)] * len(sizes)
    return [size / sum(sizes) for size in sizes]


class StreamingMean:
    """A weighted sum of named tensors, in float32, added one model at a time."""

    def __init__(self) -> None:
        """Start empty; the first model added fixes names and shapes."""
        self._total: dict[str, Tensor] = {}

    def add(self, weights: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times the tensors of one model."""
        for name, tensor in weights.items():
            # Product, then sum: a fused multiply-add would round differently with the order.
            term = tensor.detach().float() * weight
            if name in self._total:
                self._total[name] += term
            else:
                self._total[name] = term

    def result(self) -> dict[str, Tensor]:
        """The sum of all that was added, not a copy; a mean if the weights summed to 1."""
        return self._total

    def totals(self) -> list[dict[str, Tensor]]:
        """What was added so far: to be summed over processes, or kept and given to `load`."""
        return [self._total]

    def load(self, totals: Sequence[dict[str, Tensor]]) -> None:
        """Go on from what `totals` gave."""
        (self._total,) = totals


class StreamingProduct:
    """The mean of low-rank products BA, factored again to the same rank.

    Averaging A and B apart is not averaging what the adapters do, BA: the mean of products has
    terms that the product of means lacks. Here BA is averaged and cut to rank r by SVD
    (Eckart-Young). Costs the full (out, in) matrix of each pair while adding.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        """``pairs``: the names of A, (r, in), and B, (out, r), of every adapter."""
        self._pairs = list(pairs)
        self._factors = StreamingMean()
        self._products = StreamingMean()

    def add(self, weights: Mapping[str, Tensor], weight: float) -> None:
        """Add ``weight`` times the products of one model."""
        self._factors.add(weights, weight)
        products = {b: _product(weights[a], weights[b]) for a, b in self._pairs}
        self._products.add(products, weight)

    def totals(self) -> list[dict[str, Tensor]]:
        """What was added so far, by factors and by products (see `StreamingMean.totals`)."""
        return [self._factors.result(), self._products.result()]

    def load(self, totals: Sequence[dict[str, Tensor]]) -> None:
        """Go on from what `totals` gave."""
        factors, products = totals
        self._factors.load([factors])
        self._products.load([products])

    def gaps(self) -> dict[str, float]:
        """`factor_gap` of every pair, by the name of its B."""
        factors, products = self.totals()
        return {b: factor_gap(products[b], factors[a], factors[b]) for a, b in self._pairs}

    def result(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The averaged weights, and `gaps`. Names in no pair are plain means."""
        factors, products = self.totals()
        averaged = dict(factors)
        for a, b in self._pairs:
            averaged[a], averaged[b] = _refactor(products[b], factors[a], factors[b])
        return averaged, self.gaps()


def factor_gap(mean_product: Tensor, mean_A: Tensor, mean_B: Tensor) -> float:
    """||mean(BA) - mean(B) mean(A)|| / ||mean(BA)||, Frobenius; 0 where the mean product is 0."""
    norm = mean_product.norm()
    gap = (mean_product - _product(mean_A, mean_B)).norm()
    return (gap / norm).item() if norm > 0 else 0.0


def _product(A: Tensor, B: Tensor) -> Tensor:
    """B A as a matrix (out, in); convolution factors are flattened to matrices first."""
    return B.detach().float().flatten(1) @ A.detach().float().flatten(1)


def _refactor(product: Tensor, mean_A: Tensor, mean_B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of the factors' shapes with BA the best approximation of ``product``.

    A gets orthogonal rows at the scale of the mean A, and B the singular values: so A never
    shrinks with B, which starts at 0, and an adapter that has not moved can still learn. Of all
    rotations that leave BA as it is, the one nearest to the mean A (orthogonal Procrustes) is
    taken, so that the optimizer's moments of A and B stay about right.
    """
    if not product.any():
        return mean_A, torch.zeros_like(mean_B)
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    rank = min(mean_A.shape[0], len(values))
    scale = mean_A.norm() / mean_A.shape[0] ** 0.5
    # Rows of A beyond the matrix's own rank stay as they are; B has zeros for them.
    A, B = mean_A.flatten(1).clone(), torch.zeros_like(mean_B.flatten(1))
    A[:rank] = scale * right[:rank]
    B[:, :rank] = left[:, :rank] * values[:rank] / scale
    left, _, right = torch.linalg.svd(mean_A.flatten(1) @ A.T)
    rotation = left @ right
    A, B = rotation @ A, B @ rotation.T
    return A.view_as(mean_A), B.view_as(mean_B)
