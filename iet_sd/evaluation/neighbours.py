"""Exact nearest neighbours of every query, tile by tile, in memory that the base does not enlarge.

A matrix product, or faiss, gives the distances of a tile but for rounding. The pairs which, by a
bound on that rounding, may belong to the best are measured again directly. So a copy is at distance
0, ties are ties, and the result does not depend on the tiling; neither of the two promises these.

Shapes: Q queries, N base rows, D dimensions, K neighbours; P pairs (query, row) measured directly;
V views of the queries (as they are, mirrored).
"""

import mmap
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from iet_sd.errors import UserError
from iet_sd.evaluation.search import SEARCHES, Block, Engine, Metric, Rules, as_score

_TILE_QUERIES = 256
_BYTES_OF_PAIR = 100  # of a tile: its scores, and the sorting if every pair must be measured
_MIN_NORM, _MAX_NORM = 1e-18, 1e18  # beyond, squares in float32 vanish or overflow


@dataclass(frozen=True)
class Neighbours:
    """The K best base rows of each query, best first; of equal values, the lower row first."""

    value_QK: np.ndarray  # float32: cosine similarity (descending) or Euclidean distance
    index_QK: np.ndarray  # int64: row of the base
    flipped_QK: np.ndarray  # bool: found through the mirrored query


def nearest(
    queries_QD: np.ndarray,
    base_ND: np.ndarray,
    k: int = 1,
    metric: Metric = "cosine",
    *,
    flipped_QD: np.ndarray | None = None,
    exclude_Q: np.ndarray | None = None,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    memory_bytes: int = 256 * 2**20,
    progress: str | None = None,
    engine: Engine = "exact",
) -> Neighbours:
    """The ``k`` rows of the base that are most similar to each query.

    Queries and base are float arrays, read as float32; either may be a read-only memmap larger than
    memory. ``flipped_QD``: the mirrored queries; a row counts once, by the better view. Rows that
    do not count for a query: ``exclude_Q[q]`` (int, -1: none), and those whose group is the query's
    (``groups``: ints (Q,) and (N,)). Cosine similarity to zeros (a norm below 1e-18) is 0.
    ``memory_bytes`` bounds what is held beside arguments and result; ``progress`` names a bar.
    ``engine`` faiss, an optional package, gives the same result.
    Errors: `UserError` for values that are not finite, or fewer than ``k`` rows that count.
    """
    views_VQD = [queries_QD] if flipped_QD is None else [queries_QD, flipped_QD]
    _check(views_VQD, base_ND, k)
    search = SEARCHES[engine]
    step_Q, step_N = _tile(views_VQD, base_ND, k, memory_bytes, search.copies)
    best = _Best(len(queries_QD), k)
    starts = range(0, len(base_ND), step_N)
    for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
        base = _read(base_ND, slice(start, start + step_N), "row of the base")
        searched = search(base, metric)
        for first in range(0, len(queries_QD), step_Q):
            tile = slice(first, first + step_Q)
            views = [_read(view_QD, tile, "query") for view_QD in views_VQD]
            rules = Rules(exclude_Q, groups, first, start)
            worst_Q = as_score(best.worst(tile), metric)
            query_P, row_P = searched.pairs(views, k, worst_Q, rules)
            distance_VP = np.stack(
                [_measure(view, base, query_P, row_P, metric, memory_bytes) for view in views]
            )
            flipped_P = distance_VP.argmin(axis=0) == 1
            best.add(first + query_P, start + row_P, distance_VP.min(axis=0), flipped_P)
    return best.result(metric)


class _Best:
    """The best so far, by distance: Euclidean, or minus the cosine similarity."""

    def __init__(self, queries: int, k: int) -> None:
        """Start with nothing found: distance infinite."""
        self.distance_QK = np.full((queries, k), np.inf, dtype=np.float32)
        self.index_QK = np.full((queries, k), -1, dtype=np.int64)
        self.flipped_QK = np.zeros((queries, k), dtype=bool)

    def worst(self, tile: slice) -> np.ndarray:
        """What another row must beat: float64 (Q,)."""
        return self.distance_QK[tile, -1].astype(np.float64)

    def add(
        self, query_P: np.ndarray, row_P: np.ndarray, distance_P: np.ndarray, flipped_P: np.ndarray
    ) -> None:
        """Take in pairs of rows after all before, ascending; ties go to the lower row."""
        k = self.distance_QK.shape[1]
        touched, query_P = np.unique(query_P, return_inverse=True)
        query = np.concatenate([np.repeat(np.arange(len(touched)), k), query_P])
        # In each query's part rows ascend, and the sort is stable.
        index = np.concatenate([self.index_QK[touched].ravel(), row_P])
        distance = np.concatenate([self.distance_QK[touched].ravel(), distance_P])
        flipped = np.concatenate([self.flipped_QK[touched].ravel(), flipped_P])
        order = np.lexsort((distance, query))
        query = query[order]
        rank = np.arange(len(query)) - np.searchsorted(query, query)
        kept = order[rank < k].reshape(-1, k)
        self.distance_QK[touched] = distance[kept]
        self.index_QK[touched] = index[kept]
        self.flipped_QK[touched] = flipped[kept]

    def result(self, metric: Metric) -> Neighbours:
        """All that was found."""
        k = self.distance_QK.shape[1]
        short = np.isinf(self.distance_QK).any(axis=1)
        if short.any():
            query = int(short.argmax())
            left = int(np.isfinite(self.distance_QK[query]).sum())
            raise UserError(
                f"Query {query} has {left} rows to compare with, but k is {k}: the others are "
                "excluded or of its own group. Lower k, or give more images."
            )
        value_QK = self.distance_QK if metric == "l2" else -self.distance_QK
        return Neighbours(value_QK, self.index_QK, self.flipped_QK)


def _check(views_VQD: list[np.ndarray], base_ND: np.ndarray, k: int) -> None:
    for view_QD in views_VQD:
        if view_QD.shape != (len(views_VQD[0]), base_ND.shape[1]):
            raise UserError(
                f"Features do not match: queries {view_QD.shape}, base {base_ND.shape}. Take both "
                "from the same embedder, mirrored queries from the same images."
            )
    if not 1 <= k <= len(base_ND):
        raise UserError(
            f"k must be from 1 to {len(base_ND)}, the number of images to compare with, but is {k}."
        )


def _tile(
    views_VQD: list[np.ndarray], base_ND: np.ndarray, k: int, memory_bytes: int, copies: int
) -> tuple[int, int]:
    """Queries and base rows at a time: 1/4 of the memory each, 3/8 for pairs, 1/8 to measure.

    ``copies``: how often the search holds the base rows.
    """
    rows = memory_bytes // 4 // (4 * base_ND.shape[1])
    pairs = memory_bytes * 3 // 8 // _BYTES_OF_PAIR
    # A view takes twice its size, normalised rows beside the rows; the best k are sorted with the
    # new pairs.
    step_Q = min(len(views_VQD[0]), _TILE_QUERIES, rows // (2 * len(views_VQD)), pairs // (2 * k))
    step_Q = max(1, step_Q)
    return step_Q, max(1, min(len(base_ND), rows // copies, pairs // step_Q - k))


def _read(features: np.ndarray, rows: slice, what: str) -> Block:
    """Some rows, copied; those too small to square are zeros. Errors: `UserError` for NaN, inf."""
    copy = np.array(features[rows], dtype=np.float32)
    _release(features)
    norms = np.sqrt(np.einsum("rd,rd->r", copy, copy, dtype=np.float64))
    bad = ~(norms < _MAX_NORM)  # so NaN is bad
    if bad.any():
        raise UserError(
            f"The features of {what} {rows.start + int(bad.argmax())} are not finite numbers "
            "(or too large). Look at that image and at the embedder's precision."
        )
    small = norms < _MIN_NORM
    copy[small], norms[small] = 0, 0
    return Block(copy, norms)


def _release(features: np.ndarray) -> None:
    """Let go of the pages of a memmap, which otherwise stay resident once read.

    Only where it is read-only: nothing unsaved can be lost then. Windows has no such call.
    """
    owner = features
    while isinstance(owner, np.ndarray):
        owner = owner.base
    can = isinstance(owner, mmap.mmap) and hasattr(owner, "madvise")
    if can and not features.flags.writeable:
        owner.madvise(mmap.MADV_DONTNEED)


def _measure(
    queries: Block,
    base: Block,
    query_P: np.ndarray,
    row_P: np.ndarray,
    metric: Metric,
    memory_bytes: int,
) -> np.ndarray:
    """Distances of pairs, directly in float64, rounded to float32 (P,)."""
    distance_P = np.empty(len(query_P), dtype=np.float32)
    step = max(1, memory_bytes // 8 // (4 * 8 * base.rows.shape[1]))
    for start in range(0, len(query_P), step):
        part = slice(start, start + step)
        a_PD = queries.rows[query_P[part]].astype(np.float64)
        b_PD = base.rows[row_P[part]].astype(np.float64)
        if metric == "l2":
            difference_PD = a_PD - b_PD
            distance_P[part] = np.sqrt(np.vecdot(difference_PD, difference_PD))
        else:
            # Norms anew, so that the distance is a function of the two rows alone.
            norm_P = np.sqrt(np.vecdot(a_PD, a_PD) * np.vecdot(b_PD, b_PD))
            dot_P = np.vecdot(a_PD, b_PD)
            distance_P[part] = -np.divide(dot_P, norm_P, out=np.zeros_like(dot_P), where=norm_P > 0)
    return distance_P
