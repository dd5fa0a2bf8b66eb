"""All methods against plain fine-tuning: the goal, a line each, and tables of every comparison."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.efficacy.analysis import LEVELS, AtBudget, Comparison, Level, verdict
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.study import SETTINGS
from benchmarks.efficacy.tables import (
    BUDGETS,
    HEADLINE,
    MEAN_OF_LEVELS,
    TITLES,
    as_table,
    at_place,
    interval,
    scalar,
)

QUALITIES = ("heldout_loss", "kid_edges", "kid_pixels")
GOAL = 0.467
"""The paper's reduction."""
YES, BY_LOSS, BY_SPOILT, NO = "yes", "by held-out loss", "by spoilt pictures", "no"
"""Whether a method reaches the goal on all data: with no KID surely worse than plain's; with one;
with pictures that end worse than before training; or not."""


class Goal(NamedTuple):
    """A method that was run on all data, and whether it reaches the goal on each."""

    mode: str
    label: str
    places: tuple[Place, ...]

    @property
    def reached_on(self) -> list[Place]:
        """Where it is, by held-out loss."""
        return [place for place in self.places if reaches(place, self.label)]

    @property
    def is_reached(self) -> bool:
        """On all, by held-out loss."""
        return len(self.reached_on) == len(self.places)

    @property
    def is_sure(self) -> bool:
        """Whether the share that is asked for is below the whole interval, on all."""
        ends = [place.at_budget(self.label) for place in self.places]
        return all(end.reduction is not None and end.reduction.low >= GOAL for end in ends)

    @property
    def is_spoilt(self) -> bool:
        """Whether pictures end worse than before training on all data, by KID (edges)."""
        runs = [place.others[self.label] for place in self.places]
        return all(kid_R[-1] > kid_R[0] for kid_R in (scalar(each, "kid_edges") for each in runs))

    @property
    def spoils_on(self) -> list[Place]:
        """Where pictures are surely worse than plain's, by a KID: held-out loss may not tell."""
        return [place for place in self.places if worse_at_equal_updates(place, self.label)]

    @property
    def word(self) -> str:
        """`YES`, `BY_LOSS`, `BY_SPOILT` or `NO`."""
        if not self.is_reached:
            return NO
        if self.is_spoilt:
            return BY_SPOILT
        return BY_LOSS if self.spoils_on else YES


def goals(places: Sequence[Place]) -> list[Goal]:
    """In each mode the methods that there are on all data."""
    there = {(place.mode, place.setting): place for place in places}
    found = []
    for mode in ("full", "lora"):
        of = [there[mode, setting] for setting in SETTINGS if (mode, setting) in there]
        labels = of[0].paired if len(of) == len(SETTINGS) else {}
        found += [
            Goal(mode, label, tuple(of))
            for label in labels
            if all(label in place.paired for place in of)
        ]
    return found


def reaches(place: Place, label: str) -> bool:
    """Whether a method reaches the goal here, both clauses of it."""
    end, comparison = place.at_budget(label), place.compare(label)
    is_less = end.reduction is not None and end.reduction.value >= GOAL
    is_gain = comparison is not None and comparison.area.low > 0
    return is_less and end.better.high >= 0 and is_gain


def goal_table(found: Sequence[Goal]) -> str:
    """Whether they do, and by what numbers."""
    head = ["weights", "method", "n", *SETTINGS, "reached"]
    rows = [head, ["---"] * len(head)]
    for each in found:
        seeds = ", ".join(str(len(place.seeds(each.label))) for place in each.places)
        said = (_two_numbers(place, each.label) for place in each.places)
        rows.append([each.mode, each.label, seeds, *said, each.word])
    return as_table(rows)


def _two_numbers(place: Place, label: str) -> str:
    end, comparison = place.at_budget(label), place.compare(label)
    parts = [interval(end.reduction, "{:.0%}") if end.reduction else "nothing to take a share of"]
    parts.append(interval(comparison.area, "{:+.4f}") if comparison else "never better")
    parts += [f"worse {TITLES[quality]}" for quality in worse_at_equal_updates(place, label)]
    return "; ".join(parts)


def worse_at_equal_updates(place: Place, label: str) -> list[str]:
    """The measures of quality by which a method is surely worse than plain."""
    ends = {quality: place.at_budget(label, "excess", quality) for quality in QUALITIES}
    return [quality for quality, end in ends.items() if end.better.high < 0]


def lines(places: Sequence[Place]) -> str:
    """A line a method and place, none left out."""
    head = ["memorizes less, at equal updates", "at equal samples trained", "at equal compute"]
    head += ["at equal updates, quality", "memorizes less, at equal held-out loss"]
    head += ["at equal KID (edges)"]
    return _table(places, head, _line, what_it_is=False)


def _line(place: Place, label: str) -> list[str]:
    spent = [place.at_budget(label, budget=budget) for budget in BUDGETS]
    ends = {quality: place.at_budget(label, "excess", quality) for quality in QUALITIES}
    loss, edges = (place.compare(label, "excess", quality) for quality in QUALITIES[:2])
    return [
        *(interval(end.reduction, "{:.0%}") for end in spent),
        _quality(ends),
        *(
            f"**{verdict(each.area)}**: {interval(each.area, form)}" if each else "never better"
            for each, form in ((loss, "{:+.4f}"), (edges, "{:+.3f}"))
        ),
    ]


def equal_quality_table(places: Sequence[Place]) -> str:
    """Against early stopping."""
    at, whole = (f"{LEVELS[level]:.0%}" for level in (HEADLINE, -1))
    head = [f"less at {at} of the gain in {TITLES[q]}" for q in QUALITIES]
    head.insert(1, f"at {whole} of it")
    head.insert(2, MEAN_OF_LEVELS)
    return _table(places, [*head, "best held-out loss is lower by"], _at_equal_quality)


def budget_table(places: Sequence[Place], budget: str) -> str:
    """Against plain fine-tuning that has spent as much, of one of `tables.BUDGETS`."""
    head = ["updates: plain, method", "plain", "the method", "reduction"]
    head += [*(f"{TITLES[q]} is lower by" for q in QUALITIES), "in short"]
    return _table(places, head, partial(_at_equal_budget, budget=budget))


def in_short(comparison: Comparison | None, at: int = HEADLINE) -> str:
    """How much less a method memorizes at equal quality, at one of the levels."""
    if comparison is None:
        return "never better than before training"
    level = comparison.levels[at]
    return f"**{verdict(level.difference)}**: {less_by(level)}"


def less_by(level: Level | AtBudget) -> str:
    """How much less a method memorizes, and as a share where there is one."""
    share = f", {interval(level.reduction, '{:.0%}')} of it" if level.reduction else ""
    return f"{interval(level.difference, '{:+.3f}')}{share}"


def _table(
    places: Sequence[Place],
    head: Sequence[str],
    cells: Callable[[Place, str], list[str]],
    what_it_is: bool = True,
) -> str:
    rows = [["data", "method", *(["what it is"] if what_it_is else []), "n", *head]]
    rows.append(["---"] * len(rows[0]))
    for place in places:
        for label, runs in place.paired.items():
            what = METHODS[next(iter(runs.values())).cell.method].text
            about = [f"{place.setting}, {place.mode}", label, *([what] if what_it_is else [])]
            rows.append([*about, str(len(place.seeds(label))), *cells(place, label)])
    return as_table(rows)


def _at_equal_quality(place: Place, label: str) -> list[str]:
    loss, *kids = (place.compare(label, "excess", quality) for quality in QUALITIES)
    words = [in_short(loss), in_short(loss, at=-1)]
    words.append(interval(loss.area, "{:+.4f}") if loss else "")
    return [*words, *map(in_short, kids), interval(loss.best, "{:+.4f}") if loss else ""]


def _at_equal_budget(place: Place, label: str, budget: str) -> list[str]:
    found = {quality: place.at_budget(label, "excess", quality, budget) for quality in QUALITIES}
    end = found["heldout_loss"]
    pair = zip((place.plain, place.others[label]), end.places, strict=True)
    return [
        ", ".join(f"{at_place(runs, there, 'updates'):.0f}" for runs, there in pair),
        f"{end.first.value:+.3f}",
        f"{end.second.value:+.3f}",
        interval(end.reduction, "{:.0%}"),
        *(interval(each.better, "{:+.4f}") for each in found.values()),
        f"**{verdict(end.difference)}**, {_quality(found)}",
    ]


def _quality(found: dict[str, AtBudget]) -> str:
    """In words, how good a method's pictures and predictions are beside plain's."""
    worse = [TITLES[name] for name, end in found.items() if end.better.high < 0]
    better = [TITLES[name] for name, end in found.items() if end.better.low > 0]
    parts = [f"{word} {' and '.join(w)}" for word, w in (("worse", worse), ("better", better)) if w]
    return ", ".join(parts if worse else ["no quality surely worse", *parts])
