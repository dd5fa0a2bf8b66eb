"""Which parts help: a method against the same one without a part, or with a control for it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.efficacy.analysis import AtBudget, Comparison, verdict
from benchmarks.efficacy.glance import QUALITIES, in_short, less_by
from benchmarks.efficacy.places import Place
from benchmarks.efficacy.tables import MEAN_OF_LEVELS, as_table, interval


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
    Part("TAA of some, and not of all at one strength", "agc_taa_gentle", "constant_gentle"),
    Part("gentle operations, and not RandAugment's", "agc_taa_gentle", "agc_taa"),
    Part("IET", "iet", "plain"),
    Part("AGC in shards", "iet_agc", "iet"),
    Part("AGC's choice in shards, and not as many at random", "iet_agc", "random_skip"),
    Part("TAA in shards", "iet_agc_taa_gentle", "iet_agc"),
    Part("MSR", "iet_agc_plus_gentle", "iet_agc_taa_gentle"),
    Part("MSR without TAA", "iet_agc_msr", "iet_agc"),
    Part("MSR's choice, and not others", "iet_agc_plus_gentle", "random_exchange_gentle"),
    Part("IET and MSR beside AGC and TAA", "iet_agc_plus_gentle", "agc_taa_gentle"),
    Part("EMA", "ema", "plain"),
    Part("EMA beside AGC and TAA", "agc_taa_gentle_ema", "agc_taa_gentle"),
    Part(
        "EMA beside AGC at 0.9 and TAA",
        "agc_taa_gentle_ema, agc_threshold 0.9",
        "agc_taa_gentle, agc_threshold 0.9",
    ),
    Part("dropout 0.1", "dropout", "plain"),
    Part("weight decay 1, and not 0.01", "weight_decay", "plain"),
)
ABOUT = (
    "a method against the same one without a part, or with a control in its place that has the "
    "part's rates and not its choice of samples (but for one strength, at which all are "
    "augmented); the last rows are of other settings."
)
"""What a row of a table of parts is."""
HELPS, TRADES, LESS, NOTHING, MORE, HURTS = WORDS = (
    "helps",
    "trades",
    "does what training less does",
    "nothing shown",
    "does what training longer does",
    "hurts",
)
"""Less or more at equal held-out loss, by the mean of its levels, and a trade where a KID at equal
updates is surely worse with less or better with more, as spoilt pictures resemble none; where
neither is shown, less or more at equal updates; or none of this."""


class Finding(NamedTuple):
    """What a part does at a place."""

    part: Part
    place: Place
    """With the one method, and the other as what it is compared with."""

    @property
    def end(self) -> AtBudget:
        """At equal updates."""
        return self.place.at_budget(self.part.there)

    @property
    def loss(self) -> Comparison | None:
        """At equal held-out loss."""
        return self.place.compare(self.part.there)

    @property
    def number(self) -> int:
        """Of seeds that both methods have."""
        return len(self.place.seeds(self.part.there))

    @property
    def word(self) -> str:
        """One of `WORDS`."""
        said = verdict(self.loss.area) if self.loss else ""
        kids = [
            self.place.at_budget(self.part.there, "excess", kid).better for kid in QUALITIES[1:]
        ]
        if said == "less":
            return TRADES if any(kid.high < 0 for kid in kids) else HELPS
        if said == "more":
            return TRADES if any(kid.low > 0 for kid in kids) else HURTS
        return _AT_EQUAL_UPDATES[verdict(self.end.difference)]


_AT_EQUAL_UPDATES = {"less": LESS, "more": MORE, "no difference shown": NOTHING}


def findings(places: Sequence[Place]) -> list[Finding]:
    """Of each part, then of each setting that was varied: where both methods have been run."""
    return [
        Finding(part, Place(place.setting, place.mode, instead, {part.there: there}))
        for part in (*PARTS, *_varied(places))
        for place in places
        for there, instead in [[place.methods.get(label, {}) for label in part[1:]]]
        if set(there) & set(instead)
    ]


def _varied(places: Sequence[Place]) -> Iterator[Part]:
    """Methods that were run with other settings too."""
    labels = dict.fromkeys(label for place in places for label in place.others if "," in label)
    for label in labels:
        method, setting = label.split(", ", 1)
        yield Part(setting, label, method)


def parts_table(found: Sequence[Finding]) -> str:
    """What each does, in a word and three numbers."""
    head = ["what", "in", "data", "n", "memorizes less, at equal updates", "held-out loss lower by"]
    head += ["memorizes less, at equal held-out loss", "in short"]
    rows = [
        [
            *(each.part.text, _method(each.part), f"{each.place.setting}, {each.place.mode}"),
            str(each.number),
            less_by(each.end),
            interval(each.end.better, "{:+.4f}"),
            interval(each.loss.area, "{:+.4f}") if each.loss else "never better",
            f"**{each.word}**" if each.word in (HELPS, HURTS) and each.number > 1 else each.word,
        ]
        for each in found
    ]
    return as_table([head, ["---"] * len(head), *rows])


def numbers_table(found: Sequence[Finding]) -> str:
    """The same with all numbers, at equal KID too."""
    head = ["what", "data", "method", "and without it", "n", "excess there: without, with"]
    head += ["less, at equal updates", "held-out loss is lower by", "KID (edges) is lower by"]
    head += ["less, at 95% of the gain in held-out loss", "at the best of it", MEAN_OF_LEVELS]
    head += ["less, at equal KID (edges)"]
    rows = []
    for each in found:
        there = each.part.there
        edges = each.place.at_budget(there, "excess", "kid_edges")
        rows.append(
            [
                *(each.part.text, f"{each.place.setting}, {each.place.mode}", *each.part[1:]),
                str(each.number),
                f"{each.end.first.value:+.3f}, {each.end.second.value:+.3f}",
                f"**{verdict(each.end.difference)}**: {less_by(each.end)}",
                interval(each.end.better, "{:+.4f}"),
                interval(edges.better, "{:+.3f}"),
                *(in_short(each.loss), in_short(each.loss, at=-1)),
                interval(each.loss.area, "{:+.4f}") if each.loss else "",
                in_short(each.place.compare(there, "excess", "kid_edges")),
            ]
        )
    return as_table([head, ["---"] * len(head), *rows])


def _method(part: Part) -> str:
    """The method that has it, without the setting that ``text`` names."""
    return part.there.removesuffix(f", {part.text}")
