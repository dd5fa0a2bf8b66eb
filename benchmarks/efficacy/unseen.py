"""Pictures for captions that were never trained on: is KID worse there, or only where copies help?

Training and held-out images are of one kind, so pictures that copy training images are close to the
held-out ones too. For a caption of a held-out image there is nothing to copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.efficacy.analysis import AtBudget, Comparison, best_reading
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.study import WEIGHTS
from benchmarks.efficacy.tables import TITLES, UNSEEN, Seeds, as_table, interval, scalar

TRAINED, MAIN, FIT = "kid_edges", "kid_unseen_edges", "misfit_edges"
_SHOWN = (TRAINED, MAIN, FIT)


class Unseen(NamedTuple):
    """A method and plain, by the seeds of which both have drawn captions never trained on."""

    place: Place
    label: str

    @property
    def seeds(self) -> list[int]:
        """That are known."""
        return self.place.seeds(self.label)

    def end(self, quality: str) -> AtBudget:
        """At equal updates."""
        return self.place.at_budget(self.label, "excess", quality)

    def at_equal(self, quality: str) -> Comparison | None:
        """At equal quality."""
        return self.place.compare(self.label, "excess", quality)


def known_unseen(places: Sequence[Place]) -> list[Unseen]:
    """Of all methods, as far as their readings say it."""
    found = []
    for place in places:
        known = place.having(MAIN)
        found += [Unseen(known, label) for label in known.paired]
    return found


def course(runs: Seeds, quality: str) -> tuple[float, float, float]:
    """Before training, at the lowest held-out loss, and at the end; means over seeds."""
    best, values_R = best_reading(scalar(runs, "heldout_loss")), scalar(runs, quality)
    return float(values_R[0]), float(values_R[best]), float(values_R[-1])


def course_table(found: Sequence[Unseen]) -> str:
    """A row a method, and one of plain for each data set."""
    head = ["data", "method", "n", *(f"{TITLES[q]}: before, at best, end" for q in _SHOWN)]
    rows = [head, ["---"] * len(head)]
    for place in dict.fromkeys(each.place for each in found):
        for label in ("plain", *(each.label for each in found if each.place is place)):
            runs = place.methods[label]
            numbers = (", ".join(f"{v:.3f}" for v in course(runs, q)) for q in _SHOWN)
            rows.append([f"{place.setting}, {place.mode}", label, str(len(runs)), *numbers])
    return as_table(rows)


def difference_table(found: Sequence[Unseen]) -> str:
    """Against plain: at equal updates, and at equal quality."""
    head = ["data", "method", "n"]
    head += [f"{TITLES[quality]} lower by" for quality in (TRAINED, *UNSEEN)]
    head += [f"memorizes less, at equal {TITLES[quality]}" for quality in (MAIN, FIT)]
    rows = [head, ["---"] * len(head)]
    for each in found:
        ends = [interval(each.end(q).better, "{:+.4f}") for q in (TRAINED, *UNSEEN)]
        equal = [each.at_equal(quality) for quality in (MAIN, FIT)]
        gains = [interval(e.area, "{:+.4f}") if e else "never better" for e in equal]
        about = [f"{each.place.setting}, {each.place.mode}", each.label, str(len(each.seeds))]
        rows.append([*about, *ends, *gains])
    return as_table(rows)


def in_words(found: Sequence[Unseen]) -> list[str]:
    """A sentence for each data set."""
    said = []
    for place in dict.fromkeys(each.place for each in found):
        here = [each for each in found if each.place is place]
        trained, unseen = (
            ", ".join(f"{value:.3f}" for value in course(place.plain, quality))
            for quality in (TRAINED, MAIN)
        )
        methods = "; ".join(
            f"by {interval(each.end(MAIN).better, '{:+.3f}')} with `{each.label}` (of captions "
            f"trained on by {interval(each.end(TRAINED).better, '{:+.3f}')}; n = {len(each.seeds)})"
            for each in here
        )
        said.append(
            f"on {place.setting} ({WEIGHTS[place.mode]}) plain's KID (edges) goes from before "
            f"training over its lowest held-out loss to the end {unseen}, and of captions that "
            f"were trained on {trained}; after as many updates that of unseen captions is lower "
            f"{methods}"
        )
    return said
