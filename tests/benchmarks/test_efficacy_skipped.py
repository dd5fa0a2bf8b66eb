"""What AGC skips, of planted results."""

import numpy as np
import pytest

from benchmarks.efficacy import skipped
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.tables import is_often
from tests.benchmarks.planting import planted

EASY, FALLS, RESEMBLES = skipped.WITH


def plant(seed, shares_P, setting="duplicated"):
    """A plain run and one with AGC, of 20 images that differ in all that may go with a skip."""
    rng = np.random.default_rng(seed)
    plain = planted(Protocol(), "plain", seed, 1, 1.0, setting)
    agc = planted(Protocol(), "agc", seed, 1, 0.5, setting, skipped=32, trained=96)
    loss_P, falls_P, resembles_P = rng.uniform(0.1, 0.9, (3, 20))
    plain.rows[0]["train_loss"] = loss_P.tolist()
    plain.rows[-1]["train_loss"] = (loss_P * np.exp(-falls_P)).tolist()
    plain.rows[0]["own_similarity_pixels"] = [0.1] * 20
    plain.rows[-1]["own_similarity_pixels"] = (0.1 + resembles_P).tolist()
    names = [f"image {p}" for p in range(20)]
    for run in (plain, agc):
        run.about.update({"prompt_ids": names, "train_ids": [*names, "of no prompt"]})
    # As an image there is that is not drawn: its place is not that of a prompt's.
    agc.about["train_ids"].reverse()
    agc.about["skipped"] = [0.9, *shares_P(loss_P, falls_P, resembles_P)[::-1]]
    return plain, agc, (loss_P, falls_P, resembles_P)


def ranks(values):
    return np.argsort(np.argsort(values))


def test_what_goes_with_skips_is_a_rank_correlation_over_images():
    plain, agc, beside = plant(0, lambda loss_P, *_: 0.5 - 0.1 * loss_P**3)
    found = skipped.correlations({0: agc}, {0: plain})
    assert found[EASY].value == pytest.approx(-1)
    for title, values in zip((FALLS, RESEMBLES), beside[1:], strict=True):
        naive = np.corrcoef(ranks(skipped.skipped_of({0: agc})), ranks(values))[0, 1]
        assert found[title].value == pytest.approx(naive)
        assert found[title].low < naive < found[title].high
    assert found[FALLS].low < 0 < found[FALLS].high
    found = skipped.correlations({0: plant(0, lambda *each: each[2] / 2)[1]}, {0: plain})
    assert found[RESEMBLES].value == pytest.approx(1)


def test_seeds_count_alike():
    runs = [plant(seed, lambda _, falls_P, __: falls_P / 2) for seed in (0, 1)]
    agc = {seed: run[1] for seed, run in enumerate(runs)}
    found = skipped.correlations(agc, {seed: run[0] for seed, run in enumerate(runs)})
    assert found[FALLS].value == pytest.approx(1)
    falls_P = np.mean([run[2][1] for run in runs], axis=0)
    loss_P = np.mean([run[2][0] for run in runs], axis=0)
    naive = np.corrcoef(ranks(falls_P), ranks(loss_P))[0, 1]
    assert found[EASY].value == pytest.approx(naive)


def test_the_report_says_it_where_it_is_known(report_of):
    plain, agc, _ = plant(0, lambda loss_P, *_: 0.5 - 0.1 * loss_P)
    often_P = is_often(agc)
    agc.about["skipped"] = [0.9, *np.where(often_P, 0.75, 0.25)[::-1]]
    made = report_of([plain, agc])
    (row,) = [x for x in made.section("What AGC skips").splitlines() if "| agc |" in x]
    cells = row.split(" | ")
    assert cells[:6] == [
        "| duplicated, full",
        "agc",
        "1",
        "25%",
        "25% to 75%",
        "25%, 75%",
    ]
    short = made.section("In short")
    assert "**What `agc` skips** on duplicated (n = 1): " in short
    assert "visits to images that are there once, and often, it skips 25%, 75%." in short
    # Of runs from before it was kept, or of methods that skip nothing.
    del agc.about["skipped"]
    plain.about["skipped"] = [0.0] * 21
    assert "What AGC skips" not in report_of([plain, agc]).text


def test_images_that_are_all_alike_go_with_nothing():
    plain, agc, _ = plant(0, lambda *_: np.full(20, 0.25))
    found = skipped.correlations({0: agc}, {0: plain})
    assert [each.value for each in found.values()] == [0, 0, 0]
