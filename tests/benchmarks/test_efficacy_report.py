"""RESULTS.md of planted results: all of it, and with little or nothing to tell."""

import json
import re
from dataclasses import replace

from PIL import Image

from benchmarks.efficacy import study
from benchmarks.efficacy.cell import flags_of
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.protocol import Protocol
from benchmarks.efficacy.study import DEFAULT_RATE, TUNING_SEED
from tests.benchmarks.planting import planted, spoilt


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
    assert re.search(r"\*\*ema\*\* \(n = 1\): less, with a higher KID\.", text)
    rows = [line for line in compared.splitlines() if line.startswith("| fluent, full | ")]
    iet, *spent = (row for row in rows if row.startswith("| fluent, full | iet |"))
    assert re.search(r"\| 2 \| \*\*less\*\*: .*50% \[\d+%, \d+%\] of it", iet)
    assert METHODS["iet"].text in iet
    updates, samples, compute = (row.partition(" | 2 | ")[2] for row in spent)
    assert re.match(r"512, 512 \| \+0\.400 \| \+0\.200 \| 50% \[\d+%, \d+%\] ", updates)
    assert updates.endswith("| **less**, no quality surely worse |")
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
    assert re.match(
        r".* 50% \[.*? \| -100% \[.*? \| \d+% \[.*? \| no quality surely worse \|", line[0]
    )
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


def test_the_report_marks_what_is_to_be_run_again(report_of):
    found = [planted(Protocol(), "plain", 0, 1, 1.0), planted(Protocol(), "iet", 0, 4, 0.5)]
    found[1].about["flags"]["num_rounds"] = 3
    made = report_of(found)
    assert "| iet, to be run again | 1 |" in made.page("fluent-full")
    assert re.search(r"\| `first` \| \d+ \| 1 \|", made.text)


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


def test_a_rate_below_the_lowest_is_told_and_not_chosen(report_of):
    """It has the lowest loss here; the chosen one is the lowest of those that were chosen from."""
    tried = {rate: low for low, rate in zip((0, 1, 2), study.RATES["full", "plain"], strict=True)}
    below = study.LOWER_RATES["full", "plain"]
    assert below < min(tried)
    found = [at_rate(rate, 0.001 * low) for rate, low in tried.items()]
    told = report_of(found).text
    assert "In 1 of 1 groups that is the lowest rate that was tried, and a lower one may be" in told
    made = report_of([*found, at_rate(below, -0.002)])
    text = " ".join(made.text.split())
    assert (
        "reaches a held-out loss of plain, all weights: 0.0480 after 256 updates, and not" in text
    )
    assert "and not 0.0500 after 256, and ends with an excess of +0.400, and not +0.400 ([" in text
    rows = [line for line in made.page("rates").splitlines() if line.startswith("| plain | ")]
    assert [row.split(" | ")[-1] for row in rows] == ["yes |", " |", " |", NOT_CHOSEN]
    assert rows[3].startswith(f"| plain | {below:g} | 0.0480 | 256 |")
    assert f"the one that rates are chosen by: against plain {min(tried):g}." in made.page("rates")
    # An end that is not the lowest says nothing.
    turned = [at_rate(rate, -0.001 * low) for rate, low in tried.items()]
    assert "In 0 of 1 groups" in report_of([*turned, at_rate(below, 0.0)]).text


def test_what_the_winner_adds_at_the_lower_rate_is_told_if_both_are_there(report_of):
    rates = study.RATES["full", "plain"]
    chosen_from = [at_rate(rate, 0.001 * low) for low, rate in enumerate(rates)]
    lower = at_rate(study.LOWER_RATES["full", "plain"], -0.002)
    winner = replace(
        planted(Protocol(), "agc_taa_gentle_ema", TUNING_SEED, 1, 0.5), cell=study.AT_LOWER_RATE
    )
    for row, plain in zip(winner.rows, lower.rows, strict=True):
        row["heldout_loss"] = plain["heldout_loss"]
    label = "agc_taa_gentle_ema, agc_threshold 0.9"
    assert winner.cell.label == label
    assert f"At that rate `{label}`" not in report_of([*chosen_from, lower]).text
    made = report_of([*chosen_from, lower, winner])
    told = " ".join(made.text.split())
    assert f"At that rate `{label}` has 50% [50%, 50%] less excess than plain at equal" in told
    assert "and the same rate, a held-out loss lower by +0.0000 [" in told
    assert f"## {label} and plain, both at 2.5e-05" in made.page("rates")


NOT_CHOSEN = "tried since, not chosen from |"


def at_rate(rate, more):
    """A run of the tuning seed, whose held-out losses are 0.05 and so much ``more`` at best."""
    result = planted(Protocol(), "plain", TUNING_SEED, 1, 1.0)
    cell = study.tuning_cell("full", "plain", rate)
    result.about["flags"] = json.loads(json.dumps(flags_of(cell, Protocol())))
    for row, loss in zip(result.rows, (0.08, 0.06, 0.05, 0.055, 0.07), strict=True):
        row["heldout_loss"] = [loss + more] * len(row["heldout_loss"])
    return replace(result, cell=cell)
