"""Is a generation nearer to the training set than a new image would be?

Shapes: G generations, T training images, H held-out images, D dimensions, C cells.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from iet_sd.errors import UserError
from iet_sd.evaluation.neighbours import Neighbours, nearest


@dataclass(frozen=True)
class CT:
    """C_T and its parts; a cell left out has z nan and weight 0."""

    z: float  # below 0: generations are nearer to the training set than held-out images
    z_per_cell: np.ndarray  # float64 (C,)
    weight_per_cell: np.ndarray  # float64 (C,), sums to 1


def auth_pct(gen_to_train: Neighbours, train_to_train_T: np.ndarray) -> np.ndarray:
    """Authentic iff farther from its nearest training image than that one is from another: (G,).

    Alaa et al. 2022 (arXiv 2102.08921); AuthPct is the mean. Both are distances (``metric="l2"``):
    ``train_to_train_T`` of each training image to the nearest other one.
    """
    return gen_to_train.value_QK[:, 0] > train_to_train_T[gen_to_train.index_QK[:, 0]]


def c_t(
    gen_GD: np.ndarray,
    train_TD: np.ndarray,
    heldout_HD: np.ndarray,
    cells: int = 3,
    dims: int = 64,
    min_count: int = 20,
    seed: int = 0,
) -> CT:
    """C_T, Meehan et al. 2020 (arXiv 2004.05675): a mean of Z over cells of the training set.

    Features are projected to the ``dims`` principal components of the training set and parted by
    k-means; Z compares distances to the cell's training images (`mann_whitney_z`). Cells weigh as
    their share of the held-out images; those with at most ``min_count`` generations, or no
    held-out image, are left out (the authors' threshold 20 / G). Reads the features into memory.
    Errors: `UserError` if no cell is left.
    """
    # Here, as it takes longer than the start of a training run should, which measures no C_T.
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    if len(train_TD) < cells or len(gen_GD) <= min_count or not len(heldout_HD):
        raise _too_few(gen_GD, train_TD, heldout_HD, cells, min_count)
    if train_TD.shape[1] > dims:
        pca = PCA(min(dims, len(train_TD)), random_state=seed).fit(train_TD)
        gen_GD, train_TD, heldout_HD = map(pca.transform, (gen_GD, train_TD, heldout_HD))
    kmeans = KMeans(cells, n_init=10, random_state=seed).fit(train_TD)
    cell_G, cell_T, cell_H = map(kmeans.predict, (gen_GD, train_TD, heldout_HD))
    z_C, weight_C = np.full(cells, np.nan), np.zeros(cells)
    for cell in range(cells):
        gen, heldout = gen_GD[cell_G == cell], heldout_HD[cell_H == cell]
        if len(gen) > min_count and len(heldout):
            train = train_TD[cell_T == cell]
            gen_distance, heldout_distance = (
                nearest(images, train, metric="l2").value_QK[:, 0] for images in (gen, heldout)
            )
            z_C[cell] = mann_whitney_z(gen_distance, heldout_distance)
            weight_C[cell] = len(heldout)
    if not weight_C.any():
        raise _too_few(gen_GD, train_TD, heldout_HD, cells, min_count)
    weight_C /= weight_C.sum()
    return CT(float(np.nansum(weight_C * z_C)), z_C, weight_C)


def mann_whitney_z(a: np.ndarray, b: np.ndarray) -> float:
    """(U - mn / 2) / sqrt(mn (m + n + 1) / 12), U the pairs with a above b (equal: half).

    Mann & Whitney 1947; standard normal for large samples of one distribution without ties.
    """
    m, n = len(a), len(b)
    u = rankdata(np.concatenate([a, b]))[:m].sum() - m * (m + 1) / 2
    return float((u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12))


def _too_few(
    gen: np.ndarray, train: np.ndarray, heldout: np.ndarray, cells: int, min_count: int
) -> UserError:
    return UserError(
        f"C_T needs one of {cells} cells of the training set to hold more than {min_count} "
        f"generations and a held-out image; of {len(gen)} generations, {len(train)} training and "
        f"{len(heldout)} held-out images none does. Give more images."
    )
