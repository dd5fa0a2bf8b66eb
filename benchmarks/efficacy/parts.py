"""Which parts help: a method against the same one without a part, or with a control for it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.efficacy.analysis import AtBudget, verdict
from benchmarks.efficacy.glance import in_short
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.tables import as_table, interval


class Part(NamedTuple):
    """What two methods differ by."""

    text: str
    there: str
    """The label of the method that has it."""
    instead: str
    """That of the one that has not, or has something else in its place."""


PARTS = (
    Part("AGC", "agc", "plain"),
    Part("AGC's choice, and not as many at random", "agc", "agc_random_skip"),
    Part("TAA", "taa_gentle", "plain"),
    Part("TAA beside AGC", "agc_taa_gentle", "agc"),
    Part("AGC beside TAA", "agc_taa_gentle", "taa_gentle"),
    Part("TAA's strengths, and not dealt out at random", "agc_taa_gentle", "shuffled_gentle"),
    Part("TAA's strengths, and not one for all", "agc_taa_gentle", "constant_gentle"),
    Part("gentle operations, and not RandAugment's", "agc_taa_gentle", "agc_taa"),
    Part("IET", "iet", "plain"),
    Part("AGC in shards", "iet_agc", "iet"),
    Part("AGC's choice in shards, and not as many at random", "iet_agc", "random_skip"),
    Part("TAA in shards", "iet_agc_taa_gentle", "iet_agc"),
    Part("MSR", "iet_agc_plus_gentle", "iet_agc_taa_gentle"),
    Part("MSR's choice, and not others", "iet_agc_plus_gentle", "random_exchange_gentle"),
    Part("IET and MSR beside AGC and TAA", "iet_agc_plus_gentle", "agc_taa_gentle"),
    Part("EMA", "ema", "plain"),
    Part("EMA beside AGC and TAA", "agc_taa_gentle_ema", "agc_taa_gentle"),
    Part("dropout 0.1", "dropout", "plain"),
    Part("weight decay 1, and not 0.01", "weight_decay", "plain"),
)
_HEAD = (
    *("what", "data", "method", "and without it", "n"),
    *("excess there", "less, at equal updates", "held-out loss is lower by"),
    *("KID (edges) is lower by", "less, at equal held-out loss", "at the best of it"),
    "less, at equal KID (edges)",
)


def part_by_part(places: Sequence[Place]) -> str:
    """The table, where there is anything to compare."""
    rows = [
        [part.text, f"{place.setting}, {place.mode}", *_row(part, place)]
        for part, place in _found(places)
    ]
    if not rows:
        return ""
    return (
        "\n## Part by part\n\nEach row is a method against the same one without a part, or with a "
        "control in its place that has the part's rates and not its choice of samples; the last "
        "ones are of other settings. Excess similarity (pixels) at the end of training, first "
        "without the part; *less* and *more* as above, and the best of a quality is that which "
        "both reach.\n\n"
        f"{as_table([list(_HEAD), ['---'] * len(_HEAD), *rows])}"
    )


def _found(places: Sequence[Place]) -> Iterator[tuple[Part, Place]]:
    """Each part, and a place of its two methods alone: the one without it as what is compared
    with."""
    for part in (*PARTS, *_settings(places)):
        for place in places:
            there, instead = (place.methods.get(label, {}) for label in part[1:])
            if set(there) & set(instead):
                yield part, Place(place.setting, place.mode, instead, {part.there: there})


def _settings(places: Sequence[Place]) -> list[Part]:
    """Of methods that were run with other settings too."""
    labels = dict.fromkeys(label for place in places for label in place.others if "," in label)
    return [
        Part(setting, label, method)
        for label in labels
        for method, setting in [label.split(", ", 1)]
    ]


def _row(part: Part, place: Place) -> list[str]:
    end, edges = (place.at_budget(part.there, "excess", q) for q in ("heldout_loss", "kid_edges"))
    loss, kid = (place.compare(part.there, "excess", q) for q in ("heldout_loss", "kid_edges"))
    seeds = set(place.plain) & set(place.others[part.there])
    return [
        *(part.there, part.instead, str(len(seeds))),
        f"{end.first.value:+.3f}, {end.second.value:+.3f}",
        _at_end(end),
        interval(end.better, "{:+.4f}"),
        interval(edges.better, "{:+.3f}"),
        *(in_short(loss), in_short(loss, at=-1), in_short(kid)),
    ]


def _at_end(end: AtBudget) -> str:
    share = f", {interval(end.reduction, '{:.0%}')} of it" if end.reduction else ""
    return f"**{verdict(end.difference)}**: {interval(end.difference, '{:+.3f}')}{share}"
