"""RESULTS.md of planted results."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from benchmarks.efficacy import analysis, report, results, study
from benchmarks.efficacy.cell import flags_of
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.study import DEFAULT_RATE, TUNING_SEED, Cell
from iet_sd.evaluation.statistics import bootstrap


def planted(protocol, method, seed, shards, factor, setting="fluent", flags=(), **counts):
    """A result whose memorization is ``factor`` times that of plain, at the same losses.

    ``counts``: what a reading adds to a count, in place of 128.
    """
    rng = np.random.default_rng(seed)
    R, P = 5, 20
    heldout = np.array([0.08, 0.06, 0.05, 0.055, 0.07])
    gap = factor * np.array([0.0, 0.005, 0.01, 0.02, 0.04])
    memory = factor * np.array([0.0, 0.05, 0.1, 0.2, 0.4])
    around = rng.standard_normal(P) / 1000
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(picture, "WEBP")
    rows = [
        {
            "round": 2 * r,
            **{name: counts.get(name, 128) * r for name in results.COUNTS},
            "moved": 0,
            "strength_sum": 0.0,
            "train_seconds": 100.0 * r,
            "heldout_loss": (heldout[r] + around).tolist(),
            "train_loss": (heldout[r] - gap[r] + around).tolist(),
            "l2_ratio": (1.2 - memory[r] + around).tolist(),
            "pictures": [picture.getvalue()] * 2,
            "read_seconds": 10.0,
        }
        | {
            f"{key}_{embedder}": value
            for embedder in ("pixels", "edges")
            for key, value in {
                "similarity": (0.5 + memory[r] + around).tolist(),
                "own_similarity": (0.4 + memory[r] + around).tolist(),
                "is_own": (np.arange(P) < 20 * memory[r]).tolist(),
                "authentic": (np.arange(P) > 20 * memory[r]).tolist(),
                "kid": (heldout[r] + around).tolist(),
            }.items()
        }
        for r in range(R)
    ]
    rate = DEFAULT_RATE["full", METHODS[method].tuned_as]
    cell = Cell(setting, "full", method, rate, seed, shards, flags=flags)
    about = {
        "prompts": [f"prompt {p}" for p in range(P)],
        "prompt_ids": ["1f600"] * P,
        "copies": [10] * 5 + [1] * 15,
        "flags": json.loads(json.dumps(flags_of(cell, Protocol()))),
        "heldout_similarity": {"pixels": [0.5] * 8, "edges": [0.5] * 8},
    }
    return results.Result(cell, protocol.as_dict(), about, rows)


def spoilt(result):
    """The same with pictures that look like nothing."""
    for row in result.rows:
        row["kid_edges"] = [value + 0.1 for value in row["kid_edges"]]
    return result


@pytest.fixture
def report_of(monkeypatch, tmp_path):
    """The text of RESULTS.md for some results; of its intervals what they are, not how exactly."""
    monkeypatch.setattr(
        analysis,
        "bootstrap",
        lambda *given, resamples, **more: bootstrap(*given, resamples=100, **more),
    )

    def make(found):
        monkeypatch.setattr(report.files, "read_all", lambda *_: {r.cell: r for r in found})
        monkeypatch.setattr(report, "_training_images", lambda *_: [])
        return report.write(tmp_path, tmp_path, Protocol()).read_text()

    return make


def test_the_report_says_what_was_planted_and_of_how_many_seeds(report_of, tmp_path):
    protocol = Protocol()
    text = report_of(
        [
            *(planted(protocol, "plain", seed, 1, 1.0) for seed in (0, 1)),
            # Half as many samples, and three times the passes.
            *(
                planted(protocol, "iet", seed, 4, 0.5, trained=64, forward=384, backward=384)
                for seed in (0, 1)
            ),
            planted(protocol, "agc", 0, 1, 1.5),
            spoilt(planted(protocol, "ema", 0, 1, 0.5)),
            planted(protocol, "plain", TUNING_SEED, 1, 1.0),
            planted(protocol, "iet", TUNING_SEED, 4, 0.5),
        ]
    )
    assert re.search(r"\*\*iet\*\* \(n = 2\): less\. .*50% \[\d+%, \d+%\] of it", text)
    assert re.search(r"\*\*agc\*\* \(n = 1\): more\.", text)
    assert re.search(r"\*\*ema\*\* \(n = 1\): less, with worse pictures\.", text)
    glance = text.partition("## At a glance")[2].partition("## 256")[0]
    rows = [line for line in glance.splitlines() if line.startswith("| fluent, full | ")]
    iet, *spent = (row for row in rows if row.startswith("| fluent, full | iet |"))
    assert re.search(r"\| 2 \| \*\*less\*\*: .*50% \[\d+%, \d+%\] of it", iet)
    assert METHODS["iet"].text in iet
    updates, samples, compute = (row.partition(" | 2 | ")[2] for row in spent)
    assert re.match(r"512, 512 \| \+0\.400 \| \+0\.200 \| 50% \[\d+%, \d+%\] ", updates)
    assert updates.endswith("| **less**, equal quality |")
    # Plain has trained as many after half of its run, where it is at its best.
    assert samples.startswith("256, 512 | +0.100 | +0.200 | -100% [")
    assert samples.endswith("| **more**, worse held-out loss and KID (edges) and KID (pixels) |")
    # Plain's compute is that of the VAE too, so the method has spent it after a third and more.
    assert 512 / 3 < int(re.match(r"512, (\d+) \| \+0\.400 \| ", compute)[1]) < 256
    spoilt_row = [row for row in rows if row.startswith("| fluent, full | ema |")][-1]
    assert spoilt_row.endswith("| **less**, worse KID (edges) |")
    assert "the caption's own for 0% of pictures before training, 10% at the lowest" in text
    for name in re.findall(r"\]\((pictures/.+?)\)", text):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 60
    # Cells and hours that are left.
    wanted = len(study.cells("first", lambda mode, method: DEFAULT_RATE[mode, method]))
    assert f"| `first` | {wanted} | 8 |" in text


def test_the_goal_is_reached_on_all_data_or_not_at_all(report_of):
    """By a method at half of plain's memorization, and not by one that is so on two of three."""
    found = [
        planted(
            Protocol(), method, 0, shards, 0.8 if (method, setting) == hard else factor, setting
        )
        for setting in study.SETTINGS
        for method, shards, factor in (("plain", 1, 1.0), ("agc", 1, 0.5), ("ema", 1, 0.5))
        for hard in [("ema", "twemoji")]
    ]
    text = report_of([*found, planted(Protocol(), "iet", 0, 4, 0.1)])
    table = text.partition("### The goal")[2].partition("###")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| full | ")]
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        ("ema", "1, 1, 1", "no |"),
        ("agc", "1, 1, 1", "yes |"),
    ]
    assert all(re.match(r"50% \[\d+%, \d+%\]; \+0\.\d+ \[\+", cell) for cell in rows[1][3:6])
    assert rows[0][5].startswith("20% [")


def test_the_report_marks_what_is_to_be_run_again(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0), planted(Protocol(), "iet", 0, 4, 0.5)]
    found[1].about["flags"]["num_rounds"] = 3
    text = report_of(found)
    assert "| iet, to be run again | 1 |" in text
    assert re.search(r"\| `first` \| \d+ \| 1 \|", text)


def test_the_report_tells_duplicated_images_apart(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0, "duplicated")]
    found.append(planted(Protocol(), "agc", 0, 1, 0.5, "duplicated"))
    # Those that are often are given back with half of the similarity that others have.
    often = np.array(found[1].about["copies"]) > 1
    for row in found[1].rows[1:]:
        row["similarity_pixels"] = list(np.where(often, 0.5, row["similarity_pixels"]))
    text = report_of(found)
    # Of 20 prompts the first 8 give their own image, of which 5 are shown often.
    assert "| plain | 1 | 20% | 100% |" in text
    table = text.partition("excess similarity of images shown often")[2].partition("###")[0]
    (row,) = [line.split("|") for line in table.splitlines() if line.startswith("| agc ")]
    baseline = np.mean(found[1].about["heldout_similarity"]["pixels"])
    assert float(row[-6]) == pytest.approx(0.5 - baseline, abs=6e-4)


def test_the_report_of_nothing_and_of_plain_alone_is_whole(report_of):
    assert "| `first` |" in report_of([])
    text = report_of([planted(Protocol(), "plain", 0, 1, 1.0)])
    assert "Nothing to compare with plain yet." in text


def test_the_report_of_the_tuning_seed_alone_claims_no_more(report_of):
    found = [
        planted(Protocol(), "plain", TUNING_SEED, 1, 1.0),
        planted(Protocol(), "iet_agc_plus", TUNING_SEED, 4, 0.5),
    ]
    text = report_of(found)
    assert "A first look, one seed, the one that rates are chosen by" in text
    assert "## 256 Fluent emoji" not in text


def test_a_part_is_judged_by_the_method_without_it_and_a_setting_by_the_method_as_it_is(report_of):
    text = report_of(
        [
            planted(Protocol(), "plain", 0, 1, 1.0),
            planted(Protocol(), "agc", 0, 1, 0.8),
            planted(Protocol(), "agc_random_skip", 0, 1, 0.4),
            planted(Protocol(), "agc_taa_gentle", 0, 1, 0.4),
            planted(Protocol(), "agc_taa_gentle", 0, 1, 0.2, flags=(("agc_threshold", 0.9),)),
        ]
    )
    table = text.partition("## Part by part")[2].partition("\n## ")[0]
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
