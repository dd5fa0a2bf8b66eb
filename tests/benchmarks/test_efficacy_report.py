"""RESULTS.md of planted results."""

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from benchmarks.efficacy import analysis, pages, report, results, study
from benchmarks.efficacy.cell import argv_of, flags_of
from benchmarks.efficacy.methods import COMMANDS, METHODS
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.study import DEFAULT_RATE, TUNING_SEED, Cell
from iet_sd import arguments
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
            "closest_pictures": [picture.getvalue()] * 2 if r == R - 1 else [],
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
                "nearest": [p % 3 for p in range(P)],
            }.items()
        }
        for r in range(R)
    ]
    rate = DEFAULT_RATE["full", METHODS[method].tuned_as]
    cell = Cell(setting, "full", method, rate, seed, shards, flags=flags)
    about = {
        "prompts": [f"prompt {p}" for p in range(P)],
        "prompt_ids": ["1f600"] * P,
        "train_ids": ["1f600", "1f601", "1f602"],
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


class Report(NamedTuple):
    text: str
    """Of RESULTS.md."""
    folder: Path

    def section(self, title):
        return self.text.partition(f"## {title}\n")[2].partition("\n## ")[0]

    def page(self, name):
        return (self.folder / "tables" / f"{name}.md").read_text()


@pytest.fixture
def report_of(monkeypatch, tmp_path):
    """The report of some results; of its intervals what they are, not how exactly."""
    monkeypatch.setattr(
        analysis,
        "bootstrap",
        lambda *given, resamples, **more: bootstrap(*given, resamples=100, **more),
    )

    def make(found, asked=None):
        asked = [] if asked is None else asked
        monkeypatch.setattr(report.files, "read_all", lambda *_: {r.cell: r for r in found})
        monkeypatch.setattr(pages, "_training_images", lambda ids: asked.append(ids) or [])
        return Report(report.write(tmp_path, tmp_path, Protocol()).read_text(), tmp_path)

    return make


def test_the_report_says_what_was_planted_and_of_how_many_seeds(report_of):
    protocol = Protocol()
    made = report_of(
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
    text, compared = made.page("fluent-full"), made.page("comparisons")
    assert re.search(r"\*\*iet\*\* \(n = 2\): less\. .*50% \[\d+%, \d+%\] of it", text)
    assert re.search(r"\*\*agc\*\* \(n = 1\): more\.", text)
    assert re.search(r"\*\*ema\*\* \(n = 1\): less, with worse pictures\.", text)
    rows = [line for line in compared.splitlines() if line.startswith("| fluent, full | ")]
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
    # A line each of what is above.
    line = [line for line in made.text.splitlines() if line.startswith("| fluent, full | iet | 2")]
    assert re.match(r".* 50% \[.*? \| -100% \[.*? \| \d+% \[.*? \| equal quality \|", line[0])
    # Cells and hours that are left.
    wanted = len(study.cells("first", lambda mode, method: DEFAULT_RATE[mode, method]))
    assert f"| `first` | {wanted} | 6 |" in made.text
    # All pages and pictures are there, and each is linked from somewhere.
    linked = set()
    for page in (made.folder / "RESULTS.md", *made.folder.glob("tables/*.md")):
        linked |= {
            (page.parent / to).resolve() for to in re.findall(r"\]\((.+?)\)", page.read_text())
        }
    there = {*made.folder.glob("*/*.png"), *made.folder.glob("*/*.md"), made.folder / "RESULTS.md"}
    assert linked == {path.resolve() for path in there}
    for path in made.folder.glob("*/*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 60


def test_the_goal_is_reached_on_all_data_or_not_at_all(report_of):
    """By a method at half of plain's memorization, and not by one that is so on two of three.

    One with less yet, that spoils pictures on one of the three, is no better for that.
    """
    found = [
        planted(Protocol(), method, 0, 1, 0.8 if (method, setting) == hard else factor, setting)
        for setting in study.SETTINGS
        for method, factor in (("plain", 1.0), ("agc", 0.5), ("ema", 0.5), ("taa_gentle", 0.1))
        for hard in [("ema", "twemoji")]
    ]
    spoilt(found[-1])
    made = report_of([*found, planted(Protocol(), "iet", 0, 4, 0.1)])
    table = made.section("The goal")
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| full | ")]
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        ("ema", "1, 1, 1", "no |"),
        ("agc", "1, 1, 1", "yes |"),
        ("taa_gentle", "1, 1, 1", "by held-out loss |"),
    ]
    assert all(re.match(r"50% \[\d+%, \d+%\]; \+0\.\d+ \[\+", cell) for cell in rows[1][3:6])
    assert rows[0][5].startswith("20% [")
    short = made.section("In short")
    assert "is reached by `agc` (all weights). With a KID surely worse than plain's" in short
    by = "it is reached by `taa_gentle` (all weights; on twemoji). Not by `ema` (all weights)."
    assert by in short
    assert "**What to set**: `--method iet_agc --num_shards 1`" in short
    assert re.search(
        r"`agc` \(all weights\) on fluent, duplicated and twemoji \(n = 1, 1, 1\): 50% ", short
    )
    assert re.search(
        r"and 50% \[.+?\], 50% \[.+?\], 50% \[.+?\] by the excess of the paper's", short
    )
    assert "nowhere that is measured" in short


def test_where_the_goal_is_missed_it_says_so_and_where_the_best_loses(report_of):
    """At half of plain's memorization with spoilt pictures on one of the three."""
    found = [
        planted(Protocol(), method, 0, 1, factor, setting)
        for setting in study.SETTINGS
        for method, factor in (("plain", 1.0), ("agc", 0.6 if setting == "fluent" else 0.5))
    ]
    spoilt(found[-1])
    for row in found[1].rows[1:]:
        row["similarity_edges"] = [value + 0.5 for value in row["similarity_edges"]]
    short = report_of(found).section("In short")
    assert "is not reached. Not by `agc` (all weights)." in short
    # All signs are planted alike, but edges of one data set.
    signs = re.search(r"\*\*By other signs of memorization\*\*, .* has (.*)\.", short)[1]
    everywhere = "less on fluent, duplicated and twemoji"
    assert signs.split("; ")[-1] == f"loss gap: {everywhere}"
    edges = "excess similarity (edges): more on fluent, less on duplicated and twemoji"
    assert edges in signs
    loses = re.search(r"\*\*Where `agc` \(all weights\) loses\*\*: (.*)", short)[1]
    assert "worse KID (edges) at equal updates on twemoji" in loses
    assert re.search(r"only 40% \[\d+%, \d+%\] less with as many updates on fluent", loses)
    assert "duplicated" not in loses
    assert (
        "**Helps**, less at equal held-out loss (of which data, and of how many seeds): AGC ("
        in short
    )
    assert "AGC (fluent 1, duplicated 1)" in short
    assert re.search(r"\*\*Trades\*\*, .*: AGC \(twemoji 1\)", short)


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


def test_the_report_marks_what_is_to_be_run_again(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0), planted(Protocol(), "iet", 0, 4, 0.5)]
    found[1].about["flags"]["num_rounds"] = 3
    made = report_of(found)
    assert "| iet, to be run again | 1 |" in made.page("fluent-full")
    assert re.search(r"\| `first` \| \d+ \| 1 \|", made.text)


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


def test_the_report_of_nothing_and_of_plain_alone_is_whole(report_of):
    assert "| `first` |" in report_of([]).text
    made = report_of([planted(Protocol(), "plain", 0, 1, 1.0)])
    assert "Nothing to compare with plain yet." in made.page("fluent-full")
    assert "## In short" not in made.text


def test_the_report_of_the_tuning_seed_alone_claims_no_more(report_of):
    found = [
        planted(Protocol(), "plain", TUNING_SEED, 1, 1.0),
        planted(Protocol(), "iet_agc_plus", TUNING_SEED, 4, 0.5),
    ]
    made = report_of(found)
    assert "A first look, one seed, the one that rates are chosen by" in made.page("rates")
    assert "## In short" not in made.text
    assert not (made.folder / "tables" / "fluent-full.md").exists()


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
        ("AGC", "agc"): "**helps**",
        ("AGC's choice, and not as many at random", "agc"): "**hurts**",
        ("TAA beside AGC", "agc_taa_gentle"): "**helps**",
        ("agc_threshold 0.9", "agc_taa_gentle"): "**helps**",
    }


def test_what_differs_at_equal_updates_alone_is_what_training_less_does(report_of):
    """A method that is on plain's own curve, and stops earlier."""
    plain = planted(Protocol(), "plain", 0, 1, 1.0)
    agc = planted(Protocol(), "agc", 0, 1, 1.0)
    # Its last readings are plain's third.
    agc.rows[3:] = [{**agc.rows[2], "updates": row["updates"]} for row in agc.rows[3:]]
    short = report_of([plain, agc]).section("In short")
    assert re.search(r"\*\*Does what training less does\*\*: .*: AGC \(fluent 1\)", short)


def test_the_commands_for_a_user_are_the_methods_that_were_run():
    beside = {
        "method",
        "preset",
        "num_rounds",
        "steps_per_round",
        "aggregate_every",
        "taa_min_batch",
    }
    folders = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
    for label, command in COMMANDS.items():
        method, _, setting = label.partition(", ")
        flags = (tuple(setting.split(" ")),) if setting else ()
        cell = Cell("fluent", "full", method, 1e-4, 0, METHODS[method].num_shards, flags=flags)
        run = arguments.load([*folders, *argv_of(flags_of(cell, Protocol()))]).method
        told = arguments.load([*folders, *command.split()]).method
        assert {
            field: (getattr(run, field), getattr(told, field))
            for field in asdict(run)
            if getattr(run, field) != getattr(told, field) and field not in beside
        } == {}, label
