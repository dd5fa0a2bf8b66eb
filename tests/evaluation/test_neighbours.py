"""Nearest neighbours against a full float64 matrix, sorted stably."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from iet_sd.errors import UserError
from iet_sd.evaluation.neighbours import nearest
from iet_sd.evaluation.search import Product, _candidates, check_engine

METRICS = ("cosine", "l2")
STATUS = Path("/proc/self/status")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def distances(queries_QD, base_ND, metric):
    """All distances, (Q, N): float32, so that what the result shows as equal is equal."""
    queries, base = queries_QD.astype(np.float64), base_ND.astype(np.float64)
    if metric == "l2":
        difference = queries[:, None] - base[None]
        return np.sqrt((difference**2).sum(-1)).astype(np.float32)
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(base, axis=1)
    dots = queries @ base.T
    return -np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).astype(np.float32)


def brute_force(queries, base, k, metric, flipped_QD=None, exclude_Q=None, groups=None):
    full = distances(queries, base, metric)
    flipped = np.zeros(full.shape, dtype=bool)
    if flipped_QD is not None:
        mirrored = distances(flipped_QD, base, metric)
        full, flipped = np.minimum(full, mirrored), mirrored < full
    for query in range(len(queries)):
        if exclude_Q is not None and exclude_Q[query] >= 0:
            full[query, exclude_Q[query]] = np.inf
        if groups is not None:
            full[query, groups[1] == groups[0][query]] = np.inf
    index = np.argsort(full, axis=1, kind="stable")[:, :k]
    value = np.take_along_axis(full, index, 1)
    flipped = np.take_along_axis(flipped, index, 1)
    return (value if metric == "l2" else -value), index, flipped


def assert_equal(found, expected):
    value, index, flipped = expected
    np.testing.assert_array_equal(found.index_QK, index)
    np.testing.assert_array_equal(found.flipped_QK, flipped)
    np.testing.assert_allclose(found.value_QK, value, rtol=1e-6, atol=1e-7)


OPTIONS = ("flipped_QD", "exclude_Q", "groups")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("names", [(), *zip(OPTIONS), OPTIONS], ids="-".join)
def test_equals_brute_force(metric, k, names):
    queries, base, draw = normal(0, 60, 24), normal(1, 300, 24), np.random.default_rng(2)
    options = {
        "flipped_QD": normal(3, 60, 24),
        "exclude_Q": draw.integers(-1, 300, 60),
        "groups": (draw.integers(0, 5, 60), draw.integers(0, 5, 300)),
    }
    options = {name: options[name] for name in names}
    found = nearest(queries, base, k, metric, memory_bytes=2**17, **options)
    assert_equal(found, brute_force(queries, base, k, metric, **options))
    assert found.value_QK.dtype == np.float32
    assert found.index_QK.dtype == np.int64
    assert found.flipped_QK.dtype == bool


small = st.integers(-2, 2).map(np.float32)


@settings(deadline=None)
@given(st.data(), st.sampled_from(METRICS), st.sampled_from([1, 2**12, 2**28]))
def test_ties_go_to_the_lowest_row_and_to_the_plain_view(data, metric, memory_bytes):
    dims, Q, N = (data.draw(st.integers(1, most)) for most in (3, 5, 9))
    queries, flipped, base = (
        data.draw(arrays(np.float32, (rows, dims), elements=small)) for rows in (Q, Q, N)
    )
    k = data.draw(st.integers(1, N))
    found = nearest(queries, base, k, metric, flipped_QD=flipped, memory_bytes=memory_bytes)
    assert_equal(found, brute_force(queries, base, k, metric, flipped))


@pytest.mark.parametrize("metric", METRICS)
def test_does_not_depend_on_the_tiling(metric):
    queries, flipped, base = normal(0, 20, 130), normal(1, 20, 130), normal(2, 120, 130)
    base[60:] = base[:60]
    one = nearest(queries, base, 30, metric, flipped_QD=flipped)
    for memory_bytes in (1, 2**14, 2**17, 2**20):
        other = nearest(queries, base, 30, metric, flipped_QD=flipped, memory_bytes=memory_bytes)
        for name in ("value_QK", "index_QK", "flipped_QK"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_rows_that_float32_products_cannot_tell_apart(metric, scale):
    queries = (100 + 1e-3 * normal(0, 20, 64)) * np.float32(scale)
    base = (100 + 1e-3 * normal(1, 400, 64)) * np.float32(scale)
    product = np.argsort(-2 * queries @ base.T + np.sum(base**2, 1), 1)[:, 0]
    expected = brute_force(queries, base, 3, metric)
    assert (product != expected[1][:, 0]).any()
    assert_equal(nearest(queries, base, 3, metric, memory_bytes=2**16), expected)
    zeros = np.zeros_like(queries)
    found = nearest(zeros, base, 3, metric, flipped_QD=queries, memory_bytes=2**16)
    assert_equal(found, (*expected[:2], np.full((20, 3), True)))


@pytest.mark.parametrize("metric", METRICS)
def test_long_rows(metric):
    pixels = np.random.default_rng(0).random((60, 12288), dtype=np.float32)
    expected = brute_force(pixels[:10], pixels[10:], 4, metric)
    assert_equal(nearest(pixels[:10], pixels[10:], 4, metric, memory_bytes=2**20), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_base_that_only_gets_better(metric):
    queries, base = normal(0, 30, 16), normal(1, 600, 16)
    base = base[np.argsort(-distances(queries[:1], base, metric)[0])]
    expected = brute_force(queries, base, 5, metric)
    assert_equal(nearest(queries, base, 5, metric, memory_bytes=2**15), expected)


def test_few_pairs_are_measured_twice():
    scores, nothing_found = normal(0, 20, 500), np.full(20, np.inf)
    query_P, row_P = _candidates(scores, np.zeros(20), nothing_found, 3)
    assert query_P.tolist() == np.repeat(np.arange(20), 3).tolist()
    assert row_P.tolist() == np.sort(np.argsort(scores, 1)[:, :3], 1).ravel().tolist()


def planted():
    """Pictures, mirrored pictures, and a base with copies of 5 pictures and of 5 mirrored ones."""
    pictures = np.random.default_rng(0).random((20, 3, 16, 16), dtype=np.float32)
    mirrored = pictures[..., ::-1].reshape(20, -1)
    pictures = pictures.reshape(20, -1)
    base = np.random.default_rng(1).random((3000, 768), dtype=np.float32)
    base[100:105], base[2000:2005] = pictures[:5], mirrored[5:10]
    return pictures, mirrored, base


@pytest.mark.parametrize(("metric", "perfect"), [("cosine", 1.0), ("l2", 0.0)])
def test_planted_copies_are_found_and_exact(metric, perfect):
    pictures, mirrored, base = planted()
    found = nearest(pictures, base, 2, metric, flipped_QD=mirrored, memory_bytes=2**20)
    assert found.value_QK[:10, 0].tolist() == [perfect] * 10
    assert found.index_QK[:10, 0].tolist() == [*range(100, 105), *range(2000, 2005)]
    assert found.flipped_QK[:10, 0].tolist() == [False] * 5 + [True] * 5
    assert (found.value_QK[10:, 0] != perfect).all()
    assert (found.value_QK[:, 1] != perfect).all()
    unflipped = nearest(pictures, base, 1, metric).value_QK[:, 0]
    assert (unflipped == perfect).tolist() == [True] * 5 + [False] * 15


@pytest.mark.parametrize("metric", METRICS)
def test_without_itself_a_training_image_finds_its_duplicate(metric):
    base = normal(0, 50, 8)
    base[30] = base[7]
    found = nearest(base, base, 1, metric, exclude_Q=np.arange(50))
    assert (found.index_QK[:, 0] != np.arange(50)).all()
    assert (found.index_QK[7, 0], found.index_QK[30, 0]) == (30, 7)
    assert found.value_QK[7, 0] == (1 if metric == "cosine" else 0)


def test_similarity_to_zeros_is_zero_and_norms_do_not_matter():
    base = [[0, 0], [3, 4], [1e-15, 0], [1e15, 0], [-1, 0], [1e-39, 0]]
    queries = np.array([[0, 0], [2, 0]], dtype=np.float32)
    found = nearest(queries, np.array(base, dtype=np.float32), 6)
    assert found.index_QK.tolist() == [[0, 1, 2, 3, 4, 5], [2, 3, 1, 0, 5, 4]]
    assert found.value_QK[0].tolist() == [0] * 6
    np.testing.assert_allclose(found.value_QK[1], [1, 1, 0.6, 0, 0, -1], rtol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_and_no_queries(metric):
    queries, base = normal(0, 3, 4), normal(1, 9, 4)
    assert_equal(nearest(queries, base, 9, metric), brute_force(queries, base, 9, metric))
    assert nearest(queries[:0], base, 2, metric).value_QK.shape == (0, 2)


@pytest.mark.parametrize("k", [0, 10])
def test_k_must_fit_the_base(k):
    with pytest.raises(UserError, match=f"from 1 to 9.*but is {k}"):
        nearest(normal(0, 3, 4), normal(1, 9, 4), k)


def test_too_few_rows_that_count():
    group_Q, group_N = np.array([0, 1]), np.array([0, 1, 1, 1])
    with pytest.raises(UserError, match="Query 1 has 1 rows to compare with, but k is 2"):
        nearest(normal(0, 2, 3), normal(1, 4, 3), 2, groups=(group_Q, group_N))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_values_that_are_not_finite(bad, metric):
    good, worse = normal(0, 9, 3), normal(1, 9, 3)
    worse[5, 1] = bad
    with pytest.raises(UserError, match="row of the base 5 are not finite"):
        nearest(good, worse, 1, metric, memory_bytes=1)
    with pytest.raises(UserError, match="query 5 are not finite"):
        nearest(worse, good, 1, metric)
    with pytest.raises(UserError, match="query 5 are not finite"):
        nearest(good, good, 1, metric, flipped_QD=worse)


def test_features_that_do_not_match():
    with pytest.raises(UserError, match=r"queries \(3, 5\), base \(9, 4\)"):
        nearest(normal(0, 3, 5), normal(1, 9, 4))
    with pytest.raises(UserError, match=r"queries \(2, 4\), base \(9, 4\)"):
        nearest(normal(0, 3, 4), normal(1, 9, 4), flipped_QD=normal(0, 2, 4))


@pytest.mark.parametrize("metric", METRICS)
def test_equals_faiss(metric):
    faiss = pytest.importorskip("faiss")
    queries, base = normal(0, 100, 64), normal(1, 2000, 64)
    if metric == "cosine":
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        base /= np.linalg.norm(base, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(64) if metric == "cosine" else faiss.IndexFlatL2(64)
    index.add(base)
    value, row = index.search(queries, 10)
    found = nearest(queries, base, 10, metric)
    np.testing.assert_array_equal(found.index_QK, row)
    np.testing.assert_allclose(found.value_QK, value if metric == "cosine" else value**0.5, 1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("k", "ties"), [(3, False), (3, True), (300, False)])
def test_memory_stays_within_its_bound(metric, k, ties):
    queries, base = normal(0, 60, 32), normal(1, 3000, 32)  # the full matrix takes 0.7 MB
    if ties:  # every pair has to be measured directly
        base[:] = base[0]
    memory_bytes = 2**19
    tracemalloc.start()
    found = nearest(queries, base, k, metric, flipped_QD=queries, memory_bytes=memory_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = found.value_QK.nbytes + found.index_QK.nbytes + found.flipped_QK.nbytes
    assert peak - result < memory_bytes


def resident_file_pages():
    """Bytes of mapped files that are in memory."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_the_pages_of_a_memmap_do_not_stay_in_memory(tmp_path):
    np.save(tmp_path / "base.npy", normal(0, 2**17, 64))  # 32 MiB
    base = np.load(tmp_path / "base.npy", mmap_mode="r")
    queries = np.array(base[-3:])
    del base
    base = np.load(tmp_path / "base.npy", mmap_mode="r")
    before = resident_file_pages()
    found = nearest(queries, base, memory_bytes=2**21)
    assert resident_file_pages() - before < 2**22
    assert found.index_QK[:, 0].tolist() == [2**17 - 3, 2**17 - 2, 2**17 - 1]
    base.sum()
    assert resident_file_pages() - before > 2**24  # the measuring sees pages that stay


def test_unsaved_changes_of_a_memmap_are_kept(tmp_path):
    np.save(tmp_path / "base.npy", normal(0, 100, 8))
    base = np.load(tmp_path / "base.npy", mmap_mode="c")
    queries = normal(1, 1, 8)
    base[40] = queries[0]
    for _ in range(2):
        found = nearest(queries, base, metric="l2")
        assert (found.index_QK.item(), found.value_QK.item()) == (40, 0)


def same(found, other):
    for name in ("value_QK", "index_QK", "flipped_QK"):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("memory_bytes", [2**15, 2**28])
def test_by_faiss_all_is_the_same(metric, k, memory_bytes):
    """With copies, near-copies that rounding cannot tell apart, and rows that do not count."""
    pytest.importorskip("faiss")
    queries, base, draw = normal(0, 40, 24), normal(1, 300, 24), np.random.default_rng(2)
    base[200:240] = base[7] + 1e-7 * normal(4, 40, 24)
    base[100], queries[3] = queries[5], base[210]
    base[50], queries[6] = 0, 0
    options = {
        "flipped_QD": normal(3, 40, 24),
        "exclude_Q": draw.integers(-1, 300, 40),
        "groups": (draw.integers(0, 5, 40), draw.integers(0, 5, 300)),
    }
    for names in ((), ("flipped_QD",), OPTIONS):
        given = {name: options[name] for name in names} | {"memory_bytes": memory_bytes}
        found = nearest(queries, base, k, metric, engine="faiss", **given)
        same(found, nearest(queries, base, k, metric, **given))


def test_faiss_leaves_little_to_the_product(monkeypatch):
    """Of rows that differ none is asked for twice; of equal ones all are."""
    pytest.importorskip("faiss")
    asked, pairs = [], Product.pairs

    def counting(self, views, k, worst_Q, rules, chosen_Q=None):
        asked.append(len(chosen_Q))
        return pairs(self, views, k, worst_Q, rules, chosen_Q)

    monkeypatch.setattr(Product, "pairs", counting)
    queries, base = normal(0, 30, 16), normal(1, 500, 16)
    nearest(queries, base, 5, engine="faiss")
    assert not asked
    nearest(queries, np.repeat(base[:2], 100, axis=0), 5, engine="faiss")
    assert asked == [30]


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine("exact")
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        check_engine("faiss")
