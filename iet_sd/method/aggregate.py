"""Iterative ensemble training: the proxies' weights are averaged, theta = sum_k w_k theta_k.

Liu, Guan et al. 2024 (arXiv 2407.15328). Means are streamed: models are added one at a time, on
several processes if need be, whose totals are then summed. Letters in shapes: K models, r rank.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor


def shard_weights(sizes: Sequence[int], mode: Literal["size", "uniform"]) -> list[float]:
    """Weight of each proxy: |D_k| / N, or 1 / K. They sum to 1."""
    if mode == "uniform":
        return [1 / len(sizes)] * len(sizes)
    return [size / sum(sizes) for size in sizes]


class StreamingMean:
    """A weighted sum of named tensors of K models, in float32 on the CPU, whatever K is."""

    def __init__(self, weight_K: Sequence[float]) -> None:
        """``weight_K``: the weights of the models, which sum to 1."""
        self.weight_K = weight_K
        self.totals: dict[str, Tensor] = {}
        """What was added so far: to be summed over processes, or kept and put back."""

    def add(self, model: int, tensors: Mapping[str, Tensor]) -> None:
        """Add model ``model``; names and shapes are those of the first one added."""
        for name, tensor in tensors.items():
            # Product, then sum: a fused multiply-add would round differently with the order.
            term = tensor.detach().to("cpu", torch.float32) * self.weight_K[model]
            if name in self.totals:
                self.totals[name] += term
            else:
                self.totals[name] = term

    def result(self) -> dict[str, Tensor]:
        """The mean, once all models were added; not a copy."""
        return self.totals

    def gaps(self) -> dict[str, float]:
        """What is lost by averaging, by name; nothing here (see `AdapterMean`)."""
        return {}


class AdapterMean(StreamingMean):
    """The mean of low-rank adapters: of their factors A and B apart, or of the products BA.

    Averaging A and B apart is not averaging what the adapters do, BA: the mean of products has
    terms that the product of means lacks. With ``refactor`` the mean of BA is cut to the rank of
    the factors by SVD (Eckart-Young); without, it only serves to say how far off the factors are.

    sum_k w_k B_k A_k is kept as [w_1 B_1 ... w_K B_K] [A_1; ...; A_K], each model in a place of
    its own, or as one (out, in) matrix where that is smaller.
    """

    def __init__(
        self, weight_K: Sequence[float], pairs: Sequence[tuple[str, str]], refactor: bool
    ) -> None:
        """``pairs``: the names of A, (r, in), and B, (out, r), of every adapter."""
        super().__init__(weight_K)
        self._pairs = list(pairs)
        self._refactor = refactor

    def add(self, model: int, tensors: Mapping[str, Tensor]) -> None:
        """Add factors and products of model ``model``."""
        super().add(model, tensors)
        models, weight = len(self.weight_K), self.weight_K[model]
        for a, b in self._pairs:
            A, B = _matrix(tensors[a]), _matrix(tensors[b])
            if models * (A.numel() + B.numel()) < len(B) * A.shape[1]:
                for name, factor in ((f"{a}/models", A), (f"{b}/models", B * weight)):
                    if name not in self.totals:
                        self.totals[name] = factor.new_zeros(models, *factor.shape)
                    self.totals[name][model] = factor
            else:
                super().add(model, {f"{b}/product": B @ A})

    def result(self) -> dict[str, Tensor]:
        """The averaged adapters. Names in no pair are plain means."""
        kept = ("/models", "/product")
        averaged = {name: t for name, t in self.totals.items() if not name.endswith(kept)}
        if self._refactor:
            for a, b in self._pairs:
                averaged[a], averaged[b] = _refactor(*self._product(a, b), averaged[a], averaged[b])
        return averaged

    def gaps(self) -> dict[str, float]:
        """`factor_gap` of every pair, by the name of its B."""
        return {
            b: factor_gap(*self._product(a, b), self.totals[a], self.totals[b])
            for a, b in self._pairs
        }

    def _product(self, a: str, b: str) -> tuple[Tensor, Tensor | None]:
        """The mean of BA: two matrices whose product it is, or one and None."""
        if (dense := self.totals.get(f"{b}/product")) is not None:
            return dense, None
        A_Kri, B_Kor = self.totals[f"{a}/models"], self.totals[f"{b}/models"]
        return B_Kor.transpose(0, 1).flatten(1), A_Kri.flatten(0, 1)


class MomentMean(StreamingMean):
    """The mean of AdamW's moments, by names ``PARAMETER/exp_avg``, ``/exp_avg_sq`` and ``/step``.

    A running mean of decay beta has after t updates the weight 1 - beta^t, by which AdamW divides
    it (Kingma & Ba 2015). So of models that differ in t the sums and the weights are averaged
    apart, m = sum_k w_k m_k / sum_k w_k (1 - beta^t_k), and brought to the rounded mean of t.
    """

    def __init__(self, weight_K: Sequence[float], betas: tuple[float, float]) -> None:
        """``betas``: the decays of the first and second moment."""
        super().__init__(weight_K)
        self._betas = dict(zip(("exp_avg", "exp_avg_sq"), betas, strict=True))

    def add(self, model: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the moments of model ``model``."""
        weights = {
            f"{name}/weight": 1 - beta ** tensors[step].double()
            for name, step, beta in self._moments(tensors)
        }
        super().add(model, {**tensors, **weights})

    def result(self) -> dict[str, Tensor]:
        """The averaged moments, after 0 steps if no model made any; uses the totals up."""
        averaged = {}
        for name, step, beta in self._moments(self.totals):
            steps, weight = self.totals[step], self.totals[f"{name}/weight"]
            steps = steps.round().clamp(min=1) if steps > 0 else steps
            share = (1 - beta ** steps.double()) / weight if weight > 0 else weight
            averaged |= {name: self.totals[name].mul_(share.float()), step: steps}
        return averaged

    def _moments(self, names: Iterable[str]) -> Iterator[tuple[str, str, float]]:
        """Name, name of the step count, and decay of every moment."""
        for name in names:
            parameter, _, moment = name.rpartition("/")
            if moment in self._betas:
                yield name, f"{parameter}/step", self._betas[moment]


def outer_step(
    before: Mapping[str, Tensor],
    average: dict[str, Tensor],
    velocity: dict[str, Tensor],
    learning_rate: float,
    momentum: float,
) -> None:
    """SGD with Nesterov momentum on what a round changed, as in DiLoCo (arXiv 2311.08105).

    With the gradient g = before - average: v <- momentum v + g, and the new weights are before -
    learning_rate (g + momentum v). They take the place of those in ``average``, which stay as they
    are at rate 1 without momentum. ``velocity`` holds v by name, empty at first, and is updated.
    """
    if learning_rate == 1 and momentum == 0:
        return
    for name, start in before.items():
        step = start - average[name]
        if momentum:
            v = velocity.setdefault(name, torch.zeros_like(step)).mul_(momentum).add_(step)
            step.add_(v, alpha=momentum)
        average[name] = start - learning_rate * step


def factor_gap(left: Tensor, right: Tensor | None, mean_A: Tensor, mean_B: Tensor) -> float:
    """||P - mean(B) mean(A)|| / ||P||, Frobenius, with P the mean of BA; 0 at P = 0.

    P is ``left right``, or ``left`` alone.
    """
    A, B = _matrix(mean_A), _matrix(mean_B)
    if right is None:
        difference = left - B @ A, None
    else:
        difference = torch.cat([left, -B], 1), torch.cat([right, A])
    norm = _norm(left, right)
    return _norm(*difference) / norm if norm > 0 else 0.0


def _norm(left: Tensor, right: Tensor | None) -> float:
    """The norm of ``left right``, by the triangles of their QR factors and not by the product."""
    if right is None:
        return left.norm().item()
    one, other = (torch.linalg.qr(m.double(), mode="r").R for m in (left, right.T))
    return (one @ other.T).norm().item()


def _svd(left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``left right``, by that of the product of triangles."""
    if right is None:
        return torch.linalg.svd(left, full_matrices=False)
    (U, one), (V, other) = (torch.linalg.qr(m.double()) for m in (left, right.T))
    inner_U, values, inner_V = torch.linalg.svd(one @ other.T, full_matrices=False)
    return U @ inner_U, values, inner_V @ V.T


def _matrix(factor: Tensor) -> Tensor:
    """A factor as a float32 matrix on the CPU; those of convolutions are flattened."""
    return factor.detach().to("cpu", torch.float32).flatten(1)


def _refactor(
    left: Tensor, right: Tensor | None, mean_A: Tensor, mean_B: Tensor
) -> tuple[Tensor, Tensor]:
    """A and B of the factors' shapes with BA the best approximation of ``left right``.

    A gets orthogonal rows at the scale of the mean A, and B the singular values: so A never
    shrinks with B, which starts at 0, and an adapter that has not moved can still learn. Of all
    rotations that leave BA as it is, the one nearest to the mean A (orthogonal Procrustes) is
    taken, so that the optimizer's moments of A and B stay about right.
    """
    U, values, V = _svd(left, right)
    if not values[0] > 0:
        return mean_A, torch.zeros_like(mean_B)
    rank = min(mean_A.shape[0], len(values))
    scale = mean_A.norm() / mean_A.shape[0] ** 0.5
    # Rows of A beyond the matrix's own rank stay as they are; B has zeros for them.
    A, B = mean_A.flatten(1).clone(), torch.zeros_like(mean_B.flatten(1))
    A[:rank] = scale * V[:rank]
    B[:, :rank] = U[:, :rank] * values[:rank] / scale
    turn_left, _, turn_right = torch.linalg.svd(mean_A.flatten(1) @ A.T)
    rotation = turn_left @ turn_right
    A, B = rotation @ A, B @ rotation.T
    return A.view_as(mean_A), B.view_as(mean_B)
