"""TAA against its formula: strength exp(-sharpness * |loss / threshold - b| / b)."""

import math

import pytest
import torch

from iet_sd.method.taa import magnitudes, strength, whole_magnitudes
from iet_sd.presets import PRESETS

THRESHOLD, SHARPNESS = 0.8, 5.0


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
def test_strength_equals_the_formula_sample_by_sample(threshold, sharpness):
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(200, generator=generator) * 2
    reference_B = torch.rand(200, generator=generator) + 0.01
    expected = [
        math.exp(-sharpness * abs(loss / threshold - b) / b)
        for loss, b in zip(losses.tolist(), reference_B.tolist(), strict=True)
    ]
    result = strength(losses, reference_B, threshold, sharpness)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("b", [0.003, 1.0, 40.0])
def test_strength_at_the_known_points(b):
    ratios = torch.tensor([THRESHOLD, 1.0, 1.2, 10.0])  # loss as a multiple of the bank's mean
    result = strength(ratios * b, torch.full((4,), b), THRESHOLD, SHARPNESS).tolist()
    assert result[0] == pytest.approx(1.0, abs=1e-5)
    assert result[1] == pytest.approx(0.2865, abs=1e-4)
    assert result[2] == pytest.approx(0.0821, abs=1e-4)
    assert result[3] == pytest.approx(0.0, abs=1e-9)


def test_an_empty_bin_gives_strength_zero_and_leaves_its_neighbours_alone():
    losses, reference_B = torch.tensor([0.0, 0.5, 0.8]), torch.tensor([0.0, 0.0, 1.0])
    result = strength(losses, reference_B, THRESHOLD, SHARPNESS).tolist()
    assert result == pytest.approx([0.0, 0.0, 1.0], abs=1e-5)


def test_without_a_threshold_there_is_no_distance_to_it_and_strength_is_zero():
    losses, reference_B = torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5])
    assert strength(losses, reference_B, 0.0, SHARPNESS).tolist() == [0.0, 0.0]


def test_magnitudes_per_sample_are_fractions_of_the_scale():
    mode = PRESETS["corrected"]["taa_strength"]
    result = magnitudes(torch.tensor([0.0, 0.25, 0.5, 1.0]), 5.0, mode)
    assert result == pytest.approx([0.0, 1.25, 2.5, 5.0])


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ([1.0, 1.0, 1.0], 5.0),
        ([1.0, 0.5, 0.0], 2.0),  # 5 * 0.5 = 2.5, cut
        ([0.19, 0.19, 0.19], 0.0),  # 5 * 0.19 = 0.95, cut
        ([0.9, 0.9, 0.9], 4.0),
        ([0.0], 0.0),
    ],
)
def test_magnitudes_of_a_batch_are_its_mean_strength_cut_to_a_whole_number(strengths, expected):
    result = magnitudes(torch.tensor(strengths), 5.0, PRESETS["paper"]["taa_strength"])
    assert result == [expected] * len(strengths)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_magnitudes_of_no_samples_are_none(mode):
    assert magnitudes(torch.zeros(0), 5.0, mode) == []


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("scale", [5.0, 4.5, 0.3, 30.0])
@pytest.mark.parametrize("least", [0.0, 0.1, 0.5, 1.0])
def test_whole_magnitudes_are_all_that_occur_and_no_others(mode, scale, least):
    strength_Q = torch.linspace(least, 1.0, 4001).clamp(min=least)
    parts = strength_Q if mode == "sample" else strength_Q[:, None]
    found = [m for part in parts for m in magnitudes(part.reshape(-1), scale, mode, whole=True)]
    assert sorted(set(found)) == whole_magnitudes(least, scale, mode)
    if mode == "sample":
        exact = magnitudes(strength_Q, scale, mode)
        assert all(abs(m - e) <= 0.5 + 1e-6 for m, e in zip(found, exact, strict=True))
