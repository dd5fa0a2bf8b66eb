"""All methods against early stopping at equal quality, and against plain fine-tuning that has spent
as much, of each that may be spent: a table each."""

from collections.abc import Callable, Sequence
from functools import partial

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
)

QUALITIES = ("heldout_loss", "kid_edges", "kid_pixels")
GOAL = 0.467
"""The paper's reduction."""


def at_a_glance(places: Sequence[Place]) -> str:
    """The tables, where there is anything to compare."""
    if not any(place.paired for place in places):
        return ""
    at, whole = (f"{LEVELS[level]:.0%}" for level in (HEADLINE, -1))
    text = "## At a glance\n\nExcess similarity (pixels), in brackets 95 % intervals.\n\n"
    text += _goal(places)
    text += "### Against early stopping, at equal quality\n\n"
    text += "As a share of what plain has, where that is surely above 0.\n\n"
    head = [f"less at {at} of the gain in {TITLES[q]}" for q in QUALITIES]
    head.insert(1, f"at {whole} of it")
    head.insert(2, MEAN_OF_LEVELS)
    text += _table(places, [*head, "best held-out loss is lower by"], _at_equal_quality)
    text += "\n### Against plain fine-tuning that has spent as much\n\n"
    text += (
        "As the paper compares, by updates; and by samples trained and by compute (FLOP of UNet "
        "and VAE in training, counted), each where the one that spends less in all is at its end. "
        "*Equal quality*: by no measure is the method surely worse than plain. The paper's "
        f"reduction is {GOAL:.1%}.\n"
    )
    head = ["updates: plain, method", "plain", "the method", "reduction"]
    head += [*(f"{TITLES[q]} is lower by" for q in QUALITIES), "in short"]
    for budget, title in BUDGETS.items():
        text += f"\n#### {title[0].upper()}{title[1:]}\n\n"
        text += _table(places, head, partial(_at_equal_budget, budget=budget))
    return text


def _goal(places: Sequence[Place]) -> str:
    """Whether a method reaches the goal, of those that there are on all data in a mode."""
    there = {(place.mode, place.setting): place for place in places}
    rows = []
    for mode in ("full", "lora"):
        found = [there[mode, setting] for setting in SETTINGS if (mode, setting) in there]
        if len(found) < len(SETTINGS):
            continue
        for label in found[0].paired:
            if all(label in place.paired for place in found):
                seeds = [str(len(set(p.plain) & set(p.others[label]))) for p in found]
                reached, said = zip(*(_reaches(place, label) for place in found), strict=True)
                word = "yes" if all(reached) else "no"
                rows.append([mode, label, ", ".join(seeds), *said, word])
    if not rows:
        return ""
    head = ["weights", "method", "n", *SETTINGS, "reached"]
    return (
        "### The goal\n\n"
        f"At least {GOAL:.1%} less than plain fine-tuning of as many updates, at a held-out loss "
        "that is no worse, and less than early stopping at equal held-out loss: by the "
        f"{MEAN_OF_LEVELS} of the gain, with an interval that leaves out 0. On all three data "
        "sets. For each first the one, then the other, and by which KID it is surely worse than "
        "plain, if any.\n\n" + as_table([head, ["---"] * len(head), *rows]) + "\n"
    )


def _reaches(place: Place, label: str) -> tuple[bool, str]:
    """Whether a method does here, and its two numbers."""
    ends = {q: place.at_budget(label, "excess", q) for q in QUALITIES}
    end, comparison = ends["heldout_loss"], place.compare(label, "excess")
    less = end.reduction is not None and end.reduction.value >= GOAL
    reached = less and end.better.high >= 0 and comparison and comparison.area.low > 0
    parts = [interval(end.reduction, "{:.0%}") if end.reduction else "nothing to take a share of"]
    parts.append(interval(comparison.area, "{:+.4f}") if comparison else "never better")
    parts += [f"worse {TITLES[q]}" for q, each in ends.items() if each.better.high < 0]
    return bool(reached), "; ".join(parts)


def in_short(comparison: Comparison | None, at: int = HEADLINE) -> str:
    """How much less a method memorizes at equal quality, at one of the levels."""
    if comparison is None:
        return "never better than before training"
    level = comparison.levels[at]
    return f"**{verdict(level.difference)}**: {less_by(level)}"


def less_by(level: Level) -> str:
    """How much less a method memorizes, and as a share where there is one."""
    share = f", {interval(level.reduction, '{:.0%}')} of it" if level.reduction else ""
    return f"{interval(level.difference, '{:+.3f}')}{share}"


def _table(
    places: Sequence[Place], head: Sequence[str], cells: Callable[[Place, str], list[str]]
) -> str:
    rows = [["data", "method", "what it is", "n", *head]]
    rows.append(["---"] * len(rows[0]))
    for place in places:
        for label, runs in place.paired.items():
            what = METHODS[next(iter(runs.values())).cell.method].text
            about = [f"{place.setting}, {place.mode}", label, what]
            rows.append([*about, str(len(set(runs) & set(place.plain))), *cells(place, label)])
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
        interval(end.reduction, "{:.0%}") if end.reduction else "",
        *(interval(each.better, "{:+.4f}") for each in found.values()),
        f"**{verdict(end.difference)}**, {_quality(found)}",
    ]


def _quality(found: dict[str, AtBudget]) -> str:
    """In words, how good a method's pictures and predictions are beside plain's."""
    worse = [TITLES[name] for name, end in found.items() if end.better.high < 0]
    better = [TITLES[name] for name, end in found.items() if end.better.low > 0]
    parts = [f"{word} {' and '.join(w)}" for word, w in (("worse", worse), ("better", better)) if w]
    return ", ".join(parts if worse else ["equal quality", *parts])
