"""Tables and pictures of a report on planted results."""

import re

import numpy as np
import pytest

from benchmarks.efficacy import study
from benchmarks.efficacy.protocol import Protocol
from tests.benchmarks.planting import planted


def test_the_closest_pairs_are_those_of_the_last_reading_where_they_are_kept(report_of):
    found = [
        planted(Protocol(), method, 0, 1, factor, setting)
        for setting in study.SETTINGS
        for method, factor in (("plain", 1.0), ("agc", 0.5))
    ]
    plain, agc = found[:2]
    plain.rows[-1]["similarity_pixels"][4] = agc.rows[-1]["similarity_pixels"][5] = 0.99
    plain.rows[-1]["similarity_pixels"][8] = agc.rows[-1]["similarity_pixels"][3] = 0.98
    asked = []
    made = report_of(found, asked)
    # Beside the images of the first prompts: those that the 5th and 9th picture resemble, and the
    # other method's 6th and 4th.
    assert [ids for ids in asked if ids != ["1f600"] * 2][:2] == [
        ["1f601", "1f602"],
        ["1f602", "1f600"],
    ]
    section = made.section("The closest pairs")
    assert re.findall(r"\(pictures/(.+?)\)", section) == [
        "fluent-full-closest.png",
        "duplicated-full-closest.png",
    ]
    for row in plain.rows:
        del row["closest_pictures"]
    assert "fluent-full-closest" not in report_of(found).text


def test_the_report_tells_duplicated_images_apart(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0, "duplicated")]
    found.append(planted(Protocol(), "agc", 0, 1, 0.5, "duplicated"))
    # Those that are often are given back with half of the similarity that others have.
    often = np.array(found[1].about["copies"]) > 1
    for row in found[1].rows[1:]:
        row["similarity_pixels"] = list(np.where(often, 0.5, row["similarity_pixels"]))
    text = report_of(found).page("duplicated-full")
    # Of 20 prompts the first 8 give their own image, of which 5 are shown often.
    assert "| plain | 1 | 20% | 100% |" in text
    table = text.partition("excess similarity of images shown often")[2].partition("##")[0]
    (row,) = [line.split("|") for line in table.splitlines() if line.startswith("| agc ")]
    baseline = np.mean(found[1].about["heldout_similarity"]["pixels"])
    assert float(row[-6]) == pytest.approx(0.5 - baseline, abs=6e-4)


def test_a_part_is_judged_by_the_method_without_it_and_a_setting_by_the_method_as_it_is(report_of):
    made = report_of(
        [
            planted(Protocol(), "plain", 0, 1, 1.0),
            planted(Protocol(), "agc", 0, 1, 0.8),
            planted(Protocol(), "agc_random_skip", 0, 1, 0.4),
            planted(Protocol(), "agc_taa_gentle", 0, 1, 0.4),
            planted(Protocol(), "agc_taa_gentle", 0, 1, 0.2, flags=(("agc_threshold", 0.9),)),
        ]
    )
    table = made.page("parts")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    said = {
        (row[2], row[3]): (row[5], *re.search(r"\*\*(.+?)\*\*.*?, (-?\d+)%", row[6]).groups())
        for row in rows
    }
    assert said == {
        ("agc", "plain"): ("+0.400, +0.320", "less", "20"),
        ("agc", "agc_random_skip"): ("+0.160, +0.320", "more", "-100"),
        ("agc_taa_gentle", "agc"): ("+0.320, +0.160", "less", "50"),
        ("agc_taa_gentle, agc_threshold 0.9", "agc_taa_gentle"): ("+0.160, +0.080", "less", "50"),
    }
    lines = made.section("Part by part").splitlines()
    short = [line.strip("|").split(" | ") for line in lines if "fluent, full" in line]
    assert {(row[0].strip(), row[1]): row[-1].strip() for row in short} == {
        ("AGC", "agc"): "helps",
        ("AGC's choice, and not as many at random", "agc"): "hurts",
        ("TAA beside AGC", "agc_taa_gentle"): "helps",
        ("agc_threshold 0.9", "agc_taa_gentle"): "helps",
    }
