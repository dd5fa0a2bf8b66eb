"""AuthPct and C_T against their formulas, and on data whose copying is known."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu, norm
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from iet_sd.errors import UserError
from iet_sd.evaluation.copying import auth_pct, c_t, mann_whitney_z
from iet_sd.evaluation.neighbours import nearest


def mixture(seed, count, dims=8, shares=(0.5, 0.3, 0.2)):
    """Images of three kinds, far apart."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(3, count, p=shares)
    return (draw.standard_normal((count, dims)) + 20 * np.eye(3, dims)[kind]).astype(np.float32)


def authentic(gen, train):
    own = np.arange(len(train))
    train_to_train = nearest(train, train, metric="l2", exclude_Q=own).value_QK[:, 0]
    return auth_pct(nearest(gen, train, metric="l2"), train_to_train)


def test_auth_pct_equals_its_formula():
    gen, train = mixture(0, 150), mixture(1, 120)
    expected = []
    for row in cdist(gen, train):
        nearest_image = row.argmin()
        others = cdist(train, train[[nearest_image]])[:, 0]
        others[nearest_image] = np.inf
        expected.append(row.min() > others.min())
    result = authentic(gen, train)
    assert result.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_copies_are_not_authentic_and_far_images_are():
    train = mixture(0, 100)
    train[1] = train[0]  # a duplicate has no room for nearer generations; its copy is one still
    copies = train[[0, 5, 9]]
    near = train[[5, 9]] + np.float32(1e-4)
    far = train[[5, 9]] + np.float32(100)
    result = authentic(np.concatenate([copies, near, far]), train)
    assert result.tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("sizes", [(30, 40), (200, 70), (1, 5)])
@pytest.mark.parametrize("ties", [False, True])
def test_z_equals_scipy(sizes, ties):
    draw = np.random.default_rng(0)
    a, b = (draw.random(size) for size in sizes)
    if ties:
        a, b = np.round(a, 1), np.round(b, 1)
    m, n = sizes
    u = mannwhitneyu(a, b).statistic
    expected = (u - m * n / 2) / np.sqrt(m * n * (m + n + 1) / 12)
    assert mann_whitney_z(a, b) == pytest.approx(expected)
    if not ties:
        test = mannwhitneyu(a, b, alternative="less", method="asymptotic", use_continuity=False)
        assert norm.cdf(mann_whitney_z(a, b)) == pytest.approx(test.pvalue)


@pytest.mark.parametrize("dims", [8, 100])
def test_c_t_equals_its_formula(dims):
    one_kind = (1, 0, 0)  # so that images near a cell's border have neighbours beyond it
    gen, train, heldout = (
        mixture(seed, n, dims, one_kind) for seed, n in ((0, 200), (1, 300), (2, 150))
    )
    if dims > 64:
        pca = PCA(64, random_state=0).fit(train)
        parts = [pca.transform(images) for images in (gen, train, heldout)]
    else:
        parts = [gen, train, heldout]
    kmeans = KMeans(3, n_init=10, random_state=0).fit(parts[1])
    weighted = 0
    for cell in range(3):
        g, t, h = (images[kmeans.predict(images) == cell] for images in parts)
        index = NearestNeighbors(n_neighbors=1).fit(t)
        to_train = [index.kneighbors(images)[0][:, 0] for images in (g, h)]
        u = mannwhitneyu(*to_train).statistic
        z = (u - len(g) * len(h) / 2) / np.sqrt(len(g) * len(h) * (len(g) + len(h) + 1) / 12)
        weighted += len(h) / len(heldout) * z
    result = c_t(gen, train, heldout)
    assert result.z == pytest.approx(weighted, rel=1e-4)
    assert result.weight_per_cell.sum() == pytest.approx(1)
    assert result.z == pytest.approx(result.weight_per_cell @ result.z_per_cell)


def test_c_t_is_about_zero_for_new_images():
    scores = [c_t(mixture(i, 200), mixture(99, 300), mixture(1000 + i, 200)).z for i in range(20)]
    # A mean of three Z with weights .5, .3, .2 has deviation .62.
    assert abs(np.mean(scores)) < 4 * 0.62 / np.sqrt(20)
    assert np.abs(scores).max() < 4 * 0.62


@pytest.mark.parametrize("noise", [0, 0.05])
def test_c_t_is_strongly_negative_for_copies(noise):
    train = mixture(0, 300)
    copies = train[:200] + noise * mixture(1, 200)
    result = c_t(copies.astype(np.float32), train, mixture(2, 200))
    assert (result.z_per_cell < -5).all()
    assert result.z < -8


def test_c_t_sees_copies_in_one_cell_alone():
    train, gen = mixture(0, 300), mixture(1, 300)
    kind = gen[:, :3].argmax(1)
    gen[kind == 2] = train[train[:, :3].argmax(1) == 2][0]
    result = c_t(gen, train, mixture(2, 300))
    assert sorted(result.z_per_cell < -5) == [False, False, True]


def test_c_t_is_positive_for_images_farther_than_new_ones():
    gen = mixture(1, 200) + 2 * mixture(5, 200, shares=(1, 0, 0)) * [0, 0, 0, 1, 1, 1, 1, 1]
    assert c_t(gen.astype(np.float32), mixture(0, 300), mixture(2, 200)).z > 5


@pytest.mark.filterwarnings("error")
def test_cells_with_few_generations_or_no_held_out_image_are_left_out():
    train = mixture(0, 300)
    counts = {(1, 0, 0): 100, (0, 1, 0): 20, (0, 0, 1): 60}
    gen = np.concatenate([mixture(1, count, shares=kind) for kind, count in counts.items()])
    heldout = mixture(3, 100, shares=(0.5, 0.5, 0))
    result = c_t(gen, train, heldout)
    (cell,) = np.flatnonzero(result.weight_per_cell)
    assert result.weight_per_cell[cell] == 1
    assert result.z == result.z_per_cell[cell]
    assert np.isnan(np.delete(result.z_per_cell, cell)).all()
    one_more = np.concatenate([gen, gen[100:101]])
    np.testing.assert_allclose(
        np.sort(c_t(one_more, train, heldout).weight_per_cell),
        [0, *sorted(np.bincount(heldout[:, :2].argmax(1)) / 100)],
    )
    with pytest.raises(UserError, match="more than 120 generations and a held-out image"):
        c_t(gen, train, heldout, min_count=120)


@pytest.mark.parametrize(("G", "T", "H"), [(20, 300, 100), (100, 2, 100), (100, 300, 0)])
def test_c_t_of_too_few_images(G, T, H):
    with pytest.raises(UserError, match=f"of {G} generations, {T} training and {H} held-out"):
        c_t(mixture(0, G), mixture(1, T), mixture(2, H))
