"""All methods against early stopping at equal quality, and against plain fine-tuning that has spent
as much, of each that may be spent: a table each."""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.efficacy.analysis import LEVELS, AtBudget, Comparison, Level, verdict
from benchmarks.efficacy.methods import METHODS
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.tables import BUDGETS, HEADLINE, TITLES, as_table, at_place, interval

QUALITIES = ("heldout_loss", "kid_edges", "kid_pixels")
GOAL = 0.467
"""The paper's reduction."""


def at_a_glance(places: Sequence[Place]) -> str:
    """The tables, where there is anything to compare."""
    if not any(place.paired for place in places):
        return ""
    at, whole = (f"{LEVELS[level]:.0%}" for level in (HEADLINE, -1))
    text = "## At a glance\n\nExcess similarity (pixels), in brackets 95 % intervals.\n\n"
    text += "### Against early stopping, at equal quality\n\n"
    text += "As a share of what plain has, where that is surely above 0.\n\n"
    head = [f"less at {at} of the gain in {TITLES[q]}" for q in QUALITIES]
    head.insert(1, f"at {whole} of it")
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
    found = [place.compare(label, "excess", quality) for quality in QUALITIES]
    best = interval(found[0].best, "{:+.4f}") if found[0] else ""
    return [in_short(found[0]), in_short(found[0], at=-1), *map(in_short, found[1:]), best]


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
