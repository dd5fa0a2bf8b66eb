"""Planted truth: generators that copy a known share, exactly, mirrored, or nearly; or not at all.

On the bundled emoji and with the embedder that needs no weights, through the whole way from images
to measures.
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image, ImageOps

from iet_sd.evaluation.closeness import Closeness, l2_ratios
from iet_sd.evaluation.embedders import build_embedder
from iet_sd.evaluation.measures import Resampling, copying, distances
from iet_sd.evaluation.sets import Features, Images, Process
from iet_sd.evaluation.statistics import permutation_test

ROOT = Path(__file__).parents[2]
PROMPTS = 240
EXACT, MIRRORED, NEAR = 48, 24, 24  # 20 %, 10 %, 10 % of the prompts
COPIES = EXACT + MIRRORED + NEAR
VIEWS = {(name, flip) for name in ("generated", "train", "heldout") for flip in (False, True)}


class Planted:
    """Images in memory, as an `ImageSet`."""

    def __init__(self, images):
        self.images = images
        self.ids = [str(i) for i in range(len(images))]
        content = b"".join(image.tobytes() for image in images)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@cache
def emoji(split):
    rows = load_dataset(str(ROOT / "demo/data"), split=split)
    return [image.convert("RGB") for image in rows["image"]], np.array(rows["group"])


@cache
def halves():
    """Held-out images in two parts that share no group: a baseline, and what a generator draws."""
    images, groups = emoji("test")
    chosen = np.random.default_rng(0).permutation(np.unique(groups))
    first = np.isin(groups, chosen[: len(chosen) // 2])
    return (
        ([images[i] for i in np.flatnonzero(first)], groups[first]),
        ([images[i] for i in np.flatnonzero(~first)], groups[~first]),
    )


def jitter(image, rng):
    """A copy that was cropped, moved, and changed in colour a little."""
    left, top = rng.integers(0, 4, 2)
    cropped = image.crop((left, top, left + 61, top + 61)).resize(image.size, Image.BILINEAR)
    pixels = np.asarray(cropped, float) * rng.uniform(0.9, 1.0, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def train():
    images, _ = emoji("train")
    return Planted(images[:600])


@pytest.fixture(scope="module")
def evaluated(train, tmp_path_factory):
    """Features and closeness of a generator, with the first half of the held-out images."""
    cache_dir = tmp_path_factory.mktemp("cache")

    def evaluate(images, spec="pixels"):
        (heldout, groups), _ = halves()
        embedder = build_embedder(spec, device=torch.device("cpu"))
        sets = Images(Planted(images), train, Planted(heldout))
        features = Features(embedder, sets, cache_dir, 64, Process(), VIEWS)
        near = Closeness.of(features, np.arange(len(images)) % len(train))
        by = Resampling(
            np.arange(len(images)), np.unique(groups, return_inverse=True)[1], resamples=500
        )
        return features, near, by

    return evaluate


@pytest.fixture(scope="module")
def copier(train):
    """Copies of training images 0, 1, 2, ... in the places of `COPIES`, then held-out images."""
    rng = np.random.default_rng(1)
    (_, _), (fresh, _) = halves()
    images = [train[i] for i in range(COPIES)]
    images[EXACT : EXACT + MIRRORED] = map(ImageOps.mirror, images[EXACT : EXACT + MIRRORED])
    images[EXACT + MIRRORED :] = [jitter(image, rng) for image in images[EXACT + MIRRORED :]]
    chosen = rng.permutation(len(fresh))[: PROMPTS - COPIES]
    return images + [fresh[i] for i in chosen]


def shown(near, by, thresholds=(0.97,)):
    found = copying(
        near.generated.value_QK[:, 0],
        near.own_G,
        near.train.value_QK[:, 0],
        near.heldout.value_QK[:, 0],
        thresholds,
        by,
    )
    return {m.name: m for m in found}


def test_exact_and_mirrored_copies_are_never_missed(evaluated, copier):
    _, near, _ = evaluated(copier)
    exact, mirrored = slice(0, EXACT), slice(EXACT, EXACT + MIRRORED)
    assert (near.generated.value_QK[exact, 0] == 1).all()
    assert (near.generated.value_QK[mirrored, 0] > 1 - 1e-6).all()
    same = near.generated.index_QK[:COPIES, 0] == np.arange(COPIES)
    # Emoji that are their own mirror image, or another's, are as near as the one copied.
    assert same[exact].all()
    assert same[mirrored].mean() > 0.9
    assert near.own_G[: EXACT + MIRRORED] == pytest.approx(1, abs=1e-6)


def test_near_copies_are_found(evaluated, copier):
    _, near, _ = evaluated(copier)
    jittered = slice(EXACT + MIRRORED, COPIES)
    assert (near.generated.index_QK[jittered, 0] == np.arange(COPIES)[jittered]).mean() > 0.8
    assert np.median(near.generated.value_QK[jittered, 0]) > 0.9


def test_the_share_of_copies_is_recovered(evaluated, copier):
    """What is above the held-out share is the planted one, within the interval."""
    _, near, by = evaluated(copier)
    found = shown(near, by, thresholds=(0.999,))
    excess = found["excess_share_above_0.999"]
    assert excess.low <= (EXACT + MIRRORED) / PROMPTS <= excess.high
    assert excess.high - excess.low < 0.15
    assert found["excess_score"].low > 0
    assert found["excess_p_value"].value < 0.001


def test_the_l2_ratio_finds_the_copies_too(evaluated, copier):
    features, _, by = evaluated(copier, "raw_pixels")
    ratios = {name: l2_ratios(features, name) for name in ("generated", "heldout")}
    # Of an image whose mirror image is no neighbour of another's, an exact copy has ratio 0.
    assert (ratios["generated"].ratio_Q[:EXACT] == 0).all()
    found = {m.name: m for m in distances(ratios, by)}
    excess = found["excess_l2_copies"]
    assert excess.low <= COPIES / PROMPTS
    assert excess.high >= (EXACT + MIRRORED) / PROMPTS
    assert found["mq_15"].value >= EXACT + MIRRORED


def test_a_generator_of_new_images_has_no_excess(evaluated):
    (_, _), (fresh, groups) = halves()
    _, near, by = evaluated(fresh)
    by = Resampling(np.unique(groups, return_inverse=True)[1], by.group_H, by.resamples)
    found = shown(near, by)
    for name in ("excess_score", "excess_mean", "excess_share_above_0.97"):
        assert found[name].low <= 0 <= found[name].high, name
    assert found["excess_p_value"].value > 0.05


def test_false_alarms_come_at_the_nominal_rate(evaluated):
    """Of 200 generators that draw held-out images, about 5 % are called copiers at p < 0.05."""
    (_, _), (fresh, _) = halves()
    _, near, _ = evaluated(fresh)
    similarity = np.concatenate([near.generated.value_QK[:, 0], near.heldout.value_QK[:, 0]])
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        a, b = np.array_split(rng.permutation(similarity), 2)
        alarms += permutation_test(a, b, resamples=299, seed=int(rng.integers(2**31))) < 0.05
    # A binomial of 200 draws at 5 % lies in 4 ... 17 with a chance of 99 %.
    assert 4 <= alarms <= 17
