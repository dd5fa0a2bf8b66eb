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
    rows = [
        line.split(" | ")
        for line in report_of(found).section(TITLE).splitlines()
        if line.startswith("| fluent")
    ]
    assert [row[1:3] for row in rows] == [["plain", "1"], ["ema", "1"]]
    assert rows[0][3] == "0.500, 0.300, 0.400"
    assert rows[1][3].startswith("0.500, 0.250, 0.100; +0.300 [")
    assert rows[1][5].startswith("1.500, 1.250, 1.100; +0.300 [")


def test_nothing_is_said_where_only_one_of_the_two_has_it(report_of):
    for found in ([with_frechet(plain(0), WORSE), ema(0)], [plain(0), ema(0)]):
        assert TITLE not in report_of(found).text
