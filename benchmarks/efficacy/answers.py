"""What the study says, in sentences made of its numbers."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.efficacy.analysis import AtBudget, verdict
from benchmarks.efficacy.frechet import in_words as about_frechet
from benchmarks.efficacy.glance import (
    BY_LOSS,
    BY_SPOILT,
    GOAL,
    NO,
    QUALITIES,
    YES,
    Goal,
    goals,
    worse_at_equal_updates,
)
from benchmarks.efficacy.methods import COMMANDS
from benchmarks.efficacy.parts import HELPS, HURTS, LESS, MORE, NOTHING, TRADES, Finding
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.skipped import WITH, Skips, by_copies
from benchmarks.efficacy.study import WEIGHTS
from benchmarks.efficacy.tables import BUDGETS, MEAN_OF_LEVELS, MEASURES, TITLES, interval
from benchmarks.efficacy.unseen import Unseen, in_words

SIGNS = ("p95", "excess_edges", "own", "gap")
"""Of `tables.MEASURES`, beside the mean excess by pixels."""
_ABOUT = {
    HELPS: "**Helps**, less at equal held-out loss",
    TRADES: "**Trades**, less at equal held-out loss with a surely worse KID, or more with a "
    "better one: spoilt pictures resemble no training image either",
    LESS: "**Does what training less does**: less at equal updates, no difference shown at equal "
    "held-out loss",
    NOTHING: "**Nothing shown**, neither less nor more",
    MORE: "**Does what training longer does**: more at equal updates",
    HURTS: "**Hurts**, more at equal held-out loss",
}


def answers(
    places: Sequence[Place],
    found: Sequence[Finding],
    skips: Sequence[Skips],
    unseen: Sequence[Unseen],
    frechet: Sequence[Place],
) -> str:
    """A list: is the goal reached, which parts help, where the best method loses, what to set."""
    judged = goals(places)
    points = [*_about_the_goal(judged), *_which_parts(found), *_what_is_skipped(skips)]
    if unseen:
        points.append(f"**Captions that were not trained on**: {'; '.join(in_words(unseen))}.")
    if frechet:
        points.append(
            "**By the Fréchet distance to held-out images**, after as many updates, "
            f"{'; '.join(about_frechet(frechet))}."
        )
    if judged:
        winner = best(judged)
        points += [_by_other_signs(winner), _where_it_loses(winner), _what_to_set(winner)]
    points.append(_names())
    return "\n".join(f"- {point}" for point in points) + "\n"


def best(judged: Sequence[Goal]) -> Goal:
    """That which reaches the goal on most data with no worse KID, then with one; of several, of
    most seeds, then with most gain over early stopping."""

    def gain(goal: Goal) -> float:
        compared = [place.compare(goal.label) for place in goal.places]
        return sum(each.area.value if each else float("-inf") for each in compared)

    def seeds(goal: Goal) -> int:
        return min(len(place.seeds(goal.label)) for place in goal.places)

    def reached(goal: Goal) -> tuple[int, int]:
        there, spoilt = goal.reached_on, goal.spoils_on
        return sum(place not in spoilt for place in there), len(there)

    return max(judged, key=lambda goal: (reached(goal), seeds(goal), gain(goal)))


def _about_the_goal(judged: Sequence[Goal]) -> list[str]:
    goal = (
        f"**The goal**, on all data sets at least {GOAL:.1%} less excess similarity than plain "
        "fine-tuning of as many updates at a held-out loss that is no worse, and less than early "
        "stopping at equal held-out loss"
    )
    if not judged:
        return [f"{goal}: nothing has been run on all data sets yet."]
    by_word: dict[str, list[Goal]] = defaultdict(list)
    for each in sorted(judged, key=lambda goal: len(goal.spoils_on)):
        by_word[each.word].append(each)
    reached = by_word[YES] + by_word[BY_LOSS]
    clean = [_name(each) for each in by_word[YES]]
    spoilt = [_name(each, each.spoils_on) for each in by_word[BY_LOSS]]
    by_spoilt = [_name(each) for each in by_word[BY_SPOILT]]
    missed = [_name(each) for each in judged if each.word == NO]
    said = "is not reached"
    if clean:
        said = f"is reached by {', '.join(clean)}"
    elif spoilt:
        said += " with pictures that are no worse"
    if spoilt:
        said += ". With a KID surely worse than plain's, on the data named, it is reached by "
        said += ", ".join(spoilt)
    if by_spoilt:
        said += (
            f". By {', '.join(by_spoilt)} with spoilt pictures: KID (edges) ends worse than before "
            "training on all data"
        )
    if missed:
        said += f". Not by {', '.join(missed)}"
    sure = [_name(each) for each in reached if each.is_sure]
    said += f". Shares are judged by their value; the whole interval is above {GOAL:.1%} on all "
    said += f"data for {', '.join(sure) or 'none of them'}"
    points = [f"{goal}, {said}."]
    for each in reached or [best(judged)]:
        ends = [place.at_budget(each.label) for place in each.places]
        compared = [place.compare(each.label) for place in each.places]
        scores = [_scores(place, each.label) for place in each.places]
        gains = (interval(c.area, "{:+.4f}") if c else "none" for c in compared)
        plain = (f"{end.first.value:+.3f}" for end in ends)
        seeds = (str(len(place.seeds(each.label))) for place in each.places)
        points.append(
            f"{_name(each)} on {_join(place.setting for place in each.places)} (n = "
            f"{', '.join(seeds)}): {_shares(ends)} less than plain at equal updates. The 95th "
            "percentile of similarity, the paper's score but for the features, is "
            f"{', '.join(scores)}. At equal held-out loss excess is {', '.join(gains)} less, as a "
            f"{MEAN_OF_LEVELS} of the gain, where a whole plain run ends at {', '.join(plain)}; "
            f"at all of the gain, the best loss that both reach, {_at_best(each)}."
        )
    return points


def _scores(place: Place, label: str) -> str:
    """The score of plain and of a method at equal updates, and of held-out images."""
    heldout = next(iter(place.plain.values())).about["heldout_similarity"]["pixels"]
    base, end = np.percentile(heldout, 95), place.at_budget(label, "p95")
    plain, method = (base + each.value for each in (end.first, end.second))
    return f"{method:.2f} against plain's {plain:.2f} (held-out images: {base:.2f})"


def _at_best(goal: Goal) -> str:
    """How much less it memorizes at the best held-out loss that it and plain reach."""
    compared = [place.compare(goal.label) for place in goal.places]
    return ", ".join(
        f"{interval(c.levels[-1].difference, '{:+.3f}')} ({verdict(c.levels[-1].difference)})"
        if c
        else "none"
        for c in compared
    )


def _which_parts(found: Sequence[Finding]) -> list[str]:
    """A point a word: the parts, each with the data and numbers of seeds that say so."""
    said: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for each in found:
        # A setting is told by the method that has it too.
        name = each.part.there if each.part.there.endswith(each.part.text) else each.part.text
        lora = " LoRA" if each.place.mode == "lora" else ""
        said[each.word][name].append(f"{each.place.setting}{lora} {each.number}")
    return [
        f"{_ABOUT[word]} (of which data, and of how many seeds): "
        + "; ".join(f"{name} ({', '.join(where)})" for name, where in said[word].items())
        + "."
        for word in _ABOUT
        if word in said
    ]


def _what_is_skipped(skips: Sequence[Skips], label: str = "agc") -> list[str]:
    """What goes with the skips of a method, where they are known."""
    of_it = [each for each in skips if each.label == label]
    if not of_it:
        return []
    numbers = (
        f"{title} ({', '.join(interval(e.correlations[title], '{:+.2f}') for e in of_it)})"
        for title in WITH
    )
    names = _join(each.place.setting for each in of_it)
    seeds = ", ".join(str(len(each.runs)) for each in of_it)
    often = [
        f" Of the visits to images that are there once, and often, it skips {shares}."
        for each in of_it
        if (shares := by_copies(each.runs))
    ]
    return [
        f"**What `{label}` skips** on {names} (n = {seeds}): how often an image "
        f"is skipped goes, by rank correlation, with {'; with '.join(numbers)}.{''.join(often)}"
    ]


def _by_other_signs(goal: Goal) -> str:
    """Whether what is said of excess similarity holds of other measures."""
    said = []
    for measure in SIGNS:
        where: dict[str, list[str]] = defaultdict(list)
        for place in goal.places:
            if compared := place.compare(goal.label, measure):
                where[verdict(compared.area)].append(place.setting)
        words = (f"{word} on {_join(names)}" for word, names in where.items())
        said.append(f"{MEASURES[measure].title}: {', '.join(words)}")
    return (
        f"**By other signs of memorization**, at equal held-out loss, {_name(goal)} has "
        f"{'; '.join(said)}."
    )


def _where_it_loses(goal: Goal) -> str:
    lost = []
    for place in goal.places:
        worse = [TITLES[quality] for quality in worse_at_equal_updates(place, goal.label)]
        if worse:
            lost.append(f"worse {' and '.join(worse)} at equal updates on {place.setting}")
        for quality in QUALITIES:
            compared = place.compare(goal.label, "excess", quality)
            if compared is None:
                lost.append(
                    f"{TITLES[quality]} on {place.setting} never better than before training"
                )
            elif verdict(compared.area) == "more":
                lost.append(f"more memorized at equal {TITLES[quality]} on {place.setting}")
        for budget, title in BUDGETS.items():
            end = place.at_budget(goal.label, budget=budget)
            if end.reduction is None:
                lost.append(f"plain has no sure excess yet with {title} on {place.setting}")
            elif end.reduction.value < GOAL:
                share = interval(end.reduction, "{:.0%}")
                lost.append(f"only {share} less with {title} on {place.setting}")
    return f"**Where {_name(goal)} loses**: {'; '.join(lost) or 'nowhere that is measured'}."


def _what_to_set(goal: Goal) -> str:
    command = COMMANDS.get(goal.label)
    flags = f"`{command}`" if command else _name(goal)
    return f"**What to set**: {flags}, and the round that `--keep_best` chooses by held-out images."


def _names() -> str:
    """What the names of methods are as flags."""
    told = (f"`{label}` is `{command}`" for label, command in COMMANDS.items())
    return f"**Names**: {'; '.join(told)}. What each does is told with all numbers."


def _shares(ends: Sequence[AtBudget]) -> str:
    return ", ".join(
        interval(end.reduction, "{:.0%}") if end.reduction else "no sure share" for end in ends
    )


def _name(goal: Goal, on: Sequence[Place] = ()) -> str:
    where = f"; on {_join(place.setting for place in on)}" if on else ""
    return f"`{goal.label}` ({WEIGHTS[goal.mode]}{where})"


def _join(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
