"""The Fréchet distance in the report, of planted results."""

from benchmarks.efficacy.protocol import Protocol
from tests.benchmarks.planting import planted, with_frechet

WORSE = (0.5, 0.4, 0.3, 0.35, 0.4)
BETTER = (0.5, 0.4, 0.25, 0.2, 0.1)
TITLE = "The Fréchet distance"


def plain(seed):
    return planted(Protocol(), "plain", seed, 1, 1.0)


def ema(seed):
    return planted(Protocol(), "ema", seed, 1, 0.5)


def test_runs_that_have_it_are_told_and_compared_with_plain_at_the_end(report_of):
    found = [with_frechet(plain(0), WORSE), with_frechet(ema(0), BETTER), plain(1), ema(1)]
    made = report_of(found)
    told = " ".join(made.section("In short").split())
    assert (
        "with `ema` on fluent (all weights, n = 1) FD (edges) of unseen captions is lower" in told
    )
    assert "than plain's by +0.300 [" in told
    assert "(at equal distance excess: less: +0." in told
    rows = [
        line.split(" | ")
        for line in made.section(TITLE).splitlines()
        if line.startswith("| fluent")
    ]
    assert [row[1:4] for row in rows] == [
        ["ema", "1", "FD (edges)"],
        ["ema", "1", "FD (pixels)"],
        ["ema", "1", "FD (edges) of unseen captions"],
        ["ema", "1", "FD (pixels) of unseen captions"],
    ]
    assert rows[0][4:6] == ["0.500, 0.300, 0.400", "0.500, 0.250, 0.100"]
    assert rows[3][4:6] == ["1.500, 1.300, 1.400", "1.500, 1.250, 1.100"]
    assert all(row[6].startswith("+0.3000 [") for row in rows)
    # The method memorizes half of what plain does, at any quality.
    assert all(row[7].startswith("+0.") and " [+0." in row[7] for row in rows)


def test_nothing_is_said_where_only_one_of_the_two_has_it(report_of):
    for found in ([with_frechet(plain(0), WORSE), ema(0)], [plain(0), ema(0)]):
        assert TITLE not in report_of(found).text
