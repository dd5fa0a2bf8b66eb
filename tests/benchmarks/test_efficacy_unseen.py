"""Captions that were not trained on, of planted results."""

import pytest

from benchmarks.efficacy import unseen
from benchmarks.efficacy.places import places
from benchmarks.efficacy.protocol import Protocol
from tests.benchmarks.planting import planted, with_unseen

WORSE = (0.2, 0.1, 0.1, 0.15, 0.3)
BETTER = (0.2, 0.1, 0.05, 0.05, 0.1)
FITS = (0.0, -0.1, -0.2, -0.2, -0.2)


def plant():
    """Plain and a method by two seeds, and a method of before such pictures were drawn."""
    return [
        *(with_unseen(planted(Protocol(), "plain", seed, 1, 1.0), WORSE) for seed in (0, 1)),
        planted(Protocol(), "plain", 2, 1, 1.0),
        *(with_unseen(planted(Protocol(), "ema", seed, 1, 0.5), BETTER, FITS) for seed in (0, 1)),
        planted(Protocol(), "ema", 2, 1, 0.5),
        planted(Protocol(), "agc", 0, 1, 0.5),
    ]


def known(found):
    return unseen.known_unseen(places({result.cell: result for result in found}))


def test_only_runs_that_have_drawn_them_count():
    (each,) = known(plant())
    assert (each.label, each.seeds) == ("ema", [0, 1])
    assert sorted(each.place.plain) == [0, 1]
    assert known([planted(Protocol(), m, 0, 1, 1.0) for m in ("plain", "agc")]) == []
    # Of a seed that only one of the two has, nothing is paired.
    plain, *_, ema, _, _ = plant()
    assert known([plain, ema]) == []


def test_quality_of_unseen_captions_is_compared_at_equal_updates_and_levels_are_of_it():
    (each,) = known(plant())
    assert each.end(unseen.MAIN).better.value == pytest.approx(0.2)
    assert each.end(unseen.FIT).better.value == pytest.approx(0.2)
    assert each.end(unseen.TRAINED).better.value == pytest.approx(0, abs=1e-9)
    # At equal KID of them, half of what plain memorizes.
    level = each.at_equal(unseen.MAIN).levels[-1]
    assert level.quality == pytest.approx(0.1, abs=1e-3)
    assert level.second.value == pytest.approx(level.first.value / 2, abs=1e-3)
    # Held-out losses are lowest at the third reading.
    for label, kid_R in (("plain", WORSE), ("ema", BETTER)):
        found = unseen.course(each.place.methods[label], unseen.MAIN)
        assert found == pytest.approx((kid_R[0], kid_R[2], kid_R[4]), abs=1e-3)


def test_the_report_tells_it_where_it_is_known(report_of):
    made = report_of(plant())
    section = made.section("Captions that were not trained on")
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| fluent")]
    assert [(row[1], row[2]) for row in rows] == [("plain", "2"), ("ema", "2"), ("ema", "2")]
    assert [cell.count(", ") for cell in rows[0][3:]] == [2, 2, 2]
    assert rows[2][4].startswith("+0.2000 [")
    short = made.section("In short")
    assert "**Captions that were not trained on**: on fluent (all weights) plain's KID" in short
    assert "is lower by +0.200 [" in short
    assert "not trained on" not in report_of([p for p in plant() if p.cell.seed == 2]).text
