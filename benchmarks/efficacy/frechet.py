"""The Fréchet distance to held-out images, of the runs whose readings have it."""

from collections.abc import Sequence

from benchmarks.efficacy.analysis import verdict
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.study import WEIGHTS
from benchmarks.efficacy.tables import FRECHET, FRECHET_UNSEEN, TITLES, as_table, interval
from benchmarks.efficacy.unseen import course

_SHOWN = (*FRECHET, *FRECHET_UNSEEN)


def known_frechet(places: Sequence[Place]) -> list[Place]:
    """Plain and methods, as far as their readings say it."""
    known = [place.having(_SHOWN[0]) for place in places]
    return [place for place in known if place.paired]


def frechet_table(places: Sequence[Place]) -> str:
    """Four rows for each method: its course and plain's, and what that comes to."""
    head = ["data", "method", "n", "distance", "plain: before, at best, end", "the method"]
    head += ["lower by, at equal updates", "memorizes less, at equal distance"]
    rows = [head, ["---"] * len(head)]
    for place in places:
        for label in place.paired:
            for quality in _SHOWN:
                equal = place.compare(label, "excess", quality)
                rows.append(
                    [
                        f"{place.setting}, {place.mode}",
                        label,
                        str(len(place.seeds(label))),
                        TITLES[quality],
                        *(
                            ", ".join(f"{value:.3f}" for value in course(runs, quality))
                            for runs in (place.plain, place.others[label])
                        ),
                        interval(place.at_budget(label, "excess", quality).better, "{:+.4f}"),
                        interval(equal.area, "{:+.4f}") if equal else "never better",
                    ]
                )
    return as_table(rows)


def in_words(places: Sequence[Place]) -> list[str]:
    """A sentence for each data set and method, of captions that no picture could be copied for."""
    said = []
    for place in places:
        for label in place.paired:
            parts = []
            for quality in FRECHET_UNSEEN:
                end = place.at_budget(label, "excess", quality).better
                equal = place.compare(label, "excess", quality)
                gain = f"{verdict(equal.area)}: {interval(equal.area, '{:+.4f}')}" if equal else ""
                parts.append(
                    f"{TITLES[quality]} is lower than plain's by {interval(end, '{:+.3f}')} (at "
                    f"equal distance excess: {gain or 'never better than before training'})"
                )
            said.append(
                f"with `{label}` on {place.setting} ({WEIGHTS[place.mode]}, n = "
                f"{len(place.seeds(label))}) {' and '.join(parts)}"
            )
    return said
