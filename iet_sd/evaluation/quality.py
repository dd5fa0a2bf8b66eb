"""Quality and diversity of images from their features alone: FID, KID, PRDC, Vendi, CLIP score.

Shapes: N and M images of two sets, or G generated and N real ones, D dimensions; features are
float32. Non-finite features, or too few images, are a `UserError`.
"""

import numpy as np
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)

from iet_sd.errors import UserError
from iet_sd.evaluation.neighbours import nearest

FID_MIN_IMAGES = 10_000  # what the authors of FID ask for
KID_SUBSET = 1000  # as usual
CHUNK_ROWS = 2048


def frechet_distance(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """FID, the distance of two Gaussians fitted to the features (Heusel et al. 2017); 0 is best.

    ||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), computed by torch-fidelity.
    """
    a, b = (fid_features_to_statistics(torch.tensor(each)) for each in _checked(a_ND, b_MD))
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    a_ND: np.ndarray,
    b_MD: np.ndarray,
    subsets: int = 100,
    subset_size: int = KID_SUBSET,
    seed: int = 0,
) -> tuple[float, float]:
    """KID, the squared MMD under (x.y / D + 1)^3 (Bińkowski et al. 2018): mean and spread.

    Unbiased, so around 0, and at times below, for sets of one distribution whose images vary on
    their own: for several images a prompt see `iet_sd.evaluation.kid`. The spread is the
    standard deviation over random subsets, not an interval: it shrinks as subsets, clipped to the
    smaller set, become the sets themselves. Computed by torch-fidelity.
    """
    a_ND, b_MD = _checked(a_ND, b_MD)
    result = kid_features_to_metric(
        torch.tensor(a_ND),
        torch.tensor(b_MD),
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(a_ND), len(b_MD)),
        rng_seed=seed,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall_density_coverage(
    real_ND: np.ndarray, gen_GD: np.ndarray, k: int = 5
) -> dict[str, float]:
    """PRDC (Kynkäänniemi et al. 2019, Naeem et al. 2020): balls up to each k-th neighbour.

    ``precision``: share of generated images in a real one's ball; ``recall``: of real images in a
    generated one's; ``density``: balls of real ones around a generated one, over k, so that it can
    exceed 1; ``coverage``: share of real images with a generated one in their ball. Copies of the
    real images score best.
    """
    real_ND, gen_GD = _checked(real_ND, gen_GD, minimum=k + 1)
    squared_radius_N, squared_radius_G = (_squared_radius(each, k) for each in (real_ND, gen_GD))
    balls_G = np.zeros(len(gen_GD), dtype=np.int64)
    covered_N, recalled_N = np.zeros((2, len(real_ND)), dtype=bool)
    for g in _chunks(len(gen_GD)):
        for n in _chunks(len(real_ND)):
            squared = _squared_distances(gen_GD[g], real_ND[n])
            in_real = squared < squared_radius_N[n]
            balls_G[g] += in_real.sum(axis=1)
            covered_N[n] |= in_real.any(axis=0)
            recalled_N[n] |= (squared < squared_radius_G[g, None]).any(axis=0)
    return {
        "precision": float(np.mean(balls_G > 0)),
        "recall": float(np.mean(recalled_N)),
        "density": float(np.mean(balls_G) / k),
        "coverage": float(np.mean(covered_N)),
    }


def vendi_score(features_ND: np.ndarray) -> float:
    """Vendi score: as diverse as how many images all unlike, 1 to N (Friedman & Dieng 2023).

    exp of the entropy of the eigenvalues of the cosine similarities over N.
    """
    (features_ND,) = _checked(features_ND)
    unit_ND = _normalized(features_ND)
    N, D = unit_ND.shape
    # Both products have the same eigenvalues, up to zeros.
    product = unit_ND.T @ unit_ND if D < N else unit_ND @ unit_ND.T
    values = np.linalg.eigvalsh(product / N)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def clip_score(image_features_GD: np.ndarray, text_features_GD: np.ndarray) -> np.ndarray:
    """Cosine similarity of each image and its prompt, float64 (G,) (Hessel et al. 2021).

    Neither scaled nor clipped at 0; values of different CLIP models are not comparable.
    """
    image_GD, text_GD = _checked(image_features_GD, text_features_GD, minimum=1)
    return np.sum(_normalized(image_GD) * _normalized(text_GD), axis=1)


def small_sample_warning(n_gen: int, n_real: int, dims: int) -> str | None:
    """Whether FID is fit for so few images, in one line; None if there are enough."""
    fewest = min(n_gen, n_real)
    if fewest <= dims:
        return (
            f"small sample: {fewest} images cannot fill the covariance of {dims} features, so FID "
            "is far too high; read KID instead, or use more images"
        )
    if fewest < FID_MIN_IMAGES:
        return (
            f"small sample: with {fewest} images, under {FID_MIN_IMAGES}, FID is too high; compare "
            "it only at equal numbers of images, or read KID instead"
        )
    return None


def _checked(*sets: np.ndarray, minimum: int = 2) -> list[np.ndarray]:
    """The sets of features in float32, all of one width, finite and with enough images."""
    sets = [np.asarray(features, dtype=np.float32) for features in sets]
    widths = {features.shape[1] for features in sets}
    if len(widths) > 1:
        raise UserError(
            "Features to compare must have equally many dimensions; got "
            f"{' and '.join(map(str, sorted(widths)))}. Use one embedder for both."
        )
    for features in sets:
        if len(features) < minimum:
            raise UserError(
                f"This measure needs at least {minimum} images of each kind; got {len(features)}. "
                "Use more images."
            )
        if not np.isfinite(features).all():
            row = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise UserError(
                f"Features must be finite numbers; those of image {row} (from 0) are not. Look for "
                "a broken image or broken weights of the embedder."
            )
    return sets


def _squared_radius(features_ND: np.ndarray, k: int) -> np.ndarray:
    """Squared distance to the k-th other image, float64 (N,), less what rounding may add.

    So that a point on the surface, as a copy has many, is never taken for one inside the ball.
    """
    own_N = np.arange(len(features_ND))
    radius_N = nearest(features_ND, features_ND, k, "l2", exclude_Q=own_N).value_QK[:, -1]
    return radius_N.astype(np.float64) ** 2 * (1 - 1e-6)


def _squared_distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Float64 (N, M): through products, whose rounding is then far below float32's."""
    a_ND, b_MD = a_ND.astype(np.float64), b_MD.astype(np.float64)
    a_N, b_M = np.sum(a_ND**2, axis=1), np.sum(b_MD**2, axis=1)
    return np.maximum(a_N[:, None] + b_M - 2 * a_ND @ b_MD.T, 0)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK_ROWS) for start in range(0, count, CHUNK_ROWS)]


def _normalized(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays so."""
    features_ND = features_ND.astype(np.float64)
    length_N = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND / np.where(length_N > 0, length_N, 1)
