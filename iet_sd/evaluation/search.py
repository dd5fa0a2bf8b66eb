"""Which rows of a block may be among the best of a tile's queries, by a fast and inexact search.

Two engines: a matrix product by numpy, and faiss. Both give scores but for rounding; by a bound on
that rounding no pair is left out that may belong to the best, so `iet_sd.evaluation.neighbours`,
which measures the pairs again, has the same result from either.

Shapes: Q queries, N rows of the block, D dimensions, K neighbours; P pairs (query, row); M rows
that faiss gives.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from iet_sd.errors import UserError

Metric = Literal["cosine", "l2"]
Engine = Literal["exact", "faiss"]
Pairs = tuple[np.ndarray, np.ndarray]
_UNIT_ROUNDOFF = 2.0**-24  # of float32
_MORE = 16  # rows that faiss is asked for beyond K


def check_engine(engine: Engine) -> None:
    """Errors: `UserError` if its package is not installed."""
    if engine == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UserError(
            "--neighbour_engine faiss needs the package faiss: pip install faiss-cpu, or use "
            "--neighbour_engine exact, which gives the same."
        )


@dataclass(frozen=True)
class Block:
    """Rows in memory: float32 (R, D), and their Euclidean norms, float64 (R,)."""

    rows: np.ndarray
    norms: np.ndarray

    def of(self, chosen: np.ndarray) -> "Block":
        """Some of the rows."""
        return Block(self.rows[chosen], self.norms[chosen])


@dataclass(frozen=True)
class Rules:
    """Which rows do not count for which queries; these are given by their places in the tile."""

    exclude_Q: np.ndarray | None
    groups: tuple[np.ndarray, np.ndarray] | None
    first: int
    start: int

    def apply(self, scores: np.ndarray, query_Q: np.ndarray, row: np.ndarray) -> None:
        """Set scores (Q, M) to infinity; ``row``: the base rows (M,), or other ones each (Q, M)."""
        query_Q, row = self.first + query_Q, self.start + row
        if self.exclude_Q is not None:
            scores[self.exclude_Q[query_Q, None] == row] = np.inf
        if self.groups is not None:
            scores[self.groups[0][query_Q, None] == self.groups[1][row]] = np.inf


class Product:
    """All scores of a tile at once, by a matrix product."""

    copies = 1
    """How often it holds the rows of the block, with the block itself."""

    def __init__(self, base: Block, metric: Metric) -> None:
        self.base = base
        self.metric = metric

    def pairs(
        self,
        views: Sequence[Block],
        k: int,
        worst_Q: np.ndarray,
        rules: Rules,
        chosen_Q: np.ndarray | None = None,
    ) -> Pairs:
        """Places of query and row, (P,) each, of what may belong to the best; rows ascend.

        ``views``: the queries as they are, and mirrored. ``worst_Q``: the score to beat.
        ``chosen_Q``: for these queries alone.
        """
        if chosen_Q is None:
            chosen_Q = np.arange(len(worst_Q))
        else:
            views = [view.of(chosen_Q) for view in views]
        scores = reduce(np.minimum, [_scores(view, self.base, self.metric) for view in views])
        rules.apply(scores, chosen_Q, np.arange(len(self.base.rows)))
        error_Q = np.max([_score_error(view, self.base, self.metric) for view in views], axis=0)
        query_P, row_P = _candidates(scores, error_Q, worst_Q[chosen_Q], k)
        return chosen_Q[query_P], row_P


class Faiss(Product):
    """The best rows of each query by faiss, a few more than are asked for.

    Where a row that it left out might still belong to the best, for its score is no lower than the
    last one given, the product is asked for that query.
    """

    copies = 3

    def __init__(self, base: Block, metric: Metric) -> None:
        super().__init__(base, metric)
        import faiss

        dims = base.rows.shape[1]
        self.index = faiss.IndexFlatIP(dims) if metric == "cosine" else faiss.IndexFlatL2(dims)
        self.index.add(self._scaled(base))

    def pairs(self, views: Sequence[Block], k: int, worst_Q: np.ndarray, rules: Rules) -> Pairs:
        """As that of `Product`."""
        count, few_Q, found = len(self.base.rows), np.zeros(len(worst_Q), dtype=bool), []
        for view in views:
            score_QM, row_QM = self._search(view, min(k + _MORE, count))
            last_Q = score_QM[:, -1].copy()
            rules.apply(score_QM, np.arange(len(worst_Q)), row_QM)
            error_Q = _score_error(view, self.base, self.metric)
            enough = score_QM.shape[1] >= k
            kth_Q = np.partition(score_QM, k - 1, axis=1)[:, k - 1] if enough else np.inf
            limit_Q = np.minimum(worst_Q + error_Q, kth_Q + 2 * error_Q).astype(np.float32)
            limit_Q = np.nextafter(limit_Q, np.float32(np.inf))
            if row_QM.shape[1] < count:
                few_Q |= last_Q <= limit_Q
            # Strictly, so that none of infinite score is among them.
            query_P, place_P = np.nonzero(score_QM < limit_Q[:, None])
            found.append(np.stack([query_P, row_QM[query_P, place_P]]))
        pairs = np.concatenate(found, axis=1)
        pairs = [pairs[:, ~few_Q[pairs[0]]]]
        if few_Q.any():
            more = super().pairs(views, k, worst_Q, rules, np.flatnonzero(few_Q))
            pairs.append(np.stack(more))
        # Each pair once, though both views may give it; rows ascend.
        query_P, row_P = np.unique(np.concatenate(pairs, axis=1), axis=1)
        return query_P, row_P

    def _search(self, view: Block, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores as those of the product, ascending, and rows: (Q, M) each."""
        value_QM, row_QM = self.index.search(self._scaled(view), count)
        return (-value_QM if self.metric == "cosine" else value_QM / 2), row_QM

    def _scaled(self, block: Block) -> np.ndarray:
        if self.metric == "l2":
            return block.rows
        return block.rows * _inverse(block.norms)[:, None]


SEARCHES = {"exact": Product, "faiss": Faiss}


def as_score(distance_Q: np.ndarray, metric: Metric) -> np.ndarray:
    """What the search calls a distance."""
    return distance_Q if metric == "cosine" else distance_Q**2 / 2


def _scores(queries: Block, base: Block, metric: Metric) -> np.ndarray:
    """Minus the cosine similarity, or half the squared distance, but for rounding: (Q, N)."""
    if metric == "cosine":
        scores = (queries.rows * -_inverse(queries.norms)[:, None]) @ base.rows.T
        scores *= _inverse(base.norms)
        return scores
    scores = queries.rows @ base.rows.T
    np.subtract((base.norms**2 / 2).astype(np.float32), scores, out=scores)
    scores += (queries.norms**2 / 2).astype(np.float32)[:, None]
    return scores


def _inverse(norms: np.ndarray) -> np.ndarray:
    """1 / norm, 0 for a row of zeros, in float32."""
    return np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0).astype(np.float32)


def _score_error(queries: Block, base: Block, metric: Metric) -> np.ndarray:
    """How far `_scores` can be off, by query: float64 (Q,).

    A sum of D products is off by at most D u |a||b| (Higham 2002, section 3.1). For long rows the
    growth is as sqrt(D) (Higham & Mary 2019), taken with a factor of 64.
    """
    dims = base.rows.shape[1]
    relative = (min(dims, 64 * dims**0.5) + 8) * _UNIT_ROUNDOFF
    if metric == "cosine":
        return relative * (queries.norms > 0)
    return relative * (queries.norms + base.norms.max()) ** 2 / 2


def _candidates(
    scores: np.ndarray, error_Q: np.ndarray, worst_Q: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a tile that may belong to the best: positions of query and row, (P,) each.

    ``worst_Q``: the score to beat. At equal distance the earlier row stays, hence "below".
    """
    limit_Q = (worst_Q + error_Q).astype(np.float32)
    near = scores < limit_Q[:, None]
    if np.count_nonzero(near) > 2 * k * len(scores):
        # Many beat what was found before, as at the start: only the tile's own best can stay.
        own_Q = np.partition(scores, k - 1, axis=1)[:, k - 1] + 2 * error_Q
        limit_Q = np.minimum(limit_Q, np.nextafter(own_Q.astype(np.float32), np.float32(np.inf)))
        near = scores < limit_Q[:, None]
    return np.divmod(np.flatnonzero(near), near.shape[1])  # np.nonzero, but faster
