"""What the efficacy study asks for, and what it measures by."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy.spatial.distance import pdist, squareform

from benchmarks.efficacy import beyond, controls, results, study
from benchmarks.efficacy.cell import argv_of, flags_of
from benchmarks.efficacy.edges import edges
from benchmarks.efficacy.encoding import encode_each_once
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.readings import Compared, frechet_of_each, kid_of_each
from benchmarks.efficacy.study import DEFAULT_RATE, TUNING_SEED, Cell
from iet_sd import arguments
from iet_sd.evaluation.closeness import unit
from iet_sd.evaluation.kid import kid_interval
from iet_sd.evaluation.quality import frechet_distance


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_cell_of_a_study_is_one_that_the_command_line_takes(name):
    cells = study.cells(name, lambda mode, method: DEFAULT_RATE[mode, method])
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert Cell.from_dict(json.loads(json.dumps(cell.as_dict()))) == cell
        protocol = Protocol()
        folders = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}
        config = arguments.load(argv_of(folders | flags_of(cell, protocol)))
        total = config.method.steps_per_round * config.method.num_rounds * cell.num_shards
        assert total == protocol.updates * cell.times


def test_every_method_is_in_a_study_and_every_swap_exists():
    cells = [
        c for name in study.STUDIES for c in study.cells(name, lambda m, t: DEFAULT_RATE[m, t])
    ]
    assert {cell.method for cell in cells} == set(METHODS)
    swaps = {method.swap for method in METHODS.values() if method.swap}
    assert swaps <= set(vars(controls)) ^ set(vars(beyond)), "each in one of the two"


def fake(cell, heldout_loss):
    rows = [{"heldout_loss": [value, value]} for value in (0.0, *heldout_loss)]
    return results.Result(cell, {}, {}, rows)


def test_rates_are_chosen_by_the_lowest_heldout_loss_of_the_tuning_seed():
    low, middle, high = sorted(study.tuning("full", "iet"), key=lambda cell: cell.learning_rate)
    found = {low: fake(low, [5, 4]), middle: fake(middle, [4, 3]), high: fake(high, [2, 9])}
    other = replace(low, seed=0)
    assert results.tuned_rate(found, "full", "iet") == high.learning_rate
    assert (
        results.tuned_rate(found | {other: fake(other, [1, 1])}, "full", "iet")
        == high.learning_rate
    )
    assert results.tuned_rate({low: found[low], high: found[high]}, "full", "iet") is None
    assert {low.seed, middle.seed, high.seed} == {TUNING_SEED}


@torch.no_grad()
def test_encoding_each_once_gives_the_encoders_moments(monkeypatch):
    vae = AutoencoderKL(sample_size=32)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = vae.encode(x).latent_dist
    monkeypatch.setattr(AutoencoderKL, "encode", AutoencoderKL.encode)
    encode_each_once()
    first, again = (vae.encode(x[[2, 0, 1]]).latent_dist for _ in range(2))
    assert torch.allclose(first.mean, plain.mean[[2, 0, 1]], atol=1e-5)
    assert torch.allclose(first.std, plain.std[[2, 0, 1]], atol=1e-5)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(vae.encode(x[:1]).latent_dist.mean[0], again.mean[1])


def test_edges_know_a_shifted_shape_from_another_one():
    def page(draw):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        draw(pixels)
        return Image.fromarray(pixels)

    def bar(top, across):
        def draw(pixels):
            part = pixels[top : top + 8, 16:48] if across else pixels[16:48, top : top + 8]
            part[:] = (200, 30, 30)

        return draw

    images = [page(bar(24, True)), page(bar(25, True)), page(bar(24, False)), page(lambda _: None)]
    features = edges(images)
    assert features.shape == (4, 176)
    assert features.dtype == np.float32
    length = np.linalg.norm(features, axis=1)
    cosine = features @ features.T / np.maximum(np.outer(length, length), 1e-12)
    assert cosine[0, 1] > 0.9
    assert cosine[0, 2] < 0.7
    # A page without ink has no features, and resembles nothing.
    assert (features[3] == 0).all()


def test_what_each_picture_adds_to_kid_has_its_mean_and_its_spread():
    rng = np.random.default_rng(0)
    gen, real = rng.standard_normal((200, 5)), rng.standard_normal((150, 5)) + 0.3
    gen, real = (unit(each) * np.sqrt(5) for each in (gen, real))
    each = kid_of_each(gen, real)
    real_units = np.arange(150)
    whole = kid_interval(gen, real, np.arange(200), real_units).value
    assert each.mean() == pytest.approx(whole, rel=1e-9)
    # The jackknife over pictures.
    without = [
        kid_interval(np.delete(gen, p, 0), real, np.arange(199), real_units).value
        for p in range(0, 200, 4)
    ]
    assert 199 * np.std(without) == pytest.approx(each[::4].std(), rel=0.02)
    assert np.corrcoef(-np.array(without), each[::4])[0, 1] > 0.999


def test_what_each_picture_adds_to_the_frechet_distance_has_its_mean_and_its_spread():
    rng = np.random.default_rng(0)
    scale = np.linspace(2, 0.1, 60)

    def drawn(count, shift):
        return rng.standard_normal((count, 60)) * scale + shift

    gen, real = drawn(40, 0.3), drawn(50, 0.1)
    each = frechet_of_each(gen, real)
    assert each.mean() == pytest.approx(frechet_distance(unit(gen), unit(real)), rel=1e-5)
    without = [frechet_distance(unit(np.delete(gen, p, 0)), unit(real)) for p in range(len(gen))]
    assert each - each.mean() == pytest.approx(39 * (np.mean(without) - without), abs=2e-4)
    # The same spread as that of distances of pictures drawn anew.
    again = [frechet_of_each(drawn(40, 0.3), real).mean() for _ in range(100)]
    assert each.std() / np.sqrt(40) == pytest.approx(np.std(again), rel=0.3)
    assert frechet_of_each(real, real).mean() == pytest.approx(0, abs=1e-6)


def test_a_picture_that_is_its_captions_image_fits_and_another_one_does_not():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(5)]

    def features(pictures):
        return np.stack([np.asarray(p, np.float32).ravel() - 128 for p in pictures])

    compared = Compared(features, np.empty((0, 192)), features(images), np.empty(0), np.empty(0))
    own_U = np.array([3, 0, 4])
    cosine_HH = 1 - squareform(pdist(features(images), "cosine"))
    for drawn in ((3, 0, 4), (1, 2, 0)):
        pictures = [images[h] for h in drawn]
        found = compared.measure_unseen(pictures, own_U)
        for misfit, own, h in zip(found["misfit"], own_U, drawn, strict=True):
            others = np.delete(cosine_HH[h], own).mean()
            assert misfit == pytest.approx(others - cosine_HH[h, own], abs=1e-6)
        fits = drawn == tuple(own_U)
        assert ((found["misfit"] < -0.8) == fits).all()
        naive = kid_of_each(features(pictures), features(images))
        assert np.allclose(found["kid_unseen"], naive)
        naive = frechet_of_each(features(pictures), features(images))
        assert np.allclose(found["frechet_unseen"], naive)
