"""The Fréchet distance to held-out images, of the runs whose readings have it."""

from collections.abc import Sequence

from benchmarks.efficacy.places import Place
from benchmarks.efficacy.tables import FRECHET, FRECHET_UNSEEN, TITLES, as_table, interval
from benchmarks.efficacy.unseen import course

_SHOWN = (*FRECHET, *FRECHET_UNSEEN)


def known_frechet(places: Sequence[Place]) -> list[Place]:
    """Plain and methods, as far as their readings say it."""
    known = [place.having(_SHOWN[0]) for place in places]
    return [place for place in known if place.paired]


def frechet_table(places: Sequence[Place]) -> str:
    """A row for plain and each method: before training, at the lowest held-out loss, at the end.

    And by how much it is then lower than plain's.
    """
    head = ["data", "method", "n"]
    head += [f"{TITLES[q]}: before, at best, end; lower than plain's by" for q in _SHOWN]
    rows = [head, ["---"] * len(head)]
    for place in places:
        for label in ("plain", *place.paired):
            runs, cells = place.methods[label], []
            for quality in _SHOWN:
                cell = ", ".join(f"{value:.3f}" for value in course(runs, quality))
                if label != "plain":
                    end = place.at_budget(label, "excess", quality)
                    cell += f"; {interval(end.better, '{:+.3f}')}"
                cells.append(cell)
            rows.append([f"{place.setting}, {place.mode}", label, str(len(runs)), *cells])
    return as_table(rows)
