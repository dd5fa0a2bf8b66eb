"""AGC against its rules written out as loops: the bank as the list of all losses it has seen.

A bin with losses l_1 .. l_n holds sum_j (1 - decay) decay^(n-j) l_j, in the order of the visits.
"""

import math

import pytest
import torch

from iet_sd.method.agc import bin_of, empty_bank, keep_mask, reference, update_bank
from iet_sd.presets import PRESETS

DECAY, THRESHOLD = 0.8, 0.8


def naive_reference(losses: list[float], bias: str) -> float:
    """What a bin compares with after ``losses``: its running mean, or that over its weight."""
    weights = [(1 - DECAY) * DECAY**age for age in reversed(range(len(losses)))]
    mean = math.fsum(w * loss for w, loss in zip(weights, losses, strict=True))
    if not losses or bias == "raw":
        return mean
    return mean / sum(weights)


def draw_batches(timesteps: list[int], batches: int = 60, size: int = 8):
    """Batches of (timesteps, losses), drawn from a few timesteps, so that most of them repeat."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.tensor(timesteps)
    for _ in range(batches):
        drawn = pool[torch.randint(len(pool), (size,), generator=generator)]
        yield drawn, torch.rand(size, generator=generator) + 0.05


@pytest.mark.parametrize(
    ("bins", "bias"),
    [
        pytest.param(PRESETS["paper"]["bank_bins"], PRESETS["paper"]["bank_bias"], id="paper"),
        pytest.param(
            PRESETS["corrected"]["bank_bins"], PRESETS["corrected"]["bank_bias"], id="corrected"
        ),
        (10, "raw"),
        (7, "corrected"),
        (1, "corrected"),
    ],
)
def test_reference_mask_and_bank_equal_the_rules_written_as_loops(bins, bias):
    bank = empty_bank(bins)
    seen: list[list[float]] = [[] for _ in range(bins)]
    kept = skipped = repeated = 0
    for timesteps, losses in draw_batches([0, 1, 19, 20, 499, 500, 980, 999]):
        bins_B = bin_of(timesteps, bins)
        reference_B = reference(bank, bins_B, DECAY, bias)
        mask_B = keep_mask(losses, reference_B, THRESHOLD)
        bank = update_bank(bank, bins_B, losses, DECAY)

        # The whole batch reads the bank as it was before the batch ...
        places = [math.floor(t * bins / 1000) for t in timesteps.tolist()]
        expected = [naive_reference(seen[place], bias) for place in places]
        keep = [x >= THRESHOLD * b for x, b in zip(losses.tolist(), expected, strict=True)]
        # ... and then writes every sample in order, the skipped ones too.
        for place, loss in zip(places, losses.tolist(), strict=True):
            seen[place].append(loss)

        torch.testing.assert_close(reference_B, torch.tensor(expected), rtol=1e-5, atol=1e-7)
        assert mask_B.tolist() == keep
        kept, skipped = kept + sum(keep), skipped + len(keep) - sum(keep)
        repeated += len(places) - len(set(places))
    values = [naive_reference(losses, "raw") for losses in seen]
    torch.testing.assert_close(bank.value_T, torch.tensor(values), rtol=1e-5, atol=1e-7)
    assert bank.visits_T.tolist() == [len(losses) for losses in seen]
    assert kept > 100
    assert skipped > 100
    assert repeated > 100


@pytest.mark.parametrize("bins", [1, 10, 50, 1000])
def test_bins_that_divide_the_timesteps_hold_equal_runs_of_neighbours(bins):
    expected = [t // (1000 // bins) for t in range(1000)]
    assert bin_of(torch.arange(1000), bins).tolist() == expected


@pytest.mark.parametrize(("bins", "timesteps"), [(7, 1000), (300, 1000), (3, 10), (50, 100)])
def test_other_numbers_of_bins_differ_by_one_timestep_at_most(bins, timesteps):
    places = bin_of(torch.arange(timesteps), bins, timesteps).tolist()
    assert places == sorted(places)
    sizes = [places.count(place) for place in range(bins)]
    assert sum(sizes) == timesteps
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("bias", ["raw", "corrected"])
def test_an_empty_bank_refers_to_zero_and_keeps_every_sample(bias):
    bank = empty_bank(5)
    assert (bank.value_T.dtype, bank.visits_T.dtype) == (torch.float32, torch.int64)
    reference_B = reference(bank, torch.tensor([0, 4, 4]), DECAY, bias)
    assert reference_B.tolist() == [0.0, 0.0, 0.0]
    assert keep_mask(torch.tensor([0.0, 1e-9, 3.0]), reference_B, THRESHOLD).all()


def test_the_corrected_reference_is_the_loss_itself_after_one_visit_or_equal_ones():
    bank = update_bank(empty_bank(2), torch.tensor([0, 1, 1, 1]), torch.full((4,), 0.37), DECAY)
    bins_B = torch.tensor([0, 1])
    torch.testing.assert_close(
        reference(bank, bins_B, DECAY, "corrected"), torch.tensor([0.37, 0.37])
    )
    # Uncorrected, n visits reach only the share 1 - decay^n of it.
    torch.testing.assert_close(
        reference(bank, bins_B, DECAY, "raw"), torch.tensor([0.37 * 0.2, 0.37 * 0.488])
    )


def test_a_timestep_repeated_in_a_batch_compounds_in_the_order_of_the_samples():
    bins_B, losses = torch.tensor([3, 3, 3]), torch.tensor([1.0, 2.0, 4.0])
    forward = update_bank(empty_bank(4), bins_B, losses, 0.5)
    assert forward.value_T.tolist() == [0, 0, 0, ((1 * 0.5) * 0.5 + 2 * 0.5) * 0.5 + 4 * 0.5]
    assert forward.visits_T.tolist() == [0, 0, 0, 3]
    backward = update_bank(empty_bank(4), bins_B, losses.flip(0), 0.5)
    assert backward.value_T[3].item() == ((4 * 0.5) * 0.5 + 2 * 0.5) * 0.5 + 1 * 0.5


def test_one_batch_leaves_the_same_bank_as_its_samples_one_by_one():
    (bins_B, losses), *_ = draw_batches([0, 1, 2], batches=1, size=50)
    whole = update_bank(empty_bank(3), bins_B, losses, DECAY)
    single = empty_bank(3)
    for i in range(50):
        single = update_bank(single, bins_B[i : i + 1], losses[i : i + 1], DECAY)
    torch.testing.assert_close(whole.value_T, single.value_T)
    assert torch.equal(whole.visits_T, single.visits_T)


def test_an_update_leaves_the_old_bank_as_it_was():
    old = update_bank(empty_bank(3), torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), DECAY)
    value, visits = old.value_T.clone(), old.visits_T.clone()
    update_bank(old, torch.tensor([0, 1, 2]), torch.tensor([5.0, 6.0, 7.0]), DECAY)
    assert torch.equal(old.value_T, value)
    assert torch.equal(old.visits_T, visits)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_a_loss_exactly_at_the_threshold_is_kept_and_one_just_below_is_not(threshold):
    reference_B = torch.tensor([2.0, 1.0, 0.3, 0.7])
    at = threshold * reference_B
    assert keep_mask(at, reference_B, threshold).all()
    below = torch.nextafter(at, torch.zeros(4))
    assert not keep_mask(below, reference_B, threshold).any()


def test_a_batch_far_below_the_bank_is_skipped_whole_and_still_enters_the_bank():
    bank = update_bank(empty_bank(1), torch.zeros(4, dtype=torch.int64), torch.ones(4), DECAY)
    bins_B, losses = torch.zeros(3, dtype=torch.int64), torch.full((3,), 0.01)
    before = reference(bank, bins_B, DECAY, "corrected")
    assert keep_mask(losses, before, THRESHOLD).tolist() == [False, False, False]
    after = update_bank(bank, bins_B, losses, DECAY)
    assert after.visits_T.tolist() == [7]
    assert after.value_T.item() == pytest.approx(naive_reference([1.0] * 4 + [0.01] * 3, "raw"))


def test_a_threshold_of_zero_keeps_every_sample():
    assert keep_mask(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0]), 0.0).all()
