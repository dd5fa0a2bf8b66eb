"""`--taa_variants`: a few augmentations of each image, the same with and without a cache."""

import numpy as np
import pytest
import torch
from scipy import stats

from iet_sd.data.augmentation import Augmentation
from iet_sd.data.dataset import TrainingImages
from iet_sd.data.latents import Variants
from iet_sd.data.shards import Visit
from iet_sd.data.sources import load_source
from iet_sd.engine.beforehand import choose
from iet_sd.errors import UserError
from tests.engine.preparing import FITTING, prepare, tables

STRONG = [Augmentation(float(m), 2, "gentle", 3) for m in (9, 10)]


def pixels_of(config):
    """The samples without a cache."""
    read = lambda caption: {"input_ids": torch.zeros(1)}  # noqa: E731
    return TrainingImages(load_source(config.data), read, config.data)


def test_a_visit_sees_with_the_cache_what_it_sees_without(settings):
    config = settings(random_flip=True, **FITTING)
    plain = pixels_of(config)
    variants = Variants(plain.source, config.data, None, STRONG)
    assert len(variants) == 16 * 2 * 2 * 3
    met = set()
    for seed in range(150):
        visit, how = Visit(seed % 3, seed), STRONG[seed % 2]
        row = variants.row_of(visit, how)
        met.add(row)
        seen = plain.example(visit, how)
        assert torch.equal(variants[row]["pixel_values"], seen["pixel_values"])
        assert not torch.equal(seen["pixel_values"], plain.example(visit)["pixel_values"])
    # Two flips, two magnitudes and three variants of each of three images.
    assert len(met) == 36
    several = {tuple(variants[row]["pixel_values"].flatten().tolist()) for row in met}
    assert len(several) > 30


def test_every_variant_is_drawn_as_often_and_a_flip_does_not_change_it(settings):
    config = settings(random_flip=True, **FITTING)
    source = load_source(config.data)
    variants = Variants(source, config.data, None, STRONG)
    rows = np.array([variants.row_of(Visit(5, seed), STRONG[1]) for seed in range(1200)])
    found, counts = np.unique(rows, return_counts=True)
    assert len(found) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    kept = [variants.variant(int(row)) for row in found]
    assert {each.index for each in kept} == {5}
    seeds = [(each.placing.flip, each.augmented[1].initial_seed()) for each in kept]
    flipped = {seed for flip, seed in seeds if flip}
    assert flipped == {seed for flip, seed in seeds if not flip}
    assert len(flipped) == 3


def test_without_digests_a_sample_has_variants_too(settings):
    images = pixels_of(settings(check_images="none", **FITTING))
    how = STRONG[0]
    seen = {
        images.example(Visit(2, seed), how)["pixel_values"].numpy().tobytes() for seed in range(60)
    }
    assert len(seen) == 3


def test_another_way_of_augmenting_is_another_table_and_leaves_the_other_images(settings, tmp_path):
    base = {"cache": "on", **FITTING}
    prepare(settings(**base))
    for given in (
        {"taa_variants": 1},
        {"taa_variants": 2},
        {"taa_variants": 2, "taa_magnitude": 2.0},
        {"taa_variants": 2, "taa_operations": "randaugment"},
        {"taa_variants": 2, "taa_num_ops": 1},
        {"taa_variants": 2, "taa_min_strength": 0.5},
    ):
        before = set(tables(tmp_path))
        prepare(settings(**base | given))
        new = [path.name.split("-")[0] for path in set(tables(tmp_path)) - before]
        assert new == ["augmented"], given
    for given in ({"taa_sharpness": 1.0}, {"agc_threshold": 0.7}, {"method": "iet_agc"}):
        before = set(tables(tmp_path))
        prepare(settings(**base | {"taa_variants": 2} | given))
        assert set(tables(tmp_path)) == before, given


def test_auto_makes_no_more_than_is_visited_and_says_so(settings):
    config = settings(cache="auto", taa_variants=2, **FITTING)
    source = load_source(config.data)
    # Magnitudes 1 to 5.
    few, many = (choose(config, source, visits) for visits in (159, 160))
    assert few.variants is not None
    assert few.augmented is None
    assert "augmented images are encoded in every visit: there are more" in few.describe()
    assert len(many.augmented) == 160
    assert "160 views of augmented images" in many.describe()
    off = choose(settings(cache="off", taa_variants=2, **FITTING), source, 10**6)
    assert off.augmented is None


def test_fewer_than_none_are_refused(settings):
    with pytest.raises(UserError, match="--taa_variants must not be negative; got -1"):
        settings(taa_variants=-1)
