"""Which images belong together, because the user says so or because they are the same."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def group(
    sample_ids: Sequence[str], names: Sequence[str | None], digests: Sequence[str | None]
) -> tuple[str, ...]:
    """Groups of N >= 1 samples: one for all that share a name or a digest, in a chain too.

    A group is called by the name that is first in the alphabet, else by its digest, else by its
    only sample; so it depends on its members alone, not on their order.

    sample_ids: (N,) unique. names, digests: (N,) None where there is none.
    """
    # The marks of a sample, by rank: one that is its own, and those that it may share.
    marks_N = [
        [(2, sample), *((rank, mark) for rank, mark in enumerate(shared) if mark is not None)]
        for sample, *shared in zip(sample_ids, names, digests, strict=True)
    ]
    marks_M = sorted({mark for marks in marks_N for mark in marks})
    place = {mark: m for m, mark in enumerate(marks_M)}
    own, other = np.array([(place[marks[0]], place[m]) for marks in marks_N for m in marks]).T
    links = coo_array((np.ones(len(own)), (own, other)), shape=(len(marks_M),) * 2)
    _, component_M = connected_components(links, directed=False)
    _, first = np.unique(component_M, return_index=True)
    called = [f"{'sample' if rank == 2 else 'group'} {mark}" for rank, mark in marks_M]
    return tuple(called[first[component_M[place[marks[0]]]]] for marks in marks_N)
