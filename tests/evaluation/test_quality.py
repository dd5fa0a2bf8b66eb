"""Measures of features against other libraries, their formulas as loops, and known cases."""

import contextlib
import io
import warnings

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from vendi_score import vendi

from iet_sd.errors import UserError
from iet_sd.evaluation import quality
from iet_sd.evaluation.quality import (
    clip_score,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
    small_sample_warning,
    vendi_score,
)


def features(count, dims=16, seed=0, centre=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dims, dims)) / dims**0.5
    return (centre + scale * rng.normal(size=(count, dims)) @ mixing).astype(np.float32)


class AsTheyAre(nn.Module):
    """Stands in for Inception where a library wants a network: the inputs are the features."""

    num_features = 16

    def forward(self, inputs):
        return inputs


def of_torchmetrics(metric, a, b):
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    return metric.compute()


def test_fid_equals_torchmetrics():
    a, b = features(300), features(200, seed=1, centre=0.3, scale=1.4)
    metric = FrechetInceptionDistance(feature=AsTheyAre()).set_dtype(torch.float64)
    expected = of_torchmetrics(metric, a, b).item()
    assert expected > 1
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [200, 10], ids=["full rank", "fewer images than features"])
def test_fid_equals_its_closed_form(count):
    a, b = features(count), features(count + 5, seed=1, centre=0.3)
    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    # C = X'X, so the eigenvalues of Ca Cb are the squared singular values of Xa Xb'.
    root_a, root_b = (
        (each - mean) / (len(each) - 1) ** 0.5 for each, mean in ((a, mean_a), (b, mean_b))
    )
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2)
    expected -= 2 * np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_fid_of_known_changes():
    a = features(400)
    shift = np.linspace(-1, 1, 16, dtype=np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + shift) == pytest.approx(np.sum(shift**2), rel=1e-4)
    variance = np.trace(np.cov(a, rowvar=False))
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-4)


def naive_kid(a, b):
    """Means of (x.y / d + 1)^3 over the pairs, those of an image with itself left out."""

    def mean_kernel(xs, ys, same):
        values = [
            (float(x @ y) / len(x) + 1) ** 3
            for i, x in enumerate(xs.astype(np.float64))
            for j, y in enumerate(ys.astype(np.float64))
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    return mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)


def test_kid_of_whole_sets_equals_its_formula_and_torchmetrics():
    a, b = features(60), features(60, seed=1, centre=0.4)
    mean, spread = kernel_distance(a, b, subsets=3)
    metric = KernelInceptionDistance(feature=AsTheyAre(), subsets=3, subset_size=60)
    assert mean == pytest.approx(naive_kid(a, b), rel=1e-4)
    assert mean == pytest.approx(of_torchmetrics(metric, a, b)[0].item(), rel=1e-4)
    assert spread == pytest.approx(0, abs=1e-6)


def test_kid_of_subsets_is_around_that_of_the_whole_and_the_seed_decides():
    a, b = features(300), features(250, seed=1, centre=0.4)
    mean, spread = kernel_distance(a, b, subsets=200, subset_size=50)
    (whole, _), error = kernel_distance(a, b[:250], subsets=50), spread / 200**0.5
    assert spread > 0
    assert mean == pytest.approx(whole, abs=5 * error)
    assert kernel_distance(a, b, 5, 50, seed=1) == kernel_distance(a, b, 5, 50, seed=1)
    assert kernel_distance(a, b, 5, 50, seed=1) != kernel_distance(a, b, 5, 50, seed=2)


def test_kid_of_one_distribution_is_around_zero():
    found = [
        kernel_distance(features(80, seed=i), features(80, seed=i + 50), 1)[0] for i in range(40)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 40**0.5
    assert min(found) < 0 < max(found)


def of_prdc(real, generated, k):
    with contextlib.redirect_stdout(io.StringIO()):
        return compute_prdc(real, generated, k)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_rows", [2048, 37])
def test_prdc_equals_prdc(k, chunk_rows, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK_ROWS", chunk_rows)
    real, generated = features(230), features(170, seed=1, centre=0.5, scale=0.7)
    found = precision_recall_density_coverage(real, generated, k)
    expected = of_prdc(real, generated, k)
    assert found == pytest.approx(expected)
    assert len({round(value, 6) for value in found.values()}) == 4
    assert all(0 < value < 1.5 for value in found.values())


def test_prdc_is_the_same_far_from_the_origin():
    real, generated = features(230), features(170, seed=1, scale=0.7)
    near = precision_recall_density_coverage(real, generated)
    assert precision_recall_density_coverage(real + 64, generated + 64) == pytest.approx(
        near, abs=0.02
    )


def test_prdc_of_copies_is_best():
    real = features(200)
    found = precision_recall_density_coverage(real, real.copy())
    assert found == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_prdc_of_sets_far_apart_is_zero():
    found = precision_recall_density_coverage(features(50), features(40, seed=1, centre=100))
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_prdc_of_duplicates_beyond_k_has_empty_balls():
    pile = np.repeat(features(30), 6, axis=0)
    found = precision_recall_density_coverage(pile, pile[::-1], k=5)
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    found = precision_recall_density_coverage(pile, pile[::-1], k=6)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_prdc_tells_a_lost_mode_from_a_wrong_one():
    real = np.concatenate([features(100), features(100, seed=1, centre=100)])
    lost, wrong = features(100, seed=2), features(100, seed=3, centre=-100)
    missing = precision_recall_density_coverage(real, lost)
    assert missing["coverage"] == pytest.approx(0.5, abs=0.05)
    assert missing["precision"] > 0.7
    added = precision_recall_density_coverage(features(100), np.concatenate([lost, wrong]))
    assert added["precision"] == pytest.approx(0.5, abs=0.15)
    assert added["recall"] > 0.7


@pytest.mark.parametrize("count", [10, 40], ids=["fewer images", "more images"])
def test_vendi_score_is_of_the_eigenvalues_and_equals_vendi_score(count):
    rows = features(count, centre=0.3)
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    values = np.linalg.eigvals(unit @ unit.T / count).real
    entropy = -sum(value * np.log(value) for value in values if value > 1e-12)
    assert vendi_score(rows) == pytest.approx(np.exp(entropy), rel=1e-5)
    assert vendi_score(rows) == pytest.approx(vendi.score_dual(rows), rel=1e-3)


def test_vendi_score_counts_images_all_unlike():
    unlike = np.eye(7, 20, dtype=np.float32)
    assert vendi_score(unlike) == pytest.approx(7)
    assert vendi_score(np.repeat(unlike, 5, axis=0)) == pytest.approx(7)
    assert vendi_score(np.repeat(unlike[:1], 5, axis=0)) == pytest.approx(1)


def test_clip_score_is_the_cosine_of_each_pair():
    images, texts = features(9), features(9, seed=1, centre=0.3)
    expected = [
        sum(x * y for x, y in zip(image, text, strict=True))
        / (sum(x * x for x in image) * sum(y * y for y in text)) ** 0.5
        for image, text in zip(images.tolist(), texts.tolist(), strict=True)
    ]
    assert clip_score(images, texts) == pytest.approx(expected)
    assert min(expected) < 0 < max(expected)
    assert clip_score(images, 7 * images) == pytest.approx(np.ones(9))
    assert clip_score(0 * images, texts) == pytest.approx(np.zeros(9))


@pytest.mark.parametrize(
    ("n_gen", "n_real", "said"),
    [
        (2048, 50_000, "2048 images cannot fill the covariance of 2048 features"),
        (50_000, 100, "100 images cannot fill"),
        (2049, 50_000, "with 2049 images, under 10000, FID is too high"),
        (10_000, 10_000, None),
    ],
)
def test_few_images_give_a_warning_in_one_line(n_gen, n_real, said):
    found = small_sample_warning(n_gen, n_real, 2048)
    assert said in found if said else found is None
    assert "\n" not in (found or "")


def test_features_may_be_read_only_maps_of_a_file(tmp_path):
    a, b = features(30), features(40, seed=1)
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(mapped, b) == frechet_distance(a, b)
        assert kernel_distance(mapped, b) == kernel_distance(a, b)
        found = precision_recall_density_coverage(mapped, b)
    assert found == precision_recall_density_coverage(a, b)
    assert vendi_score(mapped) == vendi_score(a)
    assert frechet_distance(a.astype(np.float64), b) == frechet_distance(a, b)


PAIRED = [frechet_distance, kernel_distance, precision_recall_density_coverage, clip_score]


@pytest.mark.parametrize("measure", PAIRED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_features_that_are_not_finite_are_refused(measure, value, place):
    sets = [features(12), features(12, seed=1)]
    sets[place][7, 3] = value
    with pytest.raises(UserError, match="those of image 7"):
        measure(*sets)
    with pytest.raises(UserError, match="those of image 7"):
        vendi_score(sets[place])


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance], ids=lambda f: f.__name__)
@pytest.mark.parametrize("counts", [(1, 9), (9, 1), (0, 9)])
def test_one_image_is_refused(measure, counts):
    with pytest.raises(UserError, match=f"at least 2 images of each kind; got {min(counts)}"):
        measure(features(counts[0]), features(counts[1]))


def test_one_image_has_no_diversity():
    with pytest.raises(UserError, match="got 1"):
        vendi_score(features(1))


@pytest.mark.parametrize("counts", [(5, 9), (9, 5)])
def test_balls_to_the_kth_neighbour_need_more_than_k_images(counts):
    real, generated = map(features, counts)
    with pytest.raises(UserError, match="at least 6 images of each kind; got 5"):
        precision_recall_density_coverage(real, generated, k=5)
    assert precision_recall_density_coverage(real, generated, k=4)["coverage"] > 0


@pytest.mark.parametrize("measure", PAIRED, ids=lambda f: f.__name__)
def test_features_of_two_embedders_are_not_compared(measure):
    with pytest.raises(UserError, match="got 8 and 16"):
        measure(features(12), features(12, dims=8))
